/* Every choice about a session's KV: unknown names, numbers out of range, and what excludes each other. */
#include <math.h>

#include "support.h"

static const kva_model *model;
static kva_session_options options;
static kva_infinigen_options infinigen;

static void begin(int32_t policy) {
  OK(kva_session_options_init(&options, sizeof options));
  OK(kva_infinigen_options_init(&infinigen, sizeof infinigen, KVA_INFINIGEN_DEFAULT));
  options.capacity = 16;
  options.policy = policy;
  options.infinigen = &infinigen;
}

/* An estimate checks options exactly as a session does, and makes nothing. */
static kva_error *check(void) {
  kva_estimate estimate = {.struct_size = sizeof estimate};
  return kva_model_estimate(model, &options, 1, &estimate);
}

/* `field` of a struct set to `value` is refused, in words that contain `says`. */
#define REFUSED(policy, field, value, says) \
  do { \
    begin(policy); \
    field = (value); \
    FAILS(check(), KVA_ERROR_INVALID_ARGUMENT, says); \
  } while (0)

#define ACCEPTED(policy, field, value) \
  do { \
    begin(policy); \
    field = (value); \
    OK(check()); \
  } while (0)

/* Every value from 0 to `last` is known, those around are not. */
#define TEST_ENUM(policy, field, last, name) \
  do { \
    for (int32_t i = 0; i <= (last); i++) ACCEPTED(policy, field, i); \
    REFUSED(policy, field, (last) + 1, name); \
    REFUSED(policy, field, -1, "-1"); \
    REFUSED(policy, field, INT32_MIN, name); \
    REFUSED(policy, field, INT32_MAX, "2147483647"); \
  } while (0)

static void defaults(void) {
  OK(kva_session_options_init(&options, sizeof options));
  CHECK(options.policy == KVA_POLICY_FULL && options.kv_tier == KVA_KV_TIER_DEVICE);
  CHECK(options.kv_payload == KVA_KV_PAYLOAD_EXACT && options.eviction == KVA_EVICTION_OFF);
  CHECK(options.budget_share == 0.2f && options.budget_tokens == 0 && options.sinks == 4 && options.pool_tokens == 0);
  CHECK(options.resident_layers == 2);
  CHECK(!options.kv_file_path && !options.kv_file_flags && !options.kv_file_limit_bytes && !options.trace_path);
  CHECK(!options.infinigen);
  OK(kva_infinigen_options_init(&infinigen, sizeof infinigen, KVA_INFINIGEN_DEFAULT));
  CHECK(infinigen.mode == KVA_INFINIGEN_DEFAULT && infinigen.basis == KVA_INDEX_BALANCED && infinigen.index_bits == 4);
  CHECK(infinigen.rule == KVA_RULE_PROBABILITY && infinigen.select_below == 7 && infinigen.attend_cache == 1 && infinigen.tail == 1);
  CHECK(infinigen.correct == 0);
  CHECK(infinigen.predictor == KVA_PREDICTOR_FITTED);
  OK(kva_infinigen_options_init(&infinigen, sizeof infinigen, KVA_INFINIGEN_PAPER));
  CHECK(infinigen.mode == KVA_INFINIGEN_PAPER && infinigen.basis == KVA_INDEX_SKEWED && infinigen.index_bits == 32);
  CHECK(infinigen.rule == KVA_RULE_PAPER && infinigen.alpha == 4 && infinigen.predictor == KVA_PREDICTOR_OWN);
  CHECK(infinigen.ratio == 0.3f && infinigen.select_cap == 0.2f && !infinigen.sinks && !infinigen.attend_cache && !infinigen.tail);
  FAILS(kva_infinigen_options_init(&infinigen, sizeof infinigen, 2), KVA_ERROR_INVALID_ARGUMENT, "mode is 2");
  FAILS(kva_infinigen_options_init(&infinigen, sizeof infinigen, -1), KVA_ERROR_INVALID_ARGUMENT, "KVA_INFINIGEN");
  FAILS(kva_infinigen_options_init(NULL, sizeof infinigen, 0), KVA_ERROR_INVALID_ARGUMENT, "options is NULL");
}

