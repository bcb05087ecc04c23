#include "policy.hpp"

#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "program.hpp"

namespace policy {
namespace {

using program::word;
using program::Words;

Words<kva::Policy> policies() {
  return {{"full", kva::Policy::full},
          {"int4", kva::Policy::int4},
          {"h2o", kva::Policy::h2o},
          {"window", kva::Policy::window},
          {"infinigen", kva::Policy::infinigen}};
}
Words<kva::KvTier> tiers() {
  return {{"device", kva::KvTier::device}, {"ram", kva::KvTier::host}, {"file", kva::KvTier::file}};
}
Words<kva::KvPayload> payloads() {
  return {{"exact", kva::KvPayload::exact}, {"int8", kva::KvPayload::int8}, {"int4", kva::KvPayload::int4}};
}
Words<kva::Eviction> evictions() {
  return {{"off", kva::Eviction::off}, {"fifo", kva::Eviction::fifo}, {"lru", kva::Eviction::lru}, {"counter", kva::Eviction::counter}};
}
Words<kva::InfinigenMode> modes() {
  return {{"default", kva::InfinigenMode::standard}, {"paper", kva::InfinigenMode::paper}};
}
Words<kva::IndexBasis> bases() {
  return {{"balanced", kva::IndexBasis::balanced}, {"skewed", kva::IndexBasis::skewed}, {"plain", kva::IndexBasis::plain}, {"prompt", kva::IndexBasis::prompt}};
}
Words<kva::Predictor> predictors() {
  return {{"fitted", kva::Predictor::fitted},
          {"own", kva::Predictor::own},
          {"renormalised", kva::Predictor::renormalised},
          {"exact", kva::Predictor::exact}};
}
Words<kva::Rule> rules() {
  return {{"share", kva::Rule::share}, {"probability", kva::Rule::probability}, {"paper", kva::Rule::paper}, {"random", kva::Rule::random}, {"replay", kva::Rule::replay}};
}

/// The words of an enum, for a flag that may be absent.
template <class T>
Words<std::optional<T>> optional(const Words<T>& words) {
  return {words.begin(), words.end()};
}

/// "0.2" or "20%" is a share, "512" a number of tokens.
kva::Budget parse_budget(std::string_view text) {
  static constexpr const char* right = "must be a share of the tokens (0.2 or 20%) or a whole number of tokens (512)";
  const bool percent = !text.empty() && text.back() == '%';
  if (!percent && text.find_first_not_of("0123456789") == std::string_view::npos) {
    std::uint64_t tokens = 0;
    try {
      args::convert(text, tokens);
    } catch (const args::UsageError&) {
      throw args::UsageError(right);
    }
    return tokens == 0 ? kva::Budget::of_share(0) : kva::Budget::of_tokens(tokens);
  }
  float share = 0;
  try {
    args::convert(text.substr(0, text.size() - (percent ? 1 : 0)), share);
  } catch (const args::UsageError&) {
    throw args::UsageError(right);
  }
  if (percent) share /= 100;
  if (!(share >= 0 && share <= 1)) throw args::UsageError(right);
  return kva::Budget::of_share(share);
}

nlohmann::json json(const kva::Budget& budget) {
  if (budget.tokens != 0) return budget.tokens;
  return program::rounded(budget.share);
}

kva::InfinigenOptions infinigen(const Flags& flags) {
  kva::InfinigenOptions options(flags.mode.value_or(kva::InfinigenMode::standard));
  const auto take = [](const auto& from, auto& to) {
    if (from) to = *from;
  };
  if (flags.select) options.rule = kva::Rule::share;
  if (flags.probability) options.rule = kva::Rule::probability;
  if (flags.alpha) options.rule = kva::Rule::paper;
  if (flags.random) options.rule = kva::Rule::random;
  if (!flags.replay.empty()) {
    options.rule = kva::Rule::replay;
    options.replay_path = flags.replay;
  }
  take(flags.select, options.select_share);
  take(flags.probability, options.select_below);
  take(flags.alpha, options.alpha);
  take(flags.cap, options.select_cap);
  take(flags.random, options.random);
  take(flags.renew, options.random_renewed);
  take(flags.ratio, options.ratio);
  take(flags.index, options.basis);
  take(flags.index_bits, options.index_bits);
  take(flags.predictor, options.predictor);
  take(flags.sinks, options.sinks);
  take(flags.window, options.window);
  take(flags.resident_layers, options.resident_layers);
  take(flags.cache, options.cache);
  if (flags.no_attend_cache) options.attend_cache = false;
  if (flags.no_tail) options.tail = false;
  take(flags.correct, options.correct);
  return options;
}

/// A flag that was given, and whether anything uses it.
struct Use {
  const char* flag;
  bool given;
  bool used;
  const char* needs;
};

void check_used(const std::vector<Use>& uses) {
  for (const Use& use : uses) {
    if (use.given && !use.used) throw args::UsageError(std::string(use.flag) + " needs " + use.needs);
  }
}

}  // namespace

std::string name(kva::Policy policy) { return word(policy, policies()); }
std::string name(kva::KvTier tier) { return word(tier, tiers()); }

void Flags::declare(args::Parser& parser) {
  parser.group("KV policy");
  parser.choice("--policy",
                "what a layer attends. full: every token. int4: every token, in 4 bits. h2o: what got much attention, and "
                "the recent tokens. window: the first and the recent tokens. infinigen: what speculation selects (default full)",
                policies(), policy);
  const auto tokens = [&parser](const char* flag, const char* help, std::optional<kva::Budget>& target) {
    parser.custom(flag, "SHARE|TOKENS", help, [&target](std::string_view text) { target = parse_budget(text); });
  };
  tokens("--budget", "window, h2o: tokens to attend, as a share of those held (0.2 or 20%) or a number (512) (default 0.2)", budget);
  parser.option("--sinks", "N", "window, infinigen: first tokens, always attended (default 4; 0 in paper mode)", sinks);

  parser.group("KV policy infinigen");
  parser.choice("--mode", "the settings to begin with: what serves best, or the paper's own (default default)", optional(modes()), mode);
  parser.option("--select", "SHARE", "select this share of the tokens", select);
  parser.option("--probability", "B", "instead: select every token whose log-probability is above -B (default 7)", probability);
  parser.option("--alpha", "A", "instead: the paper's rule, within A of the greatest score (default 4 in paper mode)", alpha);
  parser.option("--cap", "SHARE", "most that --probability, --alpha and --replay select (default 0.2)", cap);
  tokens("--random", "instead, for measuring: this many random tokens, whatever their scores", random);
  parser.option("--renew", "SHARE", "share of --random that are others in the next step (default 1)", renew);
  parser.option("--replay", "TRACE",
                "instead, for measuring: what --trace has written of another model or text, stretched to this model and sequence",
                replay);
  parser.choice("--index", "basis of the index (default balanced; skewed in paper mode)", optional(bases()), index);
  parser.option("--ratio", "R", "columns of the index, as a share of the head dimension (default 0.5; 0.3 in paper mode)", ratio);
  parser.choice("--index-bits", "bits of a number in the index (default 4; 32 in paper mode)",
                Words<std::optional<std::uint32_t>>{{"4", 4u}, {"8", 8u}, {"32", 32u}}, index_bits);
  parser.choice("--predictor", "what predicts a layer's queries; exact: the oracle (default fitted; own in paper mode)",
                optional(predictors()), predictor);
  parser.option("--window", "N", "last tokens, always attended (default 64; 0 in paper mode)", window);
  parser.option("--resident-layers", "N", "first layers, attended in full from device memory (default 2)", resident_layers);
  tokens("--cache", "entries to keep on the device, in each layer and KV head (default 0.2; 0.25 in paper mode)", cache);
  parser.flag("--no-attend-cache", "attend what was selected only, not all that is on the device", no_attend_cache);
  parser.flag("--no-tail", "no entry that stands for everything that is not attended", no_tail);
  parser.option("--correct", "SHARE", "when the true queries have come, add at most this share of the tokens to what was selected (default 0)",
                correct);

  parser.group("KV memory");
  parser.choice("--kv-dtype", "type of keys and values; auto: that of the weights (default auto)", program::dtypes(), kv_dtype);
  parser.choice("--kv-tier", "where KV lives that is not held on the device (default device)", tiers(), tier);
  parser.choice("--kv-payload", "how it is stored there (default exact)", payloads(), payload);
  parser.option("--kv-file", "PATH", "--kv-tier file: the file, which must not exist (default: a nameless temporary file)", file);
  parser.option("--kv-file-limit", "BYTES", "--kv-tier file: most bytes of it; 0: what the session needs (default 0)", file_limit);
  parser.flag("--kv-keep", "--kv-tier file: leave the file when done", file_keep);
  parser.flag("--kv-buffered", "--kv-tier file: go through the page cache instead of direct I/O", file_buffered);
  parser.flag("--kv-checksum", "--kv-tier file: keep a checksum of every row, and compare it on every read", file_checksum);
  parser.option("--pool-tokens", "N", "infinigen: most tokens to keep, in each layer and KV head; 0: as many as fit (default 0)", pool_tokens);
  parser.choice("--eviction", "infinigen: which entry gives way when there is no more room (default off)",
                evictions(), eviction);
  parser.option("--trace", "FILE", "write what was selected, hit, missed and fetched to FILE", trace);
}

void Flags::check() const {
  const bool speculates = policy == kva::Policy::infinigen;
  const bool in_file = tier == kva::KvTier::file;
  const bool limited = policy == kva::Policy::window || policy == kva::Policy::h2o;
  const auto needs_infinigen = [&](const char* flag, bool given) {
    return Use{flag, given, speculates, "--policy infinigen"};
  };
  const kva::InfinigenOptions settings = infinigen(*this);
  check_used({
      {"--budget", budget.has_value(), limited, "--policy window or h2o (infinigen has --select and --cache)"},
      {"--sinks", sinks.has_value(), policy == kva::Policy::window || speculates, "--policy window or infinigen"},
      needs_infinigen("--mode", mode.has_value()),
      needs_infinigen("--select", select.has_value()),
      needs_infinigen("--probability", probability.has_value()),
      needs_infinigen("--alpha", alpha.has_value()),
      needs_infinigen("--cap", cap.has_value()),
      needs_infinigen("--random", random.has_value()),
      needs_infinigen("--replay", !replay.empty()),
      {"--renew", renew.has_value(), random.has_value(), "--random"},
      needs_infinigen("--index", index.has_value()),
      needs_infinigen("--ratio", ratio.has_value()),
      needs_infinigen("--index-bits", index_bits.has_value()),
      needs_infinigen("--predictor", predictor.has_value()),
      needs_infinigen("--window", window.has_value()),
      {"--resident-layers", resident_layers.has_value(), policy == kva::Policy::window || speculates, "--policy window or infinigen"},
      needs_infinigen("--cache", cache.has_value()),
      needs_infinigen("--no-attend-cache", no_attend_cache),
      needs_infinigen("--no-tail", no_tail),
      needs_infinigen("--correct", correct.has_value()),
      needs_infinigen("--eviction", eviction != kva::Eviction::off),
      needs_infinigen("--pool-tokens", pool_tokens != 0),
      {"--cap", cap.has_value(), settings.rule != kva::Rule::share && settings.rule != kva::Rule::random,
       "--probability, --alpha or --replay"},
      {"--kv-file", !file.empty(), in_file, "--kv-tier file"},
      {"--kv-file-limit", file_limit != 0, in_file, "--kv-tier file"},
      {"--kv-keep", file_keep, in_file && !file.empty(), "--kv-tier file and --kv-file PATH"},
      {"--kv-buffered", file_buffered, in_file, "--kv-tier file"},
      {"--kv-checksum", file_checksum, in_file, "--kv-tier file"},
  });
  if (int{select.has_value()} + int{probability.has_value()} + int{alpha.has_value()} + int{random.has_value()} + int{!replay.empty()} > 1) {
    throw args::UsageError("--select, --probability, --alpha, --random and --replay exclude each other: each is a rule of its own");
  }
}

kva::SessionOptions Flags::session(std::uint64_t capacity) const {
  kva::SessionOptions options;
  options.policy = policy;
  options.kv_dtype = kv_dtype;
  options.capacity = capacity;
  options.kv_tier = tier;
  options.kv_payload = payload;
  options.kv_file_path = file;
  options.kv_file_limit_bytes = file_limit;
  if (file_keep) options.kv_file_flags = options.kv_file_flags | kva::KvFile::keep;
  if (file_buffered) options.kv_file_flags = options.kv_file_flags | kva::KvFile::buffered;
  if (file_checksum) options.kv_file_flags = options.kv_file_flags | kva::KvFile::checksum;
  if (budget) options.budget = *budget;
  if (sinks) options.sinks = *sinks;
  if (resident_layers) options.resident_layers = *resident_layers;
  options.eviction = eviction;
  options.pool_tokens = pool_tokens;
  options.infinigen = infinigen(*this);
  options.trace_path = trace;
  return options;
}

nlohmann::json Flags::json() const {
  const kva::SessionOptions options = session(0);
  nlohmann::json result = {{"policy", name(policy)},
                           {"kv_dtype", program::name(kv_dtype)},
                           {"kv_tier", name(tier)},
                           {"kv_payload", word(payload, payloads())},
                           {"pool_tokens", pool_tokens}};
  if (tier == kva::KvTier::file) {
    result.update({{"kv_file", file},
                   {"kv_file_limit", file_limit},
                   {"kv_keep", file_keep},
                   {"kv_buffered", file_buffered},
                   {"kv_checksum", file_checksum}});
  }
  if (!trace.empty()) result["trace"] = trace;
  if (policy == kva::Policy::window || policy == kva::Policy::h2o) result["budget"] = policy::json(options.budget);
  if (policy == kva::Policy::window) result.update({{"sinks", options.sinks}, {"resident_layers", options.resident_layers}});
  if (policy != kva::Policy::infinigen) return result;

  const kva::InfinigenOptions& infinigen = options.infinigen;
  result.update({{"eviction", word(eviction, evictions())},
                 {"mode", word(infinigen.mode, modes())},
                 {"rule", word(infinigen.rule, rules())},
                 {"index", word(infinigen.basis, bases())},
                 {"ratio", program::rounded(infinigen.ratio)},
                 {"index_bits", infinigen.index_bits},
                 {"predictor", word(infinigen.predictor, predictors())},
                 {"sinks", infinigen.sinks},
                 {"window", infinigen.window},
                 {"resident_layers", infinigen.resident_layers},
                 {"cache", policy::json(infinigen.cache)},
                 {"cache_least", infinigen.cache_least},
                 {"attend_cache", infinigen.attend_cache},
                 {"tail", infinigen.tail},
                 {"correct", program::rounded(infinigen.correct)}});
  if (infinigen.rule == kva::Rule::share) {
    result["select"] = program::rounded(infinigen.select_share);
  } else if (infinigen.rule == kva::Rule::random) {
    result["random"] = policy::json(infinigen.random);
    result["renew"] = program::rounded(infinigen.random_renewed);
  } else {
    result["cap"] = program::rounded(infinigen.select_cap);
    if (infinigen.rule == kva::Rule::replay) result["replay"] = replay;
    if (infinigen.rule == kva::Rule::paper) result["alpha"] = program::rounded(infinigen.alpha);
    if (infinigen.rule == kva::Rule::probability) result["probability"] = program::rounded(infinigen.select_below);
  }
  return result;
}

}  // namespace policy
