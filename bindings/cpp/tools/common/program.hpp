/// What the tools share around their `main`: exit statuses, and the flags that choose and load a model.

#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "args.hpp"
#include "kvahead.hpp"

namespace program {

/// 0: done. 1: it failed. 2: the command line was wrong. 130: Ctrl-C.
/// Runs `body`, which returns a status, and turns exceptions into a line on standard error.
int run(const std::string& name, const std::function<int()>& body);

/// `printf`-style text.
[[gnu::format(printf, 1, 2)]] std::string format(const char* form, ...);

/// A `float` as a person wrote it: 0.2 and not 0.20000000298.
double rounded(float value);

/// "1.5 GiB"
std::string bytes(std::uint64_t count);

/// What a value of an enum is called on command lines and in JSON.
template <class T>
using Words = std::vector<std::pair<std::string, T>>;

template <class T>
std::string word(T sought, const Words<T>& words) {
  for (const auto& [text, value] : words) {
    if (value == sought) return text;
  }
  return "unknown";
}

Words<kva::DType> dtypes();
Words<kva::Device> devices();
std::string name(kva::DType dtype);

/// Which model, and how to hold it.
struct ModelFlags {
  std::string path;
  std::string shape;
  std::optional<std::uint64_t> random_weights;
  std::uint32_t threads = 0;
  kva::Device device = kva::Device::automatic;
  kva::DType dtype = kva::DType::automatic;
  std::string speculation_cache;
  bool copy_weights = false;
  std::string calibration;

  /// Declares --model, and --shape with --random-weights where `shapes`.
  void declare(args::Parser& parser, bool shapes);
  /// Whether the flags name one model.
  void check() const;
  /// Loads it, with progress on a terminal; stops at Ctrl-C.
  [[nodiscard]] kva::Model load() const;
};

}  // namespace program
