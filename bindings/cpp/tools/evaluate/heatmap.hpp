/// What a policy fetched, by layer, from a trace, as SVG.

#pragma once

#include <string>

namespace evaluate {

/// What the columns of a heat map are.
enum class Columns {
  step,      ///< when it was fetched: the position of the step's token
  position,  ///< what was fetched: the position of the entry's token
};

/// The picture; a cell is the share of a layer's past entries that a step fetched.
[[nodiscard]] std::string heatmap(const std::string& trace_path, Columns columns);

}  // namespace evaluate
