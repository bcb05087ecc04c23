/// The command line of kva-evaluate.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../common/grid.hpp"
#include "../common/policy.hpp"
#include "../common/program.hpp"
#include "heatmap.hpp"

namespace evaluate {

/// What the plot of a sweep has from left to right.
enum class Across {
  attended,  ///< relative size of the KV that was attended, over all layers
  selected,  ///< share of the past that was selected, over speculated layers
  fetched,   ///< share of the past that a step fetched
};

struct Options {
  program::ModelFlags model;
  policy::Flags policy;
  std::string text;
  std::string token_ids;
  std::uint64_t prefill = 0;
  bool stepwise = false;
  std::string json;

  std::vector<grid::Point> sweep;  ///< empty: one evaluation
  std::string csv;
  std::string svg;
  Across svg_x = Across::attended;
  std::string heatmap;
  Columns heatmap_by = Columns::step;
  std::string read_trace;  ///< only draw the heat map of this trace

  [[nodiscard]] const std::string& input() const { return text.empty() ? token_ids : text; }
};

/// False where --help was asked for and answered.
[[nodiscard]] bool parse(int argc, char** argv, Options& options);

}  // namespace evaluate