static void names(void) {
  TEST_ENUM(KVA_POLICY_FULL, options.policy, KVA_POLICY_INFINIGEN, "KVA_POLICY");
  TEST_ENUM(KVA_POLICY_FULL, options.kv_tier, KVA_KV_TIER_FILE, "KVA_KV_TIER");
  TEST_ENUM(KVA_POLICY_FULL, options.kv_payload, KVA_KV_PAYLOAD_INT4, "KVA_KV_PAYLOAD");
  TEST_ENUM(KVA_POLICY_INFINIGEN, options.eviction, KVA_EVICTION_COUNTER, "KVA_EVICTION");
  TEST_ENUM(KVA_POLICY_INFINIGEN, infinigen.mode, KVA_INFINIGEN_PAPER, "infinigen.mode");
  TEST_ENUM(KVA_POLICY_INFINIGEN, infinigen.basis, KVA_INDEX_PROMPT, "infinigen.basis");
  TEST_ENUM(KVA_POLICY_INFINIGEN, infinigen.predictor, KVA_PREDICTOR_EXACT, "infinigen.predictor");
  for (int32_t rule = 0; rule <= KVA_RULE_RANDOM; rule++) ACCEPTED(KVA_POLICY_INFINIGEN, infinigen.rule, rule);
  REFUSED(KVA_POLICY_INFINIGEN, infinigen.rule, KVA_RULE_REPLAY, "replay names none");
  REFUSED(KVA_POLICY_INFINIGEN, infinigen.rule, KVA_RULE_REPLAY + 1, "infinigen.rule");
  REFUSED(KVA_POLICY_INFINIGEN, infinigen.rule, -1, "-1");
  REFUSED(KVA_POLICY_INFINIGEN, infinigen.attend_cache, 2, "attend_cache is 2");
  REFUSED(KVA_POLICY_INFINIGEN, infinigen.tail, 2, "tail is 2");
  REFUSED(KVA_POLICY_INFINIGEN, infinigen.reserved, 1, "reserved is 1");
  /* Names are looked at even where the policy has no use for them. */
  REFUSED(KVA_POLICY_FULL, infinigen.basis, 9, "infinigen.basis is 9");
}

static void shares(void) {
  static const float wrong[] = {NAN, INFINITY, -INFINITY, 0, -0.5f, 1.5f};
  for (size_t i = 0; i < COUNT(wrong); i++) {
    REFUSED(KVA_POLICY_WINDOW, options.budget_share, wrong[i], "budget is");
    REFUSED(KVA_POLICY_H2O, options.budget_share, wrong[i], "budget is");
    REFUSED(KVA_POLICY_INFINIGEN, infinigen.ratio, wrong[i], "infinigen: ratio is");
    begin(KVA_POLICY_INFINIGEN);
    infinigen.rule = KVA_RULE_SHARE;
    infinigen.select_share = wrong[i];
    FAILS(check(), KVA_ERROR_INVALID_ARGUMENT, "select_share is");
    if (wrong[i] != 0) REFUSED(KVA_POLICY_INFINIGEN, infinigen.cache_share, wrong[i], "cache is");
    if (wrong[i] != 0) REFUSED(KVA_POLICY_INFINIGEN, infinigen.correct, wrong[i], "correct is");
    begin(KVA_POLICY_INFINIGEN);
    infinigen.rule = KVA_RULE_PROBABILITY;
    infinigen.select_cap = wrong[i];
    FAILS(check(), KVA_ERROR_INVALID_ARGUMENT, "select_cap is");
    begin(KVA_POLICY_INFINIGEN);
    infinigen.rule = KVA_RULE_RANDOM;
    infinigen.select_renewed = wrong[i];
    FAILS(check(), KVA_ERROR_INVALID_ARGUMENT, "select_renewed is");
  }
  begin(KVA_POLICY_INFINIGEN);
  infinigen.rule = KVA_RULE_PAPER;
  infinigen.alpha = NAN;
  FAILS(check(), KVA_ERROR_INVALID_ARGUMENT, "alpha is NaN");
  /* A number of tokens stands in for the share, and the share of another rule or policy is not looked at. */
  begin(KVA_POLICY_WINDOW);
  options.budget_share = NAN;
  options.budget_tokens = 8;
  OK(check());
  ACCEPTED(KVA_POLICY_INFINIGEN, options.budget_share, NAN);
  ACCEPTED(KVA_POLICY_INFINIGEN, infinigen.alpha, NAN);
  ACCEPTED(KVA_POLICY_FULL, infinigen.ratio, NAN);
}

static void counts(void) {
  REFUSED(KVA_POLICY_WINDOW, options.budget_tokens, 4, "budget is 4 tokens");
  ACCEPTED(KVA_POLICY_WINDOW, options.budget_tokens, 5);
  ACCEPTED(KVA_POLICY_WINDOW, options.budget_tokens, UINT64_MAX);
  ACCEPTED(KVA_POLICY_WINDOW, options.resident_layers, 0);
  ACCEPTED(KVA_POLICY_WINDOW, options.resident_layers, UINT64_MAX);
  REFUSED(KVA_POLICY_INFINIGEN, infinigen.index_bits, 0, "index_bits is 0");
  REFUSED(KVA_POLICY_INFINIGEN, infinigen.index_bits, 16, "not 4, 8 or 32");
  REFUSED(KVA_POLICY_INFINIGEN, infinigen.resident_layers, 0, "resident_layers is 0");
  ACCEPTED(KVA_POLICY_INFINIGEN, infinigen.window, UINT32_MAX);
  ACCEPTED(KVA_POLICY_INFINIGEN, infinigen.cache_tokens, UINT64_MAX);
}

