/// The command line of kva-evaluate.

#pragma once

#include <cstdint>
#include <string>

#include "../common/program.hpp"

namespace evaluate {

struct Options {
  program::ModelFlags model;
  kva::Policy policy = kva::Policy::full;
  kva::DType kv_dtype = kva::DType::automatic;
  std::string text;
  std::string token_ids;
  std::uint64_t prefill = 0;
  bool stepwise = false;
  std::string json;
};

/// False where --help was asked for and answered.
[[nodiscard]] bool parse(int argc, char** argv, Options& options);

}  // namespace evaluate
