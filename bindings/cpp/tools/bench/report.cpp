#include "report.hpp"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "../common/machine.hpp"

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

nlohmann::json to_json(const Row& row, const Options& options) {
  return {{"context", row.context},
          {"batch", row.batch},
          {"policy", program::name(options.policy)},
          {"steps", options.steps},
          {"prefill_tokens_per_second", to_json(row.prefill)},
          {"decode_tokens_per_second", to_json(row.decode)},
          {"kv_bytes", row.kv_bytes},
          {"peak_memory_bytes", row.peak_memory_bytes}};
}

}  // namespace

void print_heading(const kva::Model& model, const Options& options) {
  const kva::ModelInfo info = model.info().value();
  std::printf("%s: %s, %.1f M parameters, %s of weights in %s, loaded in %.2f s\n",
              options.model.path.empty() ? options.model.shape.c_str() : options.model.path.c_str(),
              info.architecture.c_str(), static_cast<double>(info.parameters) / 1e6,
              program::bytes(info.weight_bytes).c_str(), program::name(info.dtype).c_str(), info.load_seconds);
  std::printf("%s; %llu decode steps, %llu repetitions; median (min - max)\n\n", info.backend.c_str(),
              static_cast<unsigned long long>(options.steps), static_cast<unsigned long long>(options.repetitions));
}

void print_columns() {
  std::printf("%8s %6s  %-8s  %-30s  %-30s  %10s  %11s\n", "context", "batch", "policy", "prefill tokens/s",
              "decode tokens/s", "KV", "peak memory");
}

void print(const Row& row, const Options& options) {
  std::printf("%8llu %6llu  %-8s  %-30s  %-30s  %10s  %11s\n", static_cast<unsigned long long>(row.context),
              static_cast<unsigned long long>(row.batch), program::name(options.policy).c_str(), text(row.prefill).c_str(),
              text(row.decode).c_str(), program::bytes(row.kv_bytes).c_str(),
              program::bytes(row.peak_memory_bytes).c_str());
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
            {"policy", program::name(options.policy)},
            {"kv_dtype", program::name(options.kv_dtype)},
            {"steps", options.steps},
            {"repetitions", options.repetitions},
            {"prefill_repeated", !options.prefill_once},
            {"seed", options.seed}}}};
}

nlohmann::json to_json(const kva::Model& model, const Options& options, const std::vector<Row>& rows,
                       std::uint64_t peak_memory_bytes) {
  nlohmann::json result = describe(model, options);
  result["rows"] = nlohmann::json::array();
  for (const Row& row : rows) result["rows"].push_back(to_json(row, options));
  result["peak_memory_bytes"] = peak_memory_bytes;
  return result;
}

}  // namespace bench
