/// Random token ids: a dense model takes as long over any of them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

namespace bench {

[[nodiscard]] inline std::vector<std::uint32_t> random_tokens(std::size_t count, std::uint32_t vocabulary,
                                                              std::uint64_t seed) {
  std::mt19937_64 random(seed);  // the same numbers with every standard library, unlike its distributions
  std::vector<std::uint32_t> tokens(count);
  for (std::uint32_t& token : tokens) token = static_cast<std::uint32_t>(random() % vocabulary);
  return tokens;
}

}  // namespace bench
