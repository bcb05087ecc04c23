#include "report.hpp"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "../common/machine.hpp"
#include "../common/traffic.hpp"

namespace bench {
namespace {

std::string text(const Spread& spread) {
  if (spread.empty()) return "-";
  return program::format("%.2f (%.2f - %.2f)", spread.median(), spread.min(), spread.max());
}

nlohmann::json to_json(const Spread& spread) {
  if (spread.empty()) return nullptr;
  return {{"median", spread.median()}, {"min", spread.min()}, {"max", spread.max()}, {"samples", spread.samples}};
}

/// KV heads of all layers that speculate (or select otherwise).
std::uint64_t selecting_heads(const kva::Model& model, const policy::Flags& flags) {
  const kva::ModelInfo info = model.info().value();
  const kva::SessionOptions options = flags.session(0);
  std::uint64_t resident = 0;
  if (flags.policy == kva::Policy::infinigen) resident = options.infinigen.resident_layers;
  if (flags.policy == kva::Policy::window) resident = options.resident_layers;
  return (info.layers - std::min<std::uint64_t>(info.layers, resident)) * info.kv_heads;
}

/// Bytes fetched, or another count, for one step of the whole batch.
double each_step(std::uint64_t count, const Row& row, const Options& options) {
  return static_cast<double>(count) / static_cast<double>(options.steps * row.decode.samples.size());
}

/// Bytes that one decode step of the whole batch reads, wherever it computes: every weight, the entries that are attended,
/// and the index. (Not the weights that queries are predicted with, nor activations.)
struct Reads {
  double weights = 0, entries = 0, index = 0;

  Reads(const kva::Model& model, const Row& row, const Options& options) {
    const kva::ModelInfo info = model.info().value();
    const kva::DType chosen = row.policy->flags.kv_dtype;
    const kva::DType dtype = chosen == kva::DType::automatic ? info.dtype : chosen;
    const double entry = 2.0 * info.head_dim * (dtype == kva::DType::f32 ? 4 : 2);
    weights = static_cast<double>(info.weight_bytes);
    entries = each_step(row.statistics.kv_attended, row, options) * entry;
    index = static_cast<double>(row.statistics.kv_index_bytes);
  }

  [[nodiscard]] std::string text() const {
    const auto bytes = [](double count) { return program::bytes(static_cast<std::uint64_t>(count)); };
    std::string parts = "weights " + bytes(weights) + ", entries " + bytes(entries);
    if (index > 0) parts += ", index " + bytes(index);
    return "it reads " + bytes(weights + entries + index) + " of memory (" + parts + ")";
  }

