// Policies, tiers and their settings: defaults are the library's, and every field arrives there.
#include <cmath>
#include <limits>

#include "test.hpp"

namespace {

constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

/// An estimate checks options exactly as a session does, and makes nothing.
kva::Result<kva::Estimate> check(const kva::SessionOptions& options) { return test::model().estimate(options); }

kva::SessionOptions with(kva::Policy policy) {
  kva::SessionOptions options;
  options.policy = policy;
  return options;
}

}  // namespace

TEST(defaults_are_the_librarys) {
  const kva::SessionOptions options;
  CHECK(options.policy == kva::Policy::full && options.kv_tier == kva::KvTier::device);
  CHECK(options.budget.share > 0 && options.budget.tokens == 0 && options.sinks == 4 && options.resident_layers == 2);
  const kva::InfinigenOptions standard;
  CHECK(standard.rule == kva::Rule::probability && standard.basis == kva::IndexBasis::balanced && standard.attend_cache && standard.tail &&
        standard.correct == 0);
  const kva::InfinigenOptions paper(kva::InfinigenMode::paper);
  CHECK(paper.rule == kva::Rule::paper && paper.alpha == 4 && paper.predictor == kva::Predictor::own);
  CHECK(paper.window == 0 && !paper.attend_cache && !paper.tail && paper.mode == kva::InfinigenMode::paper);
}

TEST(every_policy_tier_and_eviction_has_a_name_in_the_library) {
  for (const auto policy : {kva::Policy::full, kva::Policy::int4, kva::Policy::h2o, kva::Policy::window, kva::Policy::infinigen}) {
    CHECK(check(with(policy)));
  }
  for (const auto tier : {kva::KvTier::device, kva::KvTier::host, kva::KvTier::file}) {
    kva::SessionOptions options;
    options.kv_tier = tier;
    CHECK(check(options));
  }
  kva::SessionOptions options = with(kva::Policy::infinigen);
  for (const auto eviction : {kva::Eviction::off, kva::Eviction::fifo, kva::Eviction::lru, kva::Eviction::counter}) {
    options.eviction = eviction;
    options.pool_tokens = 100;
    CHECK(check(options));
  }
  FAILS(check(with(static_cast<kva::Policy>(9))), invalid_argument, "options.policy is 9");
}

TEST(every_field_arrives) {
  kva::SessionOptions options = with(kva::Policy::infinigen);
  options.kv_tier = kva::KvTier::file;
  options.kv_payload = kva::KvPayload::int8;
  options.kv_file_path = "/tmp/kv";
  options.kv_file_limit_bytes = 5;
  options.kv_file_flags = kva::KvFile::keep | kva::KvFile::checksum;
  options.budget = kva::Budget::of_tokens(77);
  options.sinks = 3;
  options.eviction = kva::Eviction::lru;
  options.pool_tokens = 200;
  options.resident_layers = 7;
  options.trace_path = "/tmp/trace";
  options.infinigen = kva::InfinigenOptions(kva::InfinigenMode::paper);
  options.infinigen.basis = kva::IndexBasis::plain;
  options.infinigen.ratio = 1;
  options.infinigen.index_bits = 8;
  options.infinigen.predictor = kva::Predictor::renormalised;
  options.infinigen.rule = kva::Rule::probability;
  options.infinigen.select_below = 8;
  options.infinigen.select_cap = 0.125F;
  options.infinigen.window = 9;
  options.infinigen.cache = kva::Budget::of_share(0.5F);
  options.infinigen.attend_cache = true;
  options.infinigen.correct = 0.25F;
  kva_infinigen_options infinigen{};
  const kva_session_options c = options.to_c(infinigen).value();
  CHECK(c.policy == KVA_POLICY_INFINIGEN && c.kv_tier == KVA_KV_TIER_FILE && c.kv_payload == KVA_KV_PAYLOAD_INT8);
  CHECK(std::string(c.kv_file_path) == "/tmp/kv" && c.kv_file_limit_bytes == 5);
  CHECK(c.kv_file_flags == (KVA_KV_FILE_KEEP | KVA_KV_FILE_CHECKSUM));
  CHECK(c.budget_tokens == 77 && c.sinks == 3 && c.eviction == KVA_EVICTION_LRU && c.pool_tokens == 200 && c.resident_layers == 7);
  CHECK(std::string(c.trace_path) == "/tmp/trace" && c.infinigen == &infinigen);
  CHECK(infinigen.mode == KVA_INFINIGEN_PAPER && infinigen.basis == KVA_INDEX_PLAIN && infinigen.index_bits == 8);
  CHECK(infinigen.predictor == KVA_PREDICTOR_RENORMALISED && infinigen.rule == KVA_RULE_PROBABILITY);
  CHECK(std::fabs(infinigen.select_cap - 0.125F) < 1e-9F && infinigen.window == 9 && infinigen.attend_cache == 1);
  CHECK(std::fabs(infinigen.correct - 0.25F) < 1e-9F);
  CHECK(check(options));
}

TEST(what_is_wrong_is_said) {
  kva::SessionOptions options = with(kva::Policy::window);
  options.budget = kva::Budget::of_share(not_a_number);
  FAILS(check(options), invalid_argument, "budget is NaN");
  FAILS(kva::Session::create(test::model(), options), invalid_argument, "budget is NaN");
  options = with(kva::Policy::infinigen);
  options.infinigen.ratio = 2;
  FAILS(check(options), invalid_argument, "ratio is 2");
  options.infinigen.mode = static_cast<kva::InfinigenMode>(5);
  FAILS(check(options), invalid_argument, "mode is 5");
  options = {};
  options.kv_file_path = "/tmp/kv";
  FAILS(check(options), invalid_argument, "not KVA_KV_TIER_FILE");
  options = {};
  options.trace_path = std::string("a\0b", 3);
  FAILS(check(options), invalid_argument, "trace_path holds a NUL");
  kva::ModelOptions model;
  model.calibration_text = "\xff";
  FAILS(kva::Model::load(test::model_path, model), invalid_argument, "options.calibration_text");
  FAILS(kva::Model().calibrate(), invalid_argument, "model is NULL");
}

TEST(logits_can_be_had_again) {
  kva::Session session = kva::Session::create(test::model()).value();
  std::vector<float> first(test::vocabulary);
  std::vector<float> second(test::vocabulary);
  FAILS(session.get_logits(first), invalid_argument, "no logits");
  session.prefill(test::prompt, first).value();
  session.get_logits(second).value();
  CHECK(first == second);
  FAILS(session.get_logits({}), invalid_argument, "logits is NULL");
  const kva::Statistics statistics = session.statistics().value();
  CHECK(statistics.kv_misses == 0 && statistics.kv_evicted == 0 && statistics.kv_attended == statistics.kv_held);
}
