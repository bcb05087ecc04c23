#include "sweep.hpp"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <set>

#include "../common/files.hpp"
#include "../common/interrupt.hpp"
#include "../common/traffic.hpp"
#include "plot.hpp"

namespace evaluate {
namespace {

struct Result {
  const grid::Point* point;
  Outcome outcome;
};

/// Quoted where a comma, a quote or a line break is in it.
std::string field(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return quoted + "\"";
}

std::string cell(const nlohmann::json& value) {
  if (value.is_null()) return "";
  return field(value.is_string() ? value.get<std::string>() : value.dump());
}

/// Every setting is a column, empty where a policy has no use for it.
std::string csv(const std::vector<Result>& results) {
  static constexpr const char* measured[] = {"positions",
                                             "mean_nll",
                                             "perplexity",
                                             "relative_size",
                                             "kv_fraction_selected",
                                             "kv_fraction_attended",
                                             "hit_rate",
                                             "misses_per_step_fraction",
                                             "read_hidden",
                                             "evicted",
                                             "corrected",
                                             "seconds"};
  std::set<std::string> settings;
  std::vector<nlohmann::json> rows;
  for (const Result& result : results) {
    const nlohmann::json& row = rows.emplace_back(json(result.outcome, result.point->flags, false));
    for (const auto& entry : row["options"].items()) settings.insert(entry.key());
  }
  settings.erase("policy");
  std::string text = "label,policy";
  for (const std::string& setting : settings) text += "," + setting;
  for (const char* name : measured) text += std::string(",") + name;
  text += ",host_bytes_fetched,file_bytes_fetched,file_bytes_read,kv_device_bytes,kv_host_bytes,kv_file_bytes\n";
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const nlohmann::json& row = rows[i];
    text += field(results[i].point->label) + "," + cell(row["policy"]);
    for (const std::string& setting : settings) text += "," + (row["options"].contains(setting) ? cell(row["options"][setting]) : "");
    for (const char* name : measured) text += "," + cell(row[name]);
    for (const char* tier : {"host", "file", "file_read"}) text += "," + cell(row["bytes_fetched"][tier]);
    for (const char* tier : {"device", "host", "file"}) text += "," + cell(row["kv_bytes"][tier]);
    text += "\n";
  }
  return text;
}

double across(const Result& result, Across what) {
  const kva::Statistics& s = result.outcome.statistics;
  // A policy that leaves nothing out counts nothing: all of it is attended, and stands at the right of every plot.
  if (result.point->flags.policy == kva::Policy::full && what != Across::attended) return 1;
  if (what == Across::selected) return traffic::selected(s).value_or(1);
  if (what == Across::fetched) return traffic::missed(s).value_or(1);
  return relative_size(result.outcome, result.point->flags);
}

std::string plot(const std::vector<Result>& results, const std::string& title, Across what) {
  const char* const x_title = what == Across::selected  ? "share of the past selected (speculated layers; logarithmic)"
                              : what == Across::fetched ? "share of the past fetched in a step (speculated layers; logarithmic)"
                                                        : "relative KV size (attended share, all layers; logarithmic)";
  Chart chart{title, x_title, "perplexity", {}};
  for (const Result& result : results) {
    const auto same = [&](const Curve& curve) { return curve.label == result.point->curve; };
    auto curve = std::find_if(chart.curves.begin(), chart.curves.end(), same);
    if (curve == chart.curves.end()) curve = chart.curves.insert(curve, Curve{result.point->curve, {}});
    curve->points.emplace_back(across(result, what), result.outcome.perplexity());
  }
  return draw(chart);
}

std::string last_part(const std::string& path) { return path.substr(path.find_last_of('/') + 1); }

}  // namespace

nlohmann::json sweep(const Options& options, const kva::Model& model, const std::vector<std::uint32_t>& tokens,
                     std::size_t& failed) {
  std::size_t widest = 6;
  for (const grid::Point& point : options.sweep) widest = std::max(widest, point.label.size());
  const int label_width = static_cast<int>(widest);
  std::printf("%-*s  %9s  %10s  %9s  %9s  %9s  %9s  %9s\n", label_width, "policy", "mean NLL", "perplexity", "size", "selected",
              "attended", "hits", "missed");
  nlohmann::json all = nlohmann::json::array();
  std::vector<Result> results;
  for (const grid::Point& point : options.sweep) {
    if (interrupt::requested()) break;
    try {
      const std::string task = std::to_string(results.size() + 1) + "/" + std::to_string(options.sweep.size()) + " " + point.label;
      results.push_back({&point, evaluate(options, point.flags, model, tokens, task)});
    } catch (const std::exception& error) {
      if (interrupt::requested()) break;
      std::fprintf(stderr, "kva-evaluate: %s: %s\n", point.label.c_str(), error.what());
      ++failed;
      continue;
    }
    const Outcome& outcome = results.back().outcome;
    const kva::Statistics& s = outcome.statistics;
    std::printf("%-*s  %9.4f  %10.3f  %9s  %9s  %9s  %9s  %9s\n", label_width, point.label.c_str(), outcome.mean,
                outcome.perplexity(), traffic::percent(relative_size(outcome, point.flags)).c_str(),
                traffic::percent(traffic::selected(s)).c_str(), traffic::percent(traffic::attended(s)).c_str(),
                traffic::percent(traffic::hit_rate(s)).c_str(), traffic::percent(traffic::missed(s)).c_str());
    std::fflush(stdout);
    nlohmann::json entry = json(outcome, point.flags, true);
    entry["label"] = point.label;
    all.push_back(std::move(entry));
    if (!options.csv.empty()) files::write(options.csv, csv(results));
    if (!options.svg.empty()) files::write(options.svg, plot(results, last_part(options.input()), options.svg_x));
  }
  return all;
}

}  // namespace evaluate
