/// A progress line on standard error, where a person is looking at it.

#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>

namespace terminal {

/// Shows at most ten times a second, and only on a terminal; removes itself when done.
class Progress {
 public:
  explicit Progress(std::string task) : task_(std::move(task)), shown_(isatty(STDERR_FILENO) == 1) {}
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress() {
    if (drawn_) std::fputs("\r\033[K", stderr);
  }

  /// `fraction` from 0 to 1; `detail` follows it.
  void show(double fraction, const std::string& detail = {}) {
    if (!shown_) return;
    const auto now = std::chrono::steady_clock::now();
    if (drawn_ && now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    drawn_ = true;
    std::fprintf(stderr, "\r\033[K%s %3.0f%% %s", task_.c_str(), fraction * 100, detail.c_str());
    std::fflush(stderr);
  }

 private:
  std::string task_;
  bool shown_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace terminal
