/// The command line of kva-bench.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../common/grid.hpp"
#include "../common/policy.hpp"
#include "../common/program.hpp"

namespace bench {

struct Options {
  program::ModelFlags model;
  policy::Flags policy;
  std::vector<grid::Point> policies;  ///< what is measured: those to compare, or `policy` alone
  std::vector<std::uint64_t> contexts = {512};
  std::vector<std::uint64_t> batches = {1};
  std::uint64_t steps = 32;
  std::uint64_t repetitions = 3;
  bool prefill_once = false;
  bool fill = false;
  std::uint64_t seed = 0;
  std::string json;
  std::string timeline;
  bool interactive = false;
};

/// False where --help was asked for and answered.
[[nodiscard]] bool parse(int argc, char** argv, Options& options);

}  // namespace bench
