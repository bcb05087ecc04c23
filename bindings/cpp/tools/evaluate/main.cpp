/// kva-evaluate: mean negative log likelihood and perplexity of a text, under any policy.

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "../common/files.hpp"
#include "../common/interrupt.hpp"
#include "../common/json.hpp"
#include "../common/machine.hpp"
#include "input.hpp"
#include "outcome.hpp"
#include "sweep.hpp"

namespace evaluate {
namespace {

/// A name that nobody has; the file is removed with the object.
class TemporaryFile {
 public:
  TemporaryFile() {
    const char* const folder = std::getenv("TMPDIR");
    path_ = std::string(folder == nullptr || *folder == '\0' ? "/tmp" : folder) + "/kva-evaluate-XXXXXX";
    const int opened = mkstemp(path_.data());
    if (opened < 0) files::fail(path_, "create it");
    close(opened);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() { unlink(path_.c_str()); }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::vector<std::uint32_t> checked_tokens(const Options& options, const kva::Model& model) {
  std::vector<std::uint32_t> tokens = read_tokens(options, model);
  const std::string& file = options.input();
  if (tokens.size() < 2) throw std::runtime_error(file + ": " + std::to_string(tokens.size()) + " tokens; at least 2 are needed");
  if (options.prefill > tokens.size() - 2) {
    throw args::UsageError("--prefill " + std::to_string(options.prefill) + " leaves nothing to evaluate: " + file + " has " +
                           std::to_string(tokens.size()) + " tokens, so P is at most " + std::to_string(tokens.size() - 2));
  }
  return tokens;
}

nlohmann::json about(const Options& options, const kva::Model& model, std::size_t tokens) {
  return {{"model", options.model.path},
          {"file", options.input()},
          {"dtype", program::name(model.info().value().dtype)},
          {"prefill", options.prefill},
          {"tokens", tokens}};
}

int evaluate_one(const Options& options, const kva::Model& model, const std::vector<std::uint32_t>& tokens) {
  policy::Flags flags = options.policy;
  std::optional<TemporaryFile> temporary;
  if (!options.heatmap.empty() && flags.trace.empty()) flags.trace = temporary.emplace().path();

  const Outcome outcome = evaluate(options, flags, model, tokens, "evaluating");
  std::printf("%s: %zu tokens, %zu positions from %llu on\n", options.input().c_str(), tokens.size(), outcome.positions,
              static_cast<unsigned long long>(options.prefill));
  print(outcome, flags);
  std::fprintf(stderr, "%.2f s, %.1f tokens/s, %s of memory at most\n", outcome.seconds,
               static_cast<double>(tokens.size()) / outcome.seconds, program::bytes(machine::peak_memory_bytes()).c_str());
  if (!options.heatmap.empty()) files::write(options.heatmap, heatmap(flags.trace, options.heatmap_by));
  if (!options.json.empty()) {
    nlohmann::json result = about(options, model, tokens.size());
    result.update(json(outcome, options.policy, true));
    files::write(options.json, json::text(result, 1) + "\n");
  }
  return 0;
}

int evaluate_many(const Options& options, const kva::Model& model, const std::vector<std::uint32_t>& tokens) {
  std::printf("%s: %zu tokens, %zu positions from %llu on\n\n", options.input().c_str(), tokens.size(),
              tokens.size() - 1 - static_cast<std::size_t>(options.prefill), static_cast<unsigned long long>(options.prefill));
  std::size_t failed = 0;
  nlohmann::json result = about(options, model, tokens.size());
  result["results"] = sweep(options, model, tokens, failed);
  if (!options.json.empty()) files::write(options.json, json::text(result, 1) + "\n");
  if (interrupt::requested()) {
    std::fputs("kva-evaluate: interrupted; the lines above are complete\n", stderr);
    return interrupt::exit_status();
  }
  if (failed > 0) std::fprintf(stderr, "kva-evaluate: %zu of %zu evaluations failed\n", failed, options.sweep.size());
  return failed == 0 ? 0 : 1;
}

int run(const Options& options) {
  if (!options.read_trace.empty()) {
    files::write(options.heatmap, heatmap(options.read_trace, options.heatmap_by));
    return 0;
  }
  const kva::Model model = options.model.load();
  const std::vector<std::uint32_t> tokens = checked_tokens(options, model);
  for (const std::string* file : {&options.json, &options.csv, &options.svg, &options.heatmap}) {
    if (!file->empty()) files::check_writable(*file);
  }
  return options.sweep.empty() ? evaluate_one(options, model, tokens) : evaluate_many(options, model, tokens);
}

}  // namespace
}  // namespace evaluate

int main(int argc, char** argv) {
  return program::run("kva-evaluate", [&] {
    evaluate::Options options;
    return evaluate::parse(argc, argv, options) ? evaluate::run(options) : 0;
  });
}
