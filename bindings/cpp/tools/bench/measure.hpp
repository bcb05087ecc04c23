/// The measurements of kva-bench.

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "options.hpp"

namespace bench {

/// Samples of one quantity, in the order they were taken.
struct Spread {
  std::vector<double> samples;

  [[nodiscard]] bool empty() const { return samples.empty(); }
  [[nodiscard]] double median() const;
  [[nodiscard]] double min() const;
  [[nodiscard]] double max() const;
};

struct Row {
  std::uint64_t context = 0;
  std::uint64_t batch = 0;
  Spread prefill;  ///< tokens per second; empty for context 0
  Spread decode;   ///< tokens per second of the whole batch
  std::uint64_t kv_bytes = 0;
  std::uint64_t peak_memory_bytes = 0;
};

/// Called with the fraction of the row that is done.
using RowProgress = std::function<void(double fraction, const std::string& doing)>;

/// Runs a few tokens, untimed: first use touches the weights and the scratch memory.
void warm_up(const kva::Model& model, const Options& options);

/// Throws `Interrupted` after Ctrl-C.
[[nodiscard]] Row measure(const kva::Model& model, const Options& options, std::uint64_t context, std::uint64_t batch,
                          const RowProgress& progress);

struct Interrupted {};

/// Options for a session of the size that a measurement needs; 0: the model's context length.
[[nodiscard]] kva::SessionOptions session_options(const Options& options, std::uint64_t capacity);

}  // namespace bench
