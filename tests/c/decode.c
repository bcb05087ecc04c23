/* Prefill and decode give what transformers gives; a full session, a truncated one and a bad token do no harm. */
#include <math.h>

#include "support.h"

static void check_logits(const float *logits, const float *expected) {
  float largest = 0, difference = 0;
  for (size_t i = 0; i < TEST_VOCABULARY; i++) {
    largest = fmaxf(largest, fabsf(expected[i]));
    difference = fmaxf(difference, fabsf(logits[i] - expected[i]));
  }
  CHECK(difference <= 1e-4f * largest);
}

static void prefill_and_decode(const kva_model *model, const golden *golden) {
  float logits[TEST_VOCABULARY];
  kva_session *whole = test_session(model, 0), *steps = test_session(model, 0);
  CHECK(kva_session_capacity(whole) == TEST_CONTEXT && kva_session_length(whole) == 0);
  OK(kva_session_prefill(whole, golden->tokens, golden->count, logits, TEST_VOCABULARY));
  check_logits(logits, golden->logits + (golden->count - 1) * TEST_VOCABULARY);
  CHECK(kva_session_length(whole) == golden->count);

  OK(kva_session_prefill(steps, golden->tokens, 5, NULL, 0));
  for (size_t i = 5; i < golden->count; i++) {
    OK(kva_session_decode(steps, golden->tokens[i], logits, TEST_VOCABULARY));
    check_logits(logits, golden->logits + i * TEST_VOCABULARY);
  }
  test_goes_on_as_golden(whole, golden, 0, golden->greedy_count);
  test_goes_on_as_golden(steps, golden, 0, golden->greedy_count);

  size_t count = 0;
  uint32_t *tokens = test_allocate((golden->count + golden->greedy_count) * sizeof *tokens);
  OK(kva_session_get_tokens(whole, NULL, 0, &count));
  CHECK(count == golden->count + golden->greedy_count);
  FAILS(kva_session_get_tokens(whole, tokens, count - 1, &count), KVA_ERROR_INVALID_ARGUMENT, "");
  OK(kva_session_get_tokens(whole, tokens, count, &count));
  CHECK(memcmp(tokens, golden->tokens, golden->count * sizeof *tokens) == 0);
  CHECK(memcmp(tokens + golden->count, golden->greedy, golden->greedy_count * sizeof *tokens) == 0);
  free(tokens);

  /* Back to the prompt's last token but one, and on again. */
  FAILS(kva_session_truncate(whole, count + 1), KVA_ERROR_INVALID_ARGUMENT, "");
  CHECK(kva_session_length(whole) == count);
  OK(kva_session_truncate(whole, golden->count - 1));
  CHECK(kva_session_length(whole) == golden->count - 1);
  uint32_t token = 7;
  FAILS(kva_session_sample(whole, NULL, &token), KVA_ERROR_INVALID_ARGUMENT, "logits");
  CHECK(token == 7);
  OK(kva_session_decode(whole, golden->tokens[golden->count - 1], logits, TEST_VOCABULARY));
  test_goes_on_as_golden(whole, golden, 0, golden->greedy_count);
  kva_session_free(whole);
  kva_session_free(steps);
}