static void combinations(void) {
  REFUSED(KVA_POLICY_FULL, options.kv_file_path, "/tmp/kv", "not KVA_KV_TIER_FILE");
  REFUSED(KVA_POLICY_FULL, options.kv_file_limit_bytes, 1, "not KVA_KV_TIER_FILE");
  REFUSED(KVA_POLICY_FULL, options.kv_file_flags, KVA_KV_FILE_BUFFERED, "not KVA_KV_TIER_FILE");
  begin(KVA_POLICY_FULL);
  options.kv_tier = KVA_KV_TIER_FILE;
  options.kv_file_flags = KVA_KV_FILE_CHECKSUM | 8;
  FAILS(check(), KVA_ERROR_INVALID_ARGUMENT, "0x8 is no KVA_KV_FILE flag");
  options.kv_file_flags = KVA_KV_FILE_KEEP;
  FAILS(check(), KVA_ERROR_INVALID_ARGUMENT, "cannot be kept");
  options.kv_file_path = "";
  FAILS(check(), KVA_ERROR_INVALID_ARGUMENT, "options.kv_file_path is empty");
  options.kv_file_path = "/tmp/kv";
  OK(check());
  REFUSED(KVA_POLICY_FULL, options.trace_path, "", "options.trace_path is empty");
  REFUSED(KVA_POLICY_FULL, options.eviction, KVA_EVICTION_LRU, "eviction needs policy infinigen");
  begin(KVA_POLICY_INFINIGEN);
  options.eviction = KVA_EVICTION_FIFO;
  options.pool_tokens = 68;
  FAILS(check(), KVA_ERROR_INVALID_ARGUMENT, "pool_tokens is 68");
  options.pool_tokens = 69;
  OK(check());
}

/* What the estimate refuses, the session does; and full, with everything else at rest, still gives the golden tokens. */
static void sessions(void) {
  kva_session *session = NULL;
  begin(KVA_POLICY_WINDOW);
  options.budget_share = NAN;
  FAILS(kva_session_create(model, &options, &session), KVA_ERROR_INVALID_ARGUMENT, "budget is NaN");
  begin(KVA_POLICY_FULL);
  options.policy = 99;
  FAILS(kva_session_create(model, &options, &session), KVA_ERROR_INVALID_ARGUMENT, "options.policy is 99");
  CHECK(!session);

  golden golden = golden_read();
  begin(KVA_POLICY_FULL);
  options.capacity = 0;
  OK(kva_session_create(model, &options, &session));
  OK(kva_session_prefill(session, golden.tokens, golden.count, NULL, 0));
  static float logits[TEST_VOCABULARY], again[TEST_VOCABULARY];
  OK(kva_session_get_logits(session, logits, TEST_VOCABULARY));
  OK(kva_session_truncate(session, golden.count - 1));
  FAILS(kva_session_get_logits(session, again, TEST_VOCABULARY), KVA_ERROR_INVALID_ARGUMENT, "no logits");
  OK(kva_session_decode(session, golden.tokens[golden.count - 1], again, TEST_VOCABULARY));
  for (size_t i = 0; i < TEST_VOCABULARY; i++) CHECK(fabsf(logits[i] - again[i]) < 1e-3f);
  FAILS(kva_session_get_logits(session, again, 3), KVA_ERROR_INVALID_ARGUMENT, "length of 3");
  FAILS(kva_session_get_logits(session, NULL, 0), KVA_ERROR_INVALID_ARGUMENT, "logits is NULL");
  FAILS(kva_session_get_logits(NULL, again, TEST_VOCABULARY), KVA_ERROR_INVALID_ARGUMENT, "session is NULL");
  test_goes_on_as_golden(session, &golden, 0, 8);
  kva_statistics statistics = {.struct_size = sizeof statistics};
  OK(kva_session_get_statistics(session, &statistics));
  CHECK(statistics.kv_evicted == 0 && statistics.kv_misses == 0 && statistics.kv_attended == statistics.kv_held);
  golden_free(&golden);
  kva_session_free(session);
}

