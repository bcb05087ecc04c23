/// The measurements of kva-bench.

#pragma once

#include <cstdint>
#include <functional>
#include <optional>
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

/// One policy at one context length and batch size.
struct Row {
  const grid::Point* policy = nullptr;
  std::uint64_t context = 0;
  std::uint64_t batch = 0;
  Spread prefill;  ///< tokens per second; empty for context 0
  Spread decode;   ///< tokens per second of the whole batch
  Spread ratio;    ///< of decode, to the first policy's in the same repetition
  kva::Statistics statistics;  ///< counters: of all decode steps; KV: of the last repetition's end
  std::optional<double> link_busy;  ///< share of the steps' time in which entries came from host memory, in further steps
  std::uint64_t peak_memory_bytes = 0;  ///< of all policies that are measured together

  [[nodiscard]] std::uint64_t kv_bytes() const;
};

/// Called with the fraction of the row that is done.
using RowProgress = std::function<void(double fraction, const std::string& doing)>;

/// Runs a few tokens, untimed: first use touches the weights and the scratch memory.
void warm_up(const kva::Model& model, const Options& options);

/// A row for each policy; they take turns within a repetition. Throws `Interrupted` after Ctrl-C.
[[nodiscard]] std::vector<Row> measure(const kva::Model& model, const Options& options, std::uint64_t context,
                                       std::uint64_t batch, const RowProgress& progress);

struct Interrupted {};

}  // namespace bench
