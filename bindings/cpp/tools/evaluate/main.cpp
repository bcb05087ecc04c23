/// kva-evaluate: mean negative log likelihood and perplexity of a text.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "../common/files.hpp"
#include "../common/interrupt.hpp"
#include "../common/json.hpp"
#include "../common/machine.hpp"
#include "../common/terminal.hpp"
#include "input.hpp"
#include "score.hpp"

namespace evaluate {
namespace {

std::vector<double> score_with(const Options& options, const kva::Model& model, const std::vector<std::uint32_t>& tokens) {
  kva::SessionOptions session_options;
  session_options.policy = options.policy;
  session_options.kv_dtype = options.kv_dtype;
  session_options.capacity = tokens.size();
  kva::Session session = kva::Session::create(model, session_options).value();
  const interrupt::Watch watch(session);
  terminal::Progress progress("evaluating");
  const auto done = [&](std::size_t count) {
    progress.show(static_cast<double>(count) / static_cast<double>(tokens.size()),
                  std::to_string(count) + " of " + std::to_string(tokens.size()) + " tokens");
  };
  return options.stepwise
             ? score_stepwise(session, tokens, options.prefill, model.info().value().vocabulary_size, done)
             : score(session, tokens, done);
}

int run(const Options& options) {
  const kva::Model model = options.model.load();
  const std::vector<std::uint32_t> tokens = read_tokens(options, model);
  const std::string& file = options.text.empty() ? options.token_ids : options.text;
  if (tokens.size() < 2) throw std::runtime_error(file + ": " + std::to_string(tokens.size()) + " tokens; at least 2 are needed");
  if (options.prefill > tokens.size() - 2) {
    throw args::UsageError("--prefill " + std::to_string(options.prefill) + " leaves nothing to evaluate: " + file + " has " +
                           std::to_string(tokens.size()) + " tokens, so P is at most " + std::to_string(tokens.size() - 2));
  }
  if (!options.json.empty()) files::check_writable(options.json);

  const auto start = std::chrono::steady_clock::now();
  const std::vector<double> nll = score_with(options, model, tokens);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  const auto first = nll.begin() + static_cast<std::ptrdiff_t>(options.prefill);
  const auto positions = static_cast<std::size_t>(nll.end() - first);
  const double mean = std::accumulate(first, nll.end(), 0.0) / static_cast<double>(positions);
  std::printf("%s: %zu tokens, %zu positions from %llu on\n", file.c_str(), tokens.size(), positions,
              static_cast<unsigned long long>(options.prefill));
  std::printf("mean NLL    %.4f\nperplexity  %.3f\n", mean, std::exp(mean));
  std::fprintf(stderr, "%.2f s, %.1f tokens/s, %s of memory at most\n", seconds,
               static_cast<double>(tokens.size()) / seconds, program::bytes(machine::peak_memory_bytes()).c_str());
  if (!options.json.empty()) {
    const nlohmann::json result = {{"model", options.model.path},
                                   {"file", file},
                                   {"policy", program::name(options.policy)},
                                   {"dtype", program::name(model.info().value().dtype)},
                                   {"kv_dtype", program::name(options.kv_dtype)},
                                   {"stepwise", options.stepwise},
                                   {"prefill", options.prefill},
                                   {"tokens", tokens.size()},
                                   {"positions", positions},
                                   {"mean_nll", mean},
                                   {"perplexity", std::exp(mean)},
                                   {"seconds", seconds},
                                   {"nll", nll}};
    files::write(options.json, json::text(result, 1) + "\n");
  }
  return 0;
}

}  // namespace
}  // namespace evaluate

int main(int argc, char** argv) {
  return program::run("kva-evaluate", [&] {
    evaluate::Options options;
    return evaluate::parse(argc, argv, options) ? evaluate::run(options) : 0;
  });
}
