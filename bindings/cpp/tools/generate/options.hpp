/// The command line of kva-generate.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../common/policy.hpp"
#include "../common/program.hpp"

namespace generate {

struct Options {
  program::ModelFlags model;
  policy::Flags policy;
  std::optional<std::string> prompt;
  std::optional<std::string> prompt_file;
  bool chat = false;
  std::optional<std::string> system;
  std::uint64_t context = 0;
  kva::GenerateOptions generation;
  bool statistics = false;
};

/// False where --help was asked for and answered.
[[nodiscard]] bool parse(int argc, char** argv, Options& options);

}  // namespace generate
