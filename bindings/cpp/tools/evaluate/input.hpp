/// What is evaluated, as tokens.

#pragma once

#include <cstdint>
#include <vector>

#include "options.hpp"

namespace evaluate {

/// The text or the token ids that the options name. Errors name the file.
[[nodiscard]] std::vector<std::uint32_t> read_tokens(const Options& options, const kva::Model& model);

}  // namespace evaluate
