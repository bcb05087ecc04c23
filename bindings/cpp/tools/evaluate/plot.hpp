/// A line chart as SVG, 800 by 500: what the paper's Figures 11 and 12 show.

#pragma once

#include <string>
#include <utility>
#include <vector>

namespace evaluate {

struct Curve {
  std::string label;
  std::vector<std::pair<double, double>> points;  ///< in any order
};

struct Chart {
  std::string title;
  std::string x_title;
  std::string y_title;
  std::vector<Curve> curves;
};

/// x is a share, on a logarithmic axis in per cent; curves without points, and points that are not finite or whose share is
/// not above 0, are left out.
[[nodiscard]] std::string draw(const Chart& chart);

}  // namespace evaluate
