#include "grid.hpp"

#include <nlohmann/json.hpp>
#include <optional>

#include "files.hpp"

namespace grid {
namespace {

/// A flag, and the values that it takes in turn; a flag without a value has the one value "".
struct Axis {
  std::string key;
  std::vector<std::string> values;
};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (std::size_t start = 0; start <= text.size();) {
    const std::size_t end = std::min(text.find(separator, start), text.size());
    parts.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

std::vector<Axis> parse(const std::string& specification) {
  std::vector<Axis> axes;
  for (const std::string& part : split(specification, ';')) {
    const std::size_t equals = part.find('=');
    Axis axis{part.substr(0, equals), {}};
    if (axis.key.empty()) throw args::UsageError("'" + specification + "' has an empty setting: write policy=window;budget=0.1,0.2");
    axis.values = equals == std::string::npos ? std::vector<std::string>{""} : split(part.substr(equals + 1), ',');
    axes.push_back(std::move(axis));
  }
  return axes;
}

std::string value(const std::string& file, const nlohmann::json& json) {
  if (json.is_string()) return json.get<std::string>();
  if (json.is_number()) return json.dump();
  throw args::UsageError(file + ": " + json.dump() + " is not a value: numbers and strings are");
}

std::vector<Axis> parse(const std::string& file, const nlohmann::json& entry) {
  if (entry.is_string()) return parse(entry.get<std::string>());
  if (!entry.is_object()) throw args::UsageError(file + ": " + entry.dump() + " is neither an object nor a string");
  std::vector<Axis> axes;
  for (const auto& [key, given] : entry.items()) {
    Axis axis{key, {}};
    if (given.is_boolean()) {
      if (!given.get<bool>()) continue;
      axis.values = {""};
    } else if (given.is_array()) {
      for (const auto& one : given) axis.values.push_back(value(file, one));
      if (axis.values.empty()) throw args::UsageError(file + ": \"" + key + "\" has no values");
    } else {
      axis.values = {value(file, given)};
    }
    axes.push_back(std::move(axis));
  }
  return axes;
}

std::string describe(const std::pair<std::string, std::string>& setting) {
  if (setting.first == "policy") return setting.second;
  return setting.second.empty() ? setting.first : setting.first + " " + setting.second;
}

Point point(const std::vector<Axis>& axes, const std::vector<std::size_t>& choice, const policy::Flags& base) {
  std::optional<std::size_t> last_varying;
  for (std::size_t i = 0; i < axes.size(); ++i) {
    if (axes[i].values.size() > 1) last_varying = i;
  }
  Point point;
  point.flags = base;
  args::Parser parser("", "");
  point.flags.declare(parser);
  for (std::size_t i = 0; i < axes.size(); ++i) {
    const auto& setting = point.settings.emplace_back(axes[i].key, axes[i].values[choice[i]]);
    parser.assign("--" + setting.first, setting.second);
    const std::string text = describe(setting);
    point.label += (point.label.empty() ? "" : ", ") + text;
    if (i != last_varying) point.curve += (point.curve.empty() ? "" : ", ") + text;
  }
  if (point.curve.empty()) point.curve = policy::name(point.flags.policy);
  point.flags.check();
  return point;
}

void expand(const std::vector<Axis>& axes, const policy::Flags& base, std::vector<Point>& points) {
  std::vector<std::size_t> choice(axes.size());
  while (true) {
    points.push_back(point(axes, choice, base));
    std::size_t i = axes.size();
    while (i > 0 && ++choice[i - 1] == axes[i - 1].values.size()) choice[--i] = 0;
    if (i == 0) return;
  }
}

}  // namespace

std::vector<Point> expand(const std::string& specification, const policy::Flags& base) {
  std::vector<Point> points;
  expand(parse(specification), base, points);
  return points;
}

std::vector<Point> expand(const std::vector<std::string>& specifications, const policy::Flags& base) {
  std::vector<Point> points;
  for (const std::string& specification : specifications) {
    if (specification.find('=') != std::string::npos) {
      expand(parse(specification), base, points);
      continue;
    }
    const auto json = nlohmann::json::parse(files::read(specification), nullptr, false);
    if (!json.is_array()) throw args::UsageError(specification + ": must be a JSON array of specifications");
    for (const auto& entry : json) expand(parse(specification, entry), base, points);
  }
  return points;
}

}  // namespace grid
