#include "heatmap.hpp"

#include <algorithm>
#include <cstdint>
#include <cmath>
#include <limits>
#include <map>
#include <stdexcept>
#include <vector>

#include "../common/program.hpp"
#include "../common/svg.hpp"
#include "../common/trace.hpp"

namespace evaluate {
namespace {

constexpr std::size_t most_columns = 100;
constexpr double left = 64;
constexpr double top = 46;
constexpr double bottom_margin = 62;
constexpr double map_width = 620;
constexpr double scale_x = left + map_width + 22;
constexpr double picture_width = 800;

/// Entries that were fetched, and that there were.
struct Cell {
  double fetched = 0;
  double past = 0;

  [[nodiscard]] double share() const { return past > 0 ? fetched / past : std::numeric_limits<double>::quiet_NaN(); }
};

/// Cells by layer and column. Columns divide the numbers from `first` to `last`, both included, evenly.
struct Map {
  std::uint32_t layers = 0;
  std::uint32_t first = 0;
  std::uint32_t last = 0;
  std::size_t columns = 0;
  std::vector<Cell> cells;

  Map(std::uint32_t layer_count, std::uint32_t from, std::uint32_t to) : layers(layer_count), first(from), last(to) {
    columns = std::min<std::size_t>(most_columns, std::size_t{last} - first + 1);
    cells.resize(layers * columns);
  }
  [[nodiscard]] std::size_t column(std::uint32_t number) const {
    return static_cast<std::size_t>(std::uint64_t{number - first} * columns / (std::uint64_t{last} - first + 1));
  }
  Cell& at(std::uint32_t layer, std::size_t col) { return cells[layer * columns + col]; }
  [[nodiscard]] const Cell& at(std::uint32_t layer, std::size_t col) const { return cells[layer * columns + col]; }
};

struct Extent {
  trace::Header header;
  std::uint32_t first = std::numeric_limits<std::uint32_t>::max();
  std::uint32_t last = 0;
};

Extent measure(const std::string& path) {
  Extent extent;
  extent.header = trace::read(path, [&](const trace::Header&, const trace::Record& record) {
    extent.first = std::min(extent.first, record.step);
    extent.last = std::max(extent.last, record.step);
  });
  if (extent.first > extent.last) throw std::runtime_error(path + ": there is not one record in it");
  return extent;
}

Map by_step(const std::string& path, const Extent& extent) {
  Map map(extent.header.layers, extent.first, extent.last);
  trace::read(path, [&](const trace::Header&, const trace::Record& record) {
    Cell& cell = map.at(record.layer, map.column(record.step));
    cell.fetched += static_cast<double>(record.missed.size());
    cell.past += record.candidates;
  });
  return map;
}

Map by_position(const std::string& path, const Extent& extent) {
  Map map(extent.header.layers, 0, std::max(extent.last, 1u) - 1);
  // How many steps (of any head) of a layer had how many entries before them: sums of these are the denominators.
  std::vector<std::map<std::uint32_t, double>> lengths(map.layers);
  trace::read(path, [&](const trace::Header&, const trace::Record& record) {
    for (const std::uint32_t row : record.missed) map.at(record.layer, map.column(row)).fetched += 1;
    lengths[record.layer][record.step] += 1;
  });
  for (std::uint32_t layer = 0; layer < map.layers; ++layer) {
    for (const auto& [length, records] : lengths[layer]) {
      for (std::size_t col = 0; col < map.columns; ++col) {
        const double span = static_cast<double>(map.last) - map.first + 1;
        const double begin = std::ceil(static_cast<double>(col) * span / static_cast<double>(map.columns));
        const double end = std::ceil(static_cast<double>(col + 1) * span / static_cast<double>(map.columns));
        map.at(layer, col).past += records * std::max(0.0, std::min<double>(end, length) - begin);
      }
    }
  }
  return map;
}

/// 0 to 1 as white, yellow, red, black.
std::string colour(double t) {
  struct Stop {
    double at, r, g, b;
  };
  static constexpr Stop stops[] = {{0, 255, 255, 245}, {0.25, 254, 217, 118}, {0.5, 252, 141, 60}, {0.75, 200, 20, 40}, {1, 70, 0, 30}};
  t = std::clamp(t, 0.0, 1.0);
  std::size_t i = 1;
  while (stops[i].at < t) ++i;
  const Stop& a = stops[i - 1];
  const Stop& b = stops[i];
  const double f = (t - a.at) / (b.at - a.at);
  const auto mix = [f](double from, double to) { return static_cast<int>(std::lround(from + (to - from) * f)); };
  return program::format("#%02x%02x%02x", static_cast<unsigned>(mix(a.r, b.r)), static_cast<unsigned>(mix(a.g, b.g)),
                         static_cast<unsigned>(mix(a.b, b.b)));
}

std::string percent(double share) { return program::format("%.3g%%", share * 100); }

std::string draw(const Map& map, Columns columns) {
  const double row_height = std::clamp(380.0 / map.layers, 6.0, 40.0);
  const double map_height = row_height * map.layers;
  const double bottom = top + map_height;
  const double cell_width = map_width / static_cast<double>(map.columns);
  double greatest = 0;
  for (const Cell& cell : map.cells) {
    if (cell.past > 0) greatest = std::max(greatest, cell.share());
  }
  const double scale = greatest > 0 ? greatest : 1;

  svg::Picture picture(picture_width, bottom + bottom_margin);
  picture.text(left + map_width / 2, 28, "Share of the past entries that a step fetched", 16, svg::Anchor::middle, "#222", false, true);
  picture.rectangle(left, top, map_width, map_height, "#d8d8d8");  // grey: the layer was not speculated, or there was nothing
  for (std::uint32_t layer = 0; layer < map.layers; ++layer) {
    for (std::size_t col = 0; col < map.columns; ++col) {
      const Cell& cell = map.at(layer, col);
      if (!(cell.past > 0)) continue;
      picture.rectangle(left + cell_width * static_cast<double>(col), top + row_height * layer, cell_width + 0.3, row_height + 0.3,
                        colour(cell.share() / scale));
    }
  }
  const std::uint32_t every = std::max(1u, static_cast<std::uint32_t>(std::ceil(18 / row_height)));
  for (std::uint32_t layer = 0; layer < map.layers; layer += every) {
    picture.text(left - 8, top + row_height * (layer + 0.5) + 4.5, std::to_string(layer), 13, svg::Anchor::end);
  }
  for (int i = 0; i <= 4; ++i) {
    const double at = map.first + (static_cast<double>(map.last) - map.first) * i / 4;
    picture.text(left + map_width * i / 4, bottom + 20, program::format("%.0f", at), 13, svg::Anchor::middle);
  }
  picture.text(left + map_width / 2, bottom + 46,
               columns == Columns::step ? "position of the decode step" : "position of the entry that was fetched", 14,
               svg::Anchor::middle);
  picture.text(20, top + map_height / 2, "layer", 14, svg::Anchor::middle, "#222", true);

  constexpr int bands = 60;
  for (int i = 0; i < bands; ++i) {
    const double t = static_cast<double>(i) / (bands - 1);
    picture.rectangle(scale_x, bottom - map_height * (i + 1) / bands, 18, map_height / bands + 0.4, colour(t));
  }
  picture.rectangle(scale_x, top, 18, map_height, "none", "#888");
  picture.text(scale_x + 24, top + 10, percent(scale), 13);
  picture.text(scale_x + 24, (top + bottom) / 2 + 4.5, percent(scale / 2), 13);
  picture.text(scale_x + 24, bottom, "0%", 13);
  return picture.finish();
}

}  // namespace

std::string heatmap(const std::string& trace_path, Columns columns) {
  const Extent extent = measure(trace_path);
  return draw(columns == Columns::step ? by_step(trace_path, extent) : by_position(trace_path, extent), columns);
}

}  // namespace evaluate
