#include "plot.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "../common/program.hpp"
#include "../common/svg.hpp"

namespace evaluate {
namespace {

constexpr double width = 800;
constexpr double height = 500;
constexpr double left = 78;
constexpr double right = width - 24;
constexpr double top = 46;
constexpr double bottom = height - 62;
constexpr double legend_line = 20;

/// Told apart by the colour-blind too (Okabe and Ito), and each has a marker of its own.
constexpr std::array<const char*, 7> colours = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444"};

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void take(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
};

/// A step of 1, 2 or 5 times a power of ten that divides `span` into 4 to 9 parts.
double nice_step(double span) {
  const double rough = span / 5;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (rough <= factor * power * 1.2) return factor * power;
  }
  return 10 * power;
}

std::string number(double value) { return program::format("%.4g", value); }

/// 800 by 500 pixels, and where values lie in them.
struct Frame {
  Range x;
  Range y;

  [[nodiscard]] double across(double share) const {
    return left + (std::log(share) - std::log(x.low)) / (std::log(x.high) - std::log(x.low)) * (right - left);
  }
  [[nodiscard]] double down(double value) const { return bottom - (value - y.low) / (y.high - y.low) * (bottom - top); }
};

void marker(svg::Picture& picture, std::size_t kind, double x, double y, const char* colour) {
  const auto shape = [&](std::initializer_list<std::pair<double, double>> corners) {
    std::string points;
    for (const auto& [dx, dy] : corners) points += program::format("%.1f,%.1f ", x + dx, y + dy);
    picture.polygon(points, colour, colour);
  };
  switch (kind % 4) {
    case 0: picture.circle(x, y, 5, colour); break;
    case 1: shape({{-4, -4}, {4, -4}, {4, 4}, {-4, 4}}); break;
    case 2: shape({{0, -5.5}, {5, 4}, {-5, 4}}); break;
    default: shape({{0, -6}, {5, 0}, {0, 6}, {-5, 0}}); break;
  }
}

void draw_axes(svg::Picture& picture, const Chart& chart, const Frame& frame) {
  const double step = nice_step(frame.y.high - frame.y.low);
  for (double value = std::ceil(frame.y.low / step) * step; value <= frame.y.high + step * 1e-6; value += step) {
    picture.line(left, frame.down(value), right, frame.down(value), "#e4e4e4");
    picture.text(left - 8, frame.down(value) + 4.5, number(value), 13, svg::Anchor::end);
  }
  const bool narrow = frame.x.high < frame.x.low * 12;
  for (const double power : {0.001, 0.01, 0.1, 1.0, 10.0, 100.0}) {
    for (const double factor : {1.0, 1.5, 2.0, 3.0, 5.0, 7.0}) {
      const bool coarse = factor != 1.5 && factor != 3.0 && factor != 7.0;
      const double share = factor * power / 100;
      if ((!narrow && !coarse) || share < frame.x.low * 0.999 || share > std::min(1.001, frame.x.high * 1.001)) continue;
      picture.line(frame.across(share), top, frame.across(share), bottom, "#e4e4e4");
      picture.text(frame.across(share), bottom + 20, number(factor * power) + "%", 13, svg::Anchor::middle);
    }
  }
  picture.line(left, top, left, bottom, "#222");
  picture.line(left, bottom, right, bottom, "#222");
  picture.text((left + right) / 2, 28, chart.title, 16, svg::Anchor::middle, "#222", false, true);
  picture.text((left + right) / 2, height - 18, chart.x_title, 14, svg::Anchor::middle);
  picture.text(22, (top + bottom) / 2, chart.y_title, 14, svg::Anchor::middle, "#222", true);
}

/// Top right: perplexity falls from left to right, so there is room.
void draw_legend(svg::Picture& picture, const std::vector<Curve>& curves) {
  std::size_t longest = 0;
  for (const Curve& curve : curves) longest = std::max(longest, curve.label.size());
  const double wide = std::min(52 + 7.1 * static_cast<double>(longest), right - left - 20);
  const double x = right - wide - 8;
  picture.rectangle(x, top + 8, wide, legend_line * static_cast<double>(curves.size()) + 10, "#ffffffdd", "#bbb");
  for (std::size_t i = 0; i < curves.size(); ++i) {
    const double y = top + 23 + legend_line * static_cast<double>(i);
    const char* const colour = colours[i % colours.size()];
    if (curves[i].points.size() > 1) picture.line(x + 8, y, x + 36, y, colour, 2);
    marker(picture, i, x + 22, y, colour);
    picture.text(x + 44, y + 4.5, curves[i].label, 13);
  }
}

}  // namespace

std::string draw(const Chart& chart) {
  Frame frame;
  std::vector<Curve> curves;
  for (const Curve& curve : chart.curves) {
    Curve kept{curve.label, {}};
    for (const auto& [share, value] : curve.points) {
      if (!(share > 0) || !std::isfinite(share) || !std::isfinite(value)) continue;
      kept.points.emplace_back(share, value);
      frame.x.take(share);
      frame.y.take(value);
    }
    std::sort(kept.points.begin(), kept.points.end());
    if (!kept.points.empty()) curves.push_back(std::move(kept));
  }
  svg::Picture picture(width, height);
  if (curves.empty()) {
    picture.text(width / 2, height / 2, "nothing to show", 16, svg::Anchor::middle);
    return picture.finish();
  }
  // Some room around, and an axis even for a single point.
  frame.x = {frame.x.low / 1.3, std::max(1.0, frame.x.high)};
  if (frame.x.high < frame.x.low * 4) frame.x.low = frame.x.high / 4;
  frame.x.high *= 1.05;
  const double margin = std::max((frame.y.high - frame.y.low) * 0.08, std::abs(frame.y.high) * 1e-3 + 1e-6);
  frame.y = {frame.y.low - margin, frame.y.high + margin};

  draw_axes(picture, chart, frame);
  for (std::size_t i = 0; i < curves.size(); ++i) {
    const char* const colour = colours[i % colours.size()];
    std::string points;
    for (const auto& [share, value] : curves[i].points) {
      points += program::format("%.1f,%.1f ", frame.across(share), frame.down(value));
    }
    if (curves[i].points.size() > 1) picture.polygon(points, "none", colour, false);
    // What needs everything is a level to compare with, all the way across.
    if (curves[i].points.size() == 1 && curves[i].points[0].first >= 0.999) {
      const double y = frame.down(curves[i].points[0].second);
      picture.line(left, y, right, y, colour, 1.5, "6 4");
    }
    for (const auto& [share, value] : curves[i].points) marker(picture, i, frame.across(share), frame.down(value), colour);
  }
  draw_legend(picture, curves);
  return picture.finish();
}

}  // namespace evaluate
