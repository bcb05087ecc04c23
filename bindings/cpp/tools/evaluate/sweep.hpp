/// A grid of policies, one evaluation after another on one model.

#pragma once

#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "outcome.hpp"

namespace evaluate {

/// Evaluates every point, prints a line for each, and keeps the CSV and the plot up to date after each, so that an interrupted
/// sweep is not lost. A point that fails is said so, and the others go on. Returns the results as JSON; `failed` counts.
[[nodiscard]] nlohmann::json sweep(const Options& options, const kva::Model& model, const std::vector<std::uint32_t>& tokens,
                                   std::size_t& failed);

}  // namespace evaluate