/* A session that holds fewer tokens than it has been given: it goes on, and cannot go back. */
static void eviction(void) {
  uint32_t tokens[60];
  for (uint32_t i = 0; i < 60; i++) tokens[i] = i * 7 % 50;
  for (int32_t kind = KVA_EVICTION_OFF; kind <= KVA_EVICTION_COUNTER; kind++) {
    kva_session *session = NULL;
    begin(KVA_POLICY_INFINIGEN);
    options.capacity = 0;
    infinigen.sinks = 2;
    infinigen.window = 4;
    options.eviction = kind;
    options.pool_tokens = 20;
    OK(kva_session_create(model, &options, &session));
    kva_statistics statistics = {.struct_size = sizeof statistics};
    if (kind == KVA_EVICTION_OFF) {
      FAILS(kva_session_prefill(session, tokens, 60, NULL, 0), KVA_ERROR_CAPACITY, "pool_tokens is 20");
      OK(kva_session_prefill(session, tokens, 20, NULL, 0));
      FAILS(kva_session_decode(session, 1, NULL, 0), KVA_ERROR_CAPACITY, "pool_tokens is 20");
    } else {
      OK(kva_session_prefill(session, tokens, 60, NULL, 0));
      for (uint32_t i = 0; i < 5; i++) OK(kva_session_decode(session, i, NULL, 0));
      OK(kva_session_get_statistics(session, &statistics));
      /* One layer of three KV heads is not resident. */
      CHECK(statistics.kv_evicted == 3 * (65 - 20) && statistics.kv_steps == 45);
      FAILS(kva_session_truncate(session, 64), KVA_ERROR_UNSUPPORTED, "have been evicted");
      OK(kva_session_truncate(session, 2));
      OK(kva_session_decode(session, 1, NULL, 0));
    }
    kva_session_free(session);
  }
}

/* Whatever comes of it, the user data is freed once. */
static void calibration(void) {
  int freed = 0;
  FAILS(kva_model_calibrate(NULL, NULL, &freed, test_count_free), KVA_ERROR_INVALID_ARGUMENT, "model is NULL");
  CHECK(freed == 1);
  kva_model_options model_options;
  kva_model *other = NULL;
  OK(kva_model_options_init(&model_options, sizeof model_options));
  model_options.calibration_text = "\xff";
  model_options.calibration_text_len = 1;
  FAILS(kva_model_load(TEST_MODEL, &model_options, &other), KVA_ERROR_INVALID_ARGUMENT, "options.calibration_text");
  model_options.calibration_text = NULL;
  FAILS(kva_model_load(TEST_MODEL, &model_options, &other), KVA_ERROR_INVALID_ARGUMENT, "length is 1");
  OK(kva_model_options_init(&model_options, sizeof model_options));
  model_options.speculation_cache_path = "";
  FAILS(kva_model_load(TEST_MODEL, &model_options, &other), KVA_ERROR_INVALID_ARGUMENT, "speculation_cache_path is empty");
  CHECK(!other);
}

/* Steps on the processor do not measure their operations, and say so. */
static void timing(void) {
  FAILS(kva_model_set_timing(NULL, KVA_TIMING_OFF), KVA_ERROR_INVALID_ARGUMENT, "model is NULL");
  FAILS(kva_model_set_timing(model, 7), KVA_ERROR_INVALID_ARGUMENT, "timing is 7");
  OK(kva_model_set_timing(model, KVA_TIMING_OFF));
  FAILS(kva_model_set_timing(model, KVA_TIMING_FETCHES), KVA_ERROR_UNSUPPORTED, "does not measure");
  FAILS(kva_model_write_timeline(model, NULL), KVA_ERROR_INVALID_ARGUMENT, "path is NULL");
  FAILS(kva_model_write_timeline(NULL, "step.json"), KVA_ERROR_INVALID_ARGUMENT, "model is NULL");
  FAILS(kva_model_write_timeline(model, "step.json"), KVA_ERROR_INVALID_ARGUMENT, "no step has been measured");
}

/* Rows of a trace: a rule like the others, which needs a file. */
static void replay(void) {
  begin(KVA_POLICY_INFINIGEN);
  infinigen.rule = KVA_RULE_REPLAY;
  kva_session *session = NULL;
  FAILS(kva_session_create(model, &options, &session), KVA_ERROR_INVALID_ARGUMENT, "replay names none");
  infinigen.replay_path = "/nowhere/trace";
  FAILS(kva_session_create(model, &options, &session), KVA_ERROR_NOT_FOUND, "/nowhere/trace");
  CHECK(!session);
  infinigen.replay_path = NULL;
}

int main(void) {
  kva_model *loaded = test_model();
  model = loaded;
  defaults();
  names();
  shares();
  counts();
  combinations();
  sessions();
  eviction();
  calibration();
  timing();
  replay();
  kva_model_free(loaded);
  return 0;
}