static void errors_leave_the_session_as_it_was(const kva_model *model, const golden *golden) {
  /* Room for the prompt and three more. */
  kva_session *session = test_session(model, golden->count + 3);
  float logits[TEST_VOCABULARY];
  logits[0] = 77;
  OK(kva_session_prefill(session, golden->tokens, golden->count, NULL, 0));
  test_goes_on_as_golden(session, golden, 0, 2);
  FAILS(kva_session_prefill(session, golden->tokens, 2, logits, TEST_VOCABULARY), KVA_ERROR_CAPACITY, "");
  FAILS(kva_session_decode(session, TEST_VOCABULARY, logits, TEST_VOCABULARY), KVA_ERROR_INVALID_ARGUMENT, "320");
  FAILS(kva_session_decode(session, UINT32_MAX, logits, TEST_VOCABULARY), KVA_ERROR_INVALID_ARGUMENT, "");
  const uint32_t bad[] = {1, TEST_VOCABULARY};
  OK(kva_session_truncate(session, golden->count + 1));
  FAILS(kva_session_prefill(session, bad, 2, logits, TEST_VOCABULARY), KVA_ERROR_INVALID_ARGUMENT, "tokens[1]");
  FAILS(kva_session_decode(session, 1, logits, TEST_VOCABULARY - 1), KVA_ERROR_INVALID_ARGUMENT, "319");
  FAILS(kva_session_decode(session, 1, logits, TEST_VOCABULARY + 1), KVA_ERROR_INVALID_ARGUMENT, "321");
  FAILS(kva_session_decode(session, 1, logits, 0), KVA_ERROR_INVALID_ARGUMENT, "");
  CHECK(logits[0] == 77 && kva_session_length(session) == golden->count + 1);
  OK(kva_session_decode(session, golden->greedy[1], NULL, 0));
  test_goes_on_as_golden(session, golden, 2, 1);
  FAILS(kva_session_decode(session, 1, logits, TEST_VOCABULARY), KVA_ERROR_CAPACITY, "");
  CHECK(kva_session_length(session) == kva_session_capacity(session));
  kva_session_free(session);
}

static void scores(const kva_model *model, const golden *golden) {
  kva_session *session = test_session(model, 0);
  float *scores = test_allocate(golden->count * sizeof *scores);
  OK(kva_session_score(session, golden->tokens, golden->count, scores));
  CHECK(isnan(scores[0]));
  for (size_t i = 1; i < golden->count; i++) {
    const float *row = golden->logits + (i - 1) * TEST_VOCABULARY;
    double sum = 0;
    for (size_t j = 0; j < TEST_VOCABULARY; j++) sum += exp(row[j]);
    CHECK(fabs(scores[i] - (row[golden->tokens[i]] - log(sum))) < 2e-3);
  }
  test_goes_on_as_golden(session, golden, 0, 3);
  free(scores);
  kva_session_free(session);
}

static void statistics(const kva_model *model, const golden *golden) {
  kva_session *session = test_session(model, 0);
  kva_statistics statistics = {.struct_size = sizeof statistics};
  OK(kva_session_get_statistics(session, &statistics));
  CHECK(statistics.prefill_tokens == 0 && statistics.decode_tokens == 0 && statistics.kv_device_bytes == 0);
  OK(kva_session_prefill(session, golden->tokens, golden->count, NULL, 0));
  test_goes_on_as_golden(session, golden, 0, 4);
  OK(kva_session_get_statistics(session, &statistics));
  CHECK(statistics.struct_size == sizeof statistics && statistics.reserved == 0);
  CHECK(statistics.prefill_tokens == golden->count && statistics.prefill_seconds > 0);
  CHECK(statistics.decode_tokens == 4 && statistics.decode_seconds > 0);
  CHECK(statistics.sampled_tokens == 4 && statistics.sample_seconds >= 0);
  /* 3 layers x 3 KV heads x (8 keys + 8 values) x 4 bytes a token, in extents. */
  CHECK(statistics.kv_device_bytes >= (golden->count + 4) * 3 * 3 * 16 * 4);
  OK(kva_session_reset_statistics(session));
  const uint64_t kv = statistics.kv_device_bytes;
  OK(kva_session_get_statistics(session, &statistics));
  CHECK(statistics.prefill_tokens == 0 && statistics.sampled_tokens == 0 && statistics.kv_device_bytes == kv);

  kva_session_options options;
  OK(kva_session_options_init(&options, sizeof options));
  kva_estimate one = {.struct_size = sizeof one}, ten = {.struct_size = sizeof ten};
  OK(kva_model_estimate(model, NULL, 1, &one));
  OK(kva_model_estimate(model, &options, 10, &ten));
  CHECK(one.weight_bytes == ten.weight_bytes && one.weight_bytes > 100000);
  CHECK(one.kv_device_bytes * 10 == ten.kv_device_bytes && one.kv_device_bytes == 512u * 3 * 3 * 16 * 4);
  CHECK(one.kv_pinned_bytes == 0 && one.kv_file_bytes == 0 && one.scratch_bytes > 0);
  OK(kva_model_estimate(model, NULL, SIZE_MAX, &ten));
  CHECK(ten.kv_device_bytes == UINT64_MAX && ten.scratch_bytes == UINT64_MAX);
  options.capacity = TEST_CONTEXT + 1;
  FAILS(kva_model_estimate(model, &options, 1, &one), KVA_ERROR_INVALID_ARGUMENT, "513");
  kva_session_free(session);
}

