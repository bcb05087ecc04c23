#include "outcome.hpp"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <numeric>

#include "../common/interrupt.hpp"
#include "../common/terminal.hpp"
#include "../common/traffic.hpp"
#include "score.hpp"

namespace evaluate {

double Outcome::perplexity() const { return std::exp(mean); }

Outcome evaluate(const Options& options, const policy::Flags& flags, const kva::Model& model,
                 const std::vector<std::uint32_t>& tokens, const std::string& task) {
  Outcome outcome;
  // A prefill is dense, so only steps say anything about a policy.
  outcome.stepwise = options.stepwise || flags.policy != kva::Policy::full;
  kva::Session session = kva::Session::create(model, flags.session(tokens.size())).value();
  const interrupt::Watch watch(session);
  terminal::Progress progress(task);
  const auto done = [&](std::size_t count) {
    progress.show(static_cast<double>(count) / static_cast<double>(tokens.size()),
                  std::to_string(count) + " of " + std::to_string(tokens.size()) + " tokens");
  };
  const auto start = std::chrono::steady_clock::now();
  outcome.nll = outcome.stepwise
                    ? score_stepwise(session, tokens, options.prefill, model.info().value().vocabulary_size, done)
                    : score(session, tokens, done);
  outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  outcome.statistics = session.statistics().value();
  const auto first = outcome.nll.begin() + static_cast<std::ptrdiff_t>(options.prefill);
  outcome.positions = static_cast<std::size_t>(outcome.nll.end() - first);
  outcome.mean = std::accumulate(first, outcome.nll.end(), 0.0) / static_cast<double>(outcome.positions);
  return outcome;
}

double relative_size(const Outcome& outcome, const policy::Flags& flags) {
  double bits = 16;
  if (flags.payload == kva::KvPayload::int8) bits = 8;
  // Groups of 64 have a scale and a zero of 16 bits each.
  if (flags.policy == kva::Policy::int4 || flags.payload == kva::KvPayload::int4) bits = 4.5;
  return traffic::attended(outcome.statistics).value_or(1) * bits / 16;
}

void print(const Outcome& outcome, const policy::Flags& flags) {
  std::printf("mean NLL    %.4f\nperplexity  %.3f\n", outcome.mean, outcome.perplexity());
  if (!outcome.stepwise) return;
  const kva::Statistics& s = outcome.statistics;
  std::printf("policy      %s, KV: %s\n", policy::name(flags.policy).c_str(), traffic::where(s).c_str());
  std::printf("selected    %s of the past over speculated layers; attended %s over all layers\n",
              traffic::percent(traffic::selected(s)).c_str(), traffic::percent(traffic::attended(s)).c_str());
  std::printf("fetched     %s; %s of what was selected was there, %s of the past missed a step\n", traffic::fetched(s).c_str(),
              traffic::percent(traffic::hit_rate(s)).c_str(), traffic::percent(traffic::missed(s)).c_str());
  if (const auto hidden = traffic::hidden(s)) std::printf("hidden      %s of the time of reads\n", traffic::percent(hidden).c_str());
  std::printf("evicted     %llu entries\n", static_cast<unsigned long long>(s.kv_evicted));
}

nlohmann::json json(const Outcome& outcome, const policy::Flags& flags, bool everything) {
  nlohmann::json result = {{"policy", policy::name(flags.policy)},
                           {"kv_dtype", program::name(flags.kv_dtype)},
                           {"options", flags.json()},
                           {"stepwise", outcome.stepwise},
                           {"positions", outcome.positions},
                           {"mean_nll", outcome.mean},
                           {"perplexity", outcome.perplexity()},
                           {"relative_size", relative_size(outcome, flags)},
                           {"seconds", outcome.seconds}};
  result.update(traffic::json(outcome.statistics));
  if (everything) result["nll"] = outcome.nll;
  return result;
}

}  // namespace evaluate
