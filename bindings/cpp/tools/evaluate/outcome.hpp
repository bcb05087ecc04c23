/// One evaluation: a text under one policy, and what came of it.

#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "options.hpp"

namespace evaluate {

struct Outcome {
  bool stepwise = false;
  std::vector<double> nll;      ///< of every position
  std::size_t positions = 0;    ///< how many the mean is over
  double mean = 0;
  double seconds = 0;
  kva::Statistics statistics;   ///< of the decode steps, where it is stepwise

  [[nodiscard]] double perplexity() const;
};

/// Evaluates `tokens` under `flags`; `task` heads the progress.
[[nodiscard]] Outcome evaluate(const Options& options, const policy::Flags& flags, const kva::Model& model,
                               const std::vector<std::uint32_t>& tokens, const std::string& task);

/// The share of the KV in 16 bits a number that this policy attends, over all layers; 1 where nothing was counted.
[[nodiscard]] double relative_size(const Outcome& outcome, const policy::Flags& flags);

/// For people: perplexity to standard output, with what the policy did.
void print(const Outcome& outcome, const policy::Flags& flags);

/// For programs: means, what the policy did, all settings; and all of `nll` where `everything`.
[[nodiscard]] nlohmann::json json(const Outcome& outcome, const policy::Flags& flags, bool everything);

}  // namespace evaluate
