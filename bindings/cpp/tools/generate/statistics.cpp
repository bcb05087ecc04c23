#include "statistics.hpp"

#include <cstdio>

#include "../common/machine.hpp"
#include "../common/program.hpp"
#include "../common/traffic.hpp"

namespace generate {
namespace {

void phase(const char* name, std::uint64_t tokens, double seconds) {
  if (tokens == 0 || seconds <= 0) {
    std::fprintf(stderr, "%-8s %6llu tokens\n", name, static_cast<unsigned long long>(tokens));
  } else {
    std::fprintf(stderr, "%-8s %6llu tokens in %7.3f s  %8.2f tokens/s\n", name, static_cast<unsigned long long>(tokens),
                 seconds, static_cast<double>(tokens) / seconds);
  }
}

}  // namespace

std::string describe(kva::Finish finish) {
  switch (finish) {
    case kva::Finish::stop_token: return "the model ended the text";
    case kva::Finish::stop_string: return "a stop string";
    case kva::Finish::length: return "the token limit";
    case kva::Finish::context: return "the context is full";
    case kva::Finish::callback: return "stopped";
  }
  return "unknown (" + std::to_string(static_cast<std::int32_t>(finish)) + ")";
}

void report(const kva::Model& model, const kva::Session& session, const policy::Flags& flags, const std::string& ended,
            bool everything) {
  const kva::Statistics statistics = session.statistics().value();
  std::fputs("\n", stderr);
  phase("prefill", statistics.prefill_tokens, statistics.prefill_seconds);
  phase("decode", statistics.decode_tokens, statistics.decode_seconds);
  if (!everything) return;
  const kva::ModelInfo info = model.info().value();
  phase("sample", statistics.sampled_tokens, statistics.sample_seconds);
  std::fprintf(stderr, "ended    %s, %zu of %zu tokens held\n", ended.c_str(), session.length(), session.capacity());
  std::fprintf(stderr, "model    %s, %.1f M parameters, %s of weights in %s, loaded in %.3f s\n", info.architecture.c_str(),
               static_cast<double>(info.parameters) / 1e6, program::bytes(info.weight_bytes).c_str(),
               info.weight_storage.c_str(), info.load_seconds);
  std::fprintf(stderr, "backend  %s\n", info.backend.c_str());
  std::fprintf(stderr, "KV       %s, %s\n", policy::name(flags.policy).c_str(), traffic::where(statistics).c_str());
  if (const auto attended = traffic::attended(statistics)) {
    std::fprintf(stderr, "attended %s of the KV; selected %s of what could be left out\n", traffic::percent(attended).c_str(),
                 traffic::percent(traffic::selected(statistics)).c_str());
  }
  if (flags.policy == kva::Policy::infinigen || flags.tier != kva::KvTier::device) {
    std::fprintf(stderr, "fetched  %s; %s of what was selected was on the device already\n", traffic::fetched(statistics).c_str(),
                 traffic::percent(traffic::hit_rate(statistics)).c_str());
    if (const auto hidden = traffic::hidden(statistics)) {
      std::fprintf(stderr, "reads    %.3f s, of which %s were hidden\n", statistics.kv_read_seconds, traffic::percent(hidden).c_str());
    }
  }
  if (statistics.kv_evicted != 0) {
    std::fprintf(stderr, "evicted  %llu entries\n", static_cast<unsigned long long>(statistics.kv_evicted));
  }
  std::fprintf(stderr, "memory   %s at most\n", program::bytes(machine::peak_memory_bytes()).c_str());
}

}  // namespace generate
