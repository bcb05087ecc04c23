/// Whole files, with errors that name the file.

#pragma once

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

namespace files {

struct Close {
  void operator()(std::FILE* file) const noexcept { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

[[noreturn]] inline void fail(const std::string& path, const char* doing) {
  throw std::runtime_error(path + ": cannot " + doing + ": " + std::strerror(errno));
}

/// "-" reads the standard input.
inline std::string read(const std::string& path) {
  const File opened(path == "-" ? nullptr : std::fopen(path.c_str(), "rb"));
  if (path != "-" && !opened) fail(path, "open it");
  std::FILE* const file = opened ? opened.get() : stdin;
  std::string text;
  char block[65536];
  while (const std::size_t count = std::fread(block, 1, sizeof block, file)) text.append(block, count);
  if (std::ferror(file) != 0) fail(path, "read it");
  return text;
}

/// Fails as `write` would, so that hours of work need not come first. Leaves what is there; makes an empty file otherwise.
inline void check_writable(const std::string& path) {
  if (!File(std::fopen(path.c_str(), "ab"))) fail(path, "create it");
}

inline void write(const std::string& path, const std::string& text) {
  File file(std::fopen(path.c_str(), "wb"));
  if (!file) fail(path, "create it");
  if (std::fwrite(text.data(), 1, text.size(), file.get()) != text.size() || std::fflush(file.get()) != 0) {
    fail(path, "write it");
  }
}

}  // namespace files