static void information(const kva_model *model) {
  kva_model_info info = {.struct_size = sizeof info};
  OK(kva_model_get_info(model, &info));
  CHECK(info.struct_size == sizeof info && info.dtype == KVA_DTYPE_F32);
  CHECK(info.layers == 3 && info.heads == 9 && info.kv_heads == 3 && info.head_dim == 8 && info.hidden_size == 72);
  CHECK(info.vocabulary_size == TEST_VOCABULARY && info.context_length == TEST_CONTEXT);
  CHECK(info.bos_token == 1 && info.eos_token == 2 && info.has_tokenizer == 1 && info.has_chat_template == 1);
  CHECK(info.parameters > 0 && info.weight_bytes == info.parameters * 4 && info.load_seconds > 0);
  CHECK(strlen(info.architecture) > 0 && strlen(info.backend) > 0 && strlen(info.weight_storage) > 0);
}

/* The pool's limit is a budget of all sessions together. */
static void kv_limit(const golden *golden) {
  kva_model_options options;
  OK(kva_model_options_init(&options, sizeof options));
  options.dtype = KVA_DTYPE_F32;
  options.kv_limit_bytes = 256 * 3 * 3 * 16 * 4; /* one extent */
  kva_model *model = NULL;
  OK(kva_model_load(TEST_MODEL, &options, &model));
  kva_session *first = test_session(model, 0), *second = test_session(model, 0);
  OK(kva_session_prefill(first, golden->tokens, golden->count, NULL, 0));
  FAILS(kva_session_prefill(second, golden->tokens, golden->count, NULL, 0), KVA_ERROR_CAPACITY, "");
  CHECK(kva_session_length(second) == 0);
  test_goes_on_as_golden(first, golden, 0, 3);
  kva_session_free(first);
  OK(kva_session_prefill(second, golden->tokens, golden->count, NULL, 0));
  test_goes_on_as_golden(second, golden, 0, 3);
  kva_session_free(second);
  kva_model_free(model);
}

/* A session full of random numbers decodes like any other, and truncated to nothing it is an empty one. */
static void filled(const kva_model *model, const golden *golden) {
  float first[TEST_VOCABULARY], second[TEST_VOCABULARY];
  kva_session *session = test_session(model, 20), *other = test_session(model, 20);
  FAILS(kva_session_fill(NULL, 3, 1), KVA_ERROR_INVALID_ARGUMENT, "session");
  FAILS(kva_session_fill(session, 0, 1), KVA_ERROR_INVALID_ARGUMENT, "at least one token");
  FAILS(kva_session_fill(session, 21, 1), KVA_ERROR_CAPACITY, "");
  CHECK(kva_session_length(session) == 0);
  OK(kva_session_fill(session, 17, 1));
  OK(kva_session_fill(other, 17, 2));
  CHECK(kva_session_length(session) == 17);
  FAILS(kva_session_fill(session, 1, 1), KVA_ERROR_INVALID_ARGUMENT, "empty");
  OK(kva_session_decode(session, golden->tokens[0], first, TEST_VOCABULARY));
  OK(kva_session_decode(other, golden->tokens[0], second, TEST_VOCABULARY));
  CHECK(isfinite(first[0]) && memcmp(first, second, sizeof first) != 0);
  OK(kva_session_truncate(session, 0));
  OK(kva_session_prefill(session, golden->tokens, 5, first, TEST_VOCABULARY));
  check_logits(first, golden->logits + 4 * TEST_VOCABULARY);
  kva_session_free(session);
  kva_session_free(other);
}

int main(void) {
  CHECK(strcmp(kva_version(), KVA_VERSION) == 0);
  golden golden = golden_read();
  kva_model *model = test_model();
  information(model);
  prefill_and_decode(model, &golden);
  errors_leave_the_session_as_it_was(model, &golden);
  scores(model, &golden);
  statistics(model, &golden);
  filled(model, &golden);
  kv_limit(&golden);
  kva_model_free(model);
  golden_free(&golden);
  return 0;
}
