/// What Linux says about the machine and about this process. Elsewhere, and where /proc is not there: empty or 0.

#pragma once

#include <chrono>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>

namespace machine {

/// Most memory that this process has held in RAM since it began or since `reset_peak_memory`.
[[nodiscard]] std::uint64_t peak_memory_bytes();
/// Begins a new peak; false where the kernel does not allow it.
bool reset_peak_memory();

/// {"cpu", "processors", "kernel", "load"}
[[nodiscard]] nlohmann::json describe();

/// How much of the machine other processes take while something is timed. Clock ticks are 10 ms, so a share over less
/// than about 100 ms means little.
class Contention {
 public:
  Contention();

  struct Reading {
    double seconds;
    double others;  ///< share of all processors, 0 to 1
  };
  [[nodiscard]] Reading read() const;

 private:
  double busy_;
  double own_;
  std::chrono::steady_clock::time_point began_;  ///< last, so that reading the others is not timed
};

}  // namespace machine
