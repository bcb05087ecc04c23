/// Negative log likelihoods of a sequence.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kvahead.hpp"

namespace evaluate {

/// Called with the number of tokens that are through.
using Done = std::function<void(std::size_t tokens)>;

/// nll[i] of tokens[i + 1] after tokens[0..=i], computed in chunks as a prefill. `session` is empty at first.
[[nodiscard]] std::vector<double> score(kva::Session& session, const std::vector<std::uint32_t>& tokens, const Done& done);

/// The same, but tokens from `prefill` (less than their number) on go in one decode step at a time. Those before are one
/// prefill, as a policy sees a prompt. Statistics are those of the steps.
[[nodiscard]] std::vector<double> score_stepwise(kva::Session& session, const std::vector<std::uint32_t>& tokens,
                                                 std::size_t prefill, std::uint32_t vocabulary, const Done& done);

}  // namespace evaluate