  [[nodiscard]] nlohmann::json json() const { return {{"weights", weights}, {"entries", entries}, {"index", index}}; }
};

double steps_per_second(const Row& row) { return row.decode.median() / static_cast<double>(row.batch); }

nlohmann::json to_json(const kva::Model& model, const Row& row, const Options& options) {
  const kva::Statistics& s = row.statistics;
  const auto selected = traffic::selected_per_head(s, selecting_heads(model, row.policy->flags));
  nlohmann::json result = {{"context", row.context},
                           {"batch", row.batch},
                           {"policy", policy::name(row.policy->flags.policy)},
                           {"label", row.policy->label},
                           {"options", row.policy->flags.json()},
                           {"steps", options.steps},
                           {"prefill_tokens_per_second", to_json(row.prefill)},
                           {"decode_tokens_per_second", to_json(row.decode)},
                           {"decode_ratio_to_first", to_json(row.ratio)},
                           {"step_seconds", 1 / steps_per_second(row)},
                           {"link_busy", row.link_busy ? nlohmann::json(*row.link_busy) : nlohmann::json()},
                           {"host_bytes_per_second", each_step(s.kv_host_fetched_bytes, row, options) * steps_per_second(row)},
                           {"peak_memory_bytes", row.peak_memory_bytes},
                           {"selected_per_step_and_head", selected ? nlohmann::json(*selected) : nlohmann::json()},
                           {"bytes_read_per_step", Reads(model, row, options).json()},
                           {"bytes_fetched_per_step",
                            {{"host", each_step(s.kv_host_fetched_bytes, row, options)},
                             {"file", each_step(s.kv_file_fetched_bytes, row, options)},
                             {"file_read", each_step(s.kv_file_read_bytes, row, options)}}}};
  nlohmann::json moved = traffic::json(s);
  moved["kv_bytes_by_tier"] = moved["kv_bytes"];
  moved["kv_bytes"] = row.kv_bytes();
  result.update(moved);
  return result;
}

int label_width(const Options& options) {
  std::size_t widest = 8;
  for (const grid::Point& point : options.policies) widest = std::max(widest, point.label.size());
  return static_cast<int>(widest);
}

}  // namespace

void print_heading(const kva::Model& model, const Options& options) {
  const kva::ModelInfo info = model.info().value();
  std::printf("%s: %s, %.1f M parameters, %s of weights in %s, loaded in %.2f s\n",
              options.model.path.empty() ? options.model.shape.c_str() : options.model.path.c_str(),
              info.architecture.c_str(), static_cast<double>(info.parameters) / 1e6,
              program::bytes(info.weight_bytes).c_str(), info.weight_storage.c_str(), info.load_seconds);
  std::printf("%s; %llu decode steps, %llu repetitions; median (min - max)\n\n", info.backend.c_str(),
              static_cast<unsigned long long>(options.steps), static_cast<unsigned long long>(options.repetitions));
}

void print_columns(const Options& options) {
  std::printf("%8s %6s  %-*s  %-30s  %-30s  ", "context", "batch", label_width(options), "policy", "prefill tokens/s",
              "decode tokens/s");
  if (options.policies.size() > 1) std::printf("%6s  ", "ratio");
  std::printf("%10s  %11s\n", "KV", "peak memory");
}

void print(const kva::Model& model, const Row& row, const Options& options) {
  const kva::Statistics& s = row.statistics;
  std::printf("%8llu %6llu  %-*s  %-30s  %-30s  ", static_cast<unsigned long long>(row.context),
              static_cast<unsigned long long>(row.batch), label_width(options), row.policy->label.c_str(),
              text(row.prefill).c_str(), text(row.decode).c_str());
  if (options.policies.size() > 1) std::printf("%6.2f  ", row.ratio.median());
  std::printf("%10s  %11s\n", program::bytes(row.kv_bytes()).c_str(), program::bytes(row.peak_memory_bytes).c_str());
  std::string line = program::format("a step takes %.2f ms; ", 1e3 / steps_per_second(row));
  if (row.policy->flags.policy != kva::Policy::full || row.policy->flags.tier != kva::KvTier::device) {
    line += "KV: " + traffic::where(s);
    if (const auto selected = traffic::selected_per_head(s, selecting_heads(model, row.policy->flags))) {
      line += program::format("; a step selects %.1f tokens a head", *selected);
      if (const auto hits = traffic::hit_rate(s)) line += ", " + traffic::percent(hits) + " of them on the device";
    }
    const double from_host = each_step(s.kv_host_fetched_bytes, row, options);
    line += program::format("; it fetches %s from RAM (%.1f GB/s), %s from file",
                            program::bytes(static_cast<std::uint64_t>(from_host)).c_str(),
                            from_host * steps_per_second(row) / 1e9,
                            program::bytes(static_cast<std::uint64_t>(each_step(s.kv_file_read_bytes, row, options))).c_str());
    if (row.link_busy) line += ", link busy " + traffic::percent(row.link_busy) + " of the time";
    if (const auto hidden = traffic::hidden(s)) line += ", " + traffic::percent(hidden) + " of read time hidden";
    line += "; ";
  }
  std::printf("%17s%s%s\n", "", line.c_str(), Reads(model, row, options).text().c_str());
  std::fflush(stdout);
}

nlohmann::json describe(const kva::Model& model, const Options& options) {
  const kva::ModelInfo info = model.info().value();
  nlohmann::json source = options.model.path.empty()
                              ? nlohmann::json{{"shape", options.model.shape}, {"seed", *options.model.random_weights}}
                              : nlohmann::json{{"path", options.model.path}};
  source.update({{"architecture", info.architecture},
                 {"parameters", info.parameters},
                 {"weight_bytes", info.weight_bytes},
                 {"dtype", program::name(info.dtype)},
                 {"weight_storage", info.weight_storage},
                 {"layers", info.layers},
                 {"heads", info.heads},
                 {"kv_heads", info.kv_heads},
                 {"head_dim", info.head_dim},
                 {"hidden_size", info.hidden_size},
                 {"vocabulary_size", info.vocabulary_size},
                 {"context_length", info.context_length},
                 {"load_seconds", info.load_seconds}});
  return {{"version", std::string(kva::version())},
          {"machine", machine::describe()},
          {"backend", info.backend},
          {"model", source},
          {"options",
           {{"threads", options.model.threads},
            {"policy", policy::name(options.policies.front().flags.policy)},
            {"kv_dtype", program::name(options.policies.front().flags.kv_dtype)},
            {"kv", options.policies.front().flags.json()},
            {"steps", options.steps},
            {"repetitions", options.repetitions},
            {"prefill_repeated", !options.prefill_once},
            {"seed", options.seed}}}};
}

nlohmann::json to_json(const kva::Model& model, const Options& options, const std::vector<Row>& rows,
                       std::uint64_t peak_memory_bytes) {
  nlohmann::json result = describe(model, options);
  result["rows"] = nlohmann::json::array();
  for (const Row& row : rows) result["rows"].push_back(to_json(model, row, options));
  result["peak_memory_bytes"] = peak_memory_bytes;
  return result;
}

}  // namespace bench
