/* NULL in every place where something is needed, lengths that do not fit, values that do not exist: errors, never more. */
#include "support.h"

#define INVALID(call) FAILS(call, KVA_ERROR_INVALID_ARGUMENT, "")
#define IS_NULL(call, name) FAILS(call, KVA_ERROR_INVALID_ARGUMENT, name " is NULL")

static void nothing(const kva_model *model, kva_session *session) {
  CHECK(kva_error_code(NULL) == KVA_OK && strcmp(kva_error_message(NULL), "") == 0);
  kva_error_free(NULL);
  kva_model_free(NULL);
  kva_session_free(NULL);
  kva_detokenizer_free(NULL);
  kva_session_cancel(NULL);
  kva_session_clear_cancel(NULL);
  CHECK(kva_session_length(NULL) == 0 && kva_session_capacity(NULL) == 0);

  IS_NULL(kva_model_options_init(NULL, sizeof(kva_model_options)), "options");
  IS_NULL(kva_session_options_init(NULL, sizeof(kva_session_options)), "options");
  IS_NULL(kva_sampling_options_init(NULL, sizeof(kva_sampling_options)), "options");
  IS_NULL(kva_generate_options_init(NULL, sizeof(kva_generate_options)), "options");

  kva_model *loaded = NULL;
  IS_NULL(kva_model_load(NULL, NULL, &loaded), "path");
  IS_NULL(kva_model_load(TEST_MODEL, NULL, NULL), "model");
  INVALID(kva_model_load("", NULL, &loaded));
  IS_NULL(kva_model_create_random(NULL, 1, NULL, &loaded), "shape");
  IS_NULL(kva_model_create_random("smollm2-135m", 1, NULL, NULL), "model");
  FAILS(kva_model_create_random("smollm3", 1, NULL, &loaded), KVA_ERROR_INVALID_ARGUMENT, "smollm2-135m");
  INVALID(kva_model_create_random("\xff", 1, NULL, &loaded));
  CHECK(loaded == NULL);

  kva_model_info info = {.struct_size = sizeof info};
  kva_estimate estimate = {.struct_size = sizeof estimate};
  IS_NULL(kva_model_get_info(NULL, &info), "model");
  IS_NULL(kva_model_get_info(model, NULL), "info");
  IS_NULL(kva_model_estimate(NULL, NULL, 1, &estimate), "model");
  IS_NULL(kva_model_estimate(model, NULL, 1, NULL), "estimate");

  uint32_t tokens[4] = {1, 2, 3, 4};
  char text[16];
  size_t count = 99;
  IS_NULL(kva_model_tokenize(NULL, "a", 1, 0, tokens, 4, &count), "model");
  INVALID(kva_model_tokenize(model, NULL, 1, 0, tokens, 4, &count));
  INVALID(kva_model_tokenize(model, "a", 1, 0, NULL, 4, &count));
  IS_NULL(kva_model_tokenize(model, "a", 1, 0, tokens, 4, NULL), "count");
  IS_NULL(kva_model_detokenize(NULL, tokens, 4, 0, text, 16, &count), "model");
  INVALID(kva_model_detokenize(model, NULL, 4, 0, text, 16, &count));
  INVALID(kva_model_detokenize(model, tokens, 4, 0, NULL, 16, &count));
  IS_NULL(kva_model_detokenize(model, tokens, 4, 0, text, 16, NULL), "text_len");
  IS_NULL(kva_model_get_stop_tokens(NULL, tokens, 4, &count), "model");
  INVALID(kva_model_get_stop_tokens(model, NULL, 4, &count));
  IS_NULL(kva_model_get_stop_tokens(model, tokens, 4, NULL), "count");
  const kva_chat_message message = {"user", "hi"}, no_role = {NULL, "hi"}, no_content = {"user", NULL};
  const kva_chat_message wrong = {"user", "\xc3("};
  IS_NULL(kva_model_apply_chat_template(NULL, &message, 1, 1, text, 16, &count), "model");
  INVALID(kva_model_apply_chat_template(model, NULL, 1, 1, text, 16, &count));
  IS_NULL(kva_model_apply_chat_template(model, &no_role, 1, 1, NULL, 0, &count), "messages[0].role");
  IS_NULL(kva_model_apply_chat_template(model, &no_content, 1, 1, NULL, 0, &count), "messages[0].content");
  FAILS(kva_model_apply_chat_template(model, &wrong, 1, 1, NULL, 0, &count), KVA_ERROR_INVALID_ARGUMENT, "UTF-8");
  INVALID(kva_model_apply_chat_template(model, &message, 1, 1, NULL, 16, &count));
  IS_NULL(kva_model_apply_chat_template(model, &message, 1, 1, NULL, 0, NULL), "text_len");
  CHECK(count == 99);

  kva_detokenizer *detokenizer = NULL;
  const char *piece = NULL;
  IS_NULL(kva_detokenizer_create(NULL, 0, &detokenizer), "model");
  IS_NULL(kva_detokenizer_create(model, 0, NULL), "detokenizer");
  IS_NULL(kva_detokenizer_push(NULL, 1, &piece, &count), "detokenizer");
  IS_NULL(kva_detokenizer_finish(NULL, &piece, &count), "detokenizer");
  OK(kva_detokenizer_create(model, 0, &detokenizer));
  IS_NULL(kva_detokenizer_push(detokenizer, 1, NULL, &count), "text");
  IS_NULL(kva_detokenizer_push(detokenizer, 1, &piece, NULL), "text_len");
  INVALID(kva_detokenizer_push(detokenizer, UINT32_MAX, &piece, &count));
  IS_NULL(kva_detokenizer_finish(detokenizer, NULL, &count), "text");
  IS_NULL(kva_detokenizer_finish(detokenizer, &piece, NULL), "text_len");
  kva_detokenizer_free(detokenizer);

  kva_session *created = NULL;
  IS_NULL(kva_session_create(NULL, NULL, &created), "model");
  IS_NULL(kva_session_create(model, NULL, NULL), "session");
  IS_NULL(kva_session_get_tokens(NULL, tokens, 4, &count), "session");
  INVALID(kva_session_get_tokens(session, NULL, 4, &count));
  IS_NULL(kva_session_get_tokens(session, tokens, 4, NULL), "count");
  IS_NULL(kva_session_truncate(NULL, 0), "session");
  float logits[TEST_VOCABULARY];
  IS_NULL(kva_session_prefill(NULL, tokens, 4, logits, TEST_VOCABULARY), "session");
  INVALID(kva_session_prefill(session, NULL, 4, NULL, 0));
  INVALID(kva_session_prefill(session, NULL, 0, NULL, 0));
  INVALID(kva_session_prefill(session, tokens, 0, NULL, 0));
  INVALID(kva_session_prefill(session, tokens, 4, NULL, TEST_VOCABULARY));
  INVALID(kva_session_prefill(session, tokens, SIZE_MAX, NULL, 0));
  INVALID(kva_session_prefill(session, tokens, 4, logits, SIZE_MAX));
  IS_NULL(kva_session_score(NULL, tokens, 4, logits), "session");
  INVALID(kva_session_score(session, NULL, 4, logits));
  INVALID(kva_session_score(session, tokens, 4, NULL));
  INVALID(kva_session_score(session, tokens, 0, logits));
  IS_NULL(kva_session_decode(NULL, 1, NULL, 0), "session");
  INVALID(kva_session_decode(session, 1, NULL, TEST_VOCABULARY));
  uint32_t token;
  IS_NULL(kva_session_sample(NULL, NULL, &token), "session");
  IS_NULL(kva_session_sample(session, NULL, NULL), "token");
  INVALID(kva_session_sample(session, NULL, &token)); /* no logits yet */
  kva_statistics statistics = {.struct_size = sizeof statistics};
  IS_NULL(kva_session_get_statistics(NULL, &statistics), "session");
  IS_NULL(kva_session_get_statistics(session, NULL), "statistics");
  IS_NULL(kva_session_reset_statistics(NULL), "session");
  IS_NULL(kva_session_generate(NULL, tokens, 4, NULL, NULL), "session");
  INVALID(kva_session_generate(session, NULL, 4, NULL, NULL));
  INVALID(kva_session_generate(session, NULL, 0, NULL, NULL)); /* nothing to go on from */

  kva_session *const none[] = {NULL};
  kva_session *const one[] = {session};
  kva_session *const twice[] = {session, session};
  INVALID(kva_batch_decode(NULL, tokens, 1, NULL, 0));
  IS_NULL(kva_batch_decode(none, tokens, 1, NULL, 0), "sessions[0]");
  INVALID(kva_batch_decode(one, NULL, 1, NULL, 0));
  INVALID(kva_batch_decode(one, tokens, 0, NULL, 0));
  INVALID(kva_batch_decode(NULL, NULL, 0, NULL, 0));
  INVALID(kva_batch_decode(one, tokens, 1, NULL, TEST_VOCABULARY));
  INVALID(kva_batch_decode(one, tokens, 1, logits, TEST_VOCABULARY - 1));
  INVALID(kva_batch_decode(one, tokens, SIZE_MAX, NULL, 0));
  FAILS(kva_batch_decode(twice, tokens, 2, NULL, 0), KVA_ERROR_INVALID_ARGUMENT, "sessions[0] and sessions[1]");
  CHECK(kva_session_length(session) == 0);
}

static void misaligned(const kva_model *model, kva_session *session) {
  uint32_t tokens[4] = {1, 2, 3, 4};
  uint64_t room[40] = {0};
  const uint32_t *odd = (const uint32_t *)(const void *)((const char *)tokens + 1);
  INVALID(kva_session_prefill(session, odd, 2, NULL, 0));
  INVALID(kva_model_get_info(model, (kva_model_info *)(void *)((char *)room + 1)));
  INVALID(kva_model_options_init((kva_model_options *)(void *)((char *)room + 4), sizeof(kva_model_options)));
  CHECK(kva_session_length(session) == 0);
}

static void unknown_values(const kva_model *model, kva_session *session) {
  size_t count = 0;
  FAILS(kva_model_tokenize(model, "a", 1, 4, NULL, 0, &count), KVA_ERROR_INVALID_ARGUMENT, "flags");
  FAILS(kva_model_detokenize(model, NULL, 0, 2, NULL, 0, &count), KVA_ERROR_INVALID_ARGUMENT, "flags");
  kva_detokenizer *detokenizer = NULL;
  FAILS(kva_detokenizer_create(model, 0x80000000u, &detokenizer), KVA_ERROR_INVALID_ARGUMENT, "flags");
  FAILS(kva_model_tokenize(model, "a\xff", 2, 0, NULL, 0, &count), KVA_ERROR_INVALID_ARGUMENT, "offset 1");

  static const int32_t unknown[] = {-1, 99, INT32_MIN, INT32_MAX};
  for (size_t i = 0; i < COUNT(unknown); i++) {
    kva_model_options options;
    kva_model *loaded = NULL;
    OK(kva_model_options_init(&options, sizeof options));
    options.device = unknown[i];
    FAILS(kva_model_load(TEST_MODEL, &options, &loaded), KVA_ERROR_INVALID_ARGUMENT, "options.device");
    OK(kva_model_options_init(&options, sizeof options));
    options.dtype = unknown[i];
    FAILS(kva_model_load(TEST_MODEL, &options, &loaded), KVA_ERROR_INVALID_ARGUMENT, "options.dtype");
    OK(kva_model_options_init(&options, sizeof options));
    options.log_level = unknown[i];
    FAILS(kva_model_load(TEST_MODEL, &options, &loaded), KVA_ERROR_INVALID_ARGUMENT, "options.log_level");
    OK(kva_model_options_init(&options, sizeof options));
    options.copy_weights = (uint32_t)unknown[i];
    FAILS(kva_model_load(TEST_MODEL, &options, &loaded), KVA_ERROR_INVALID_ARGUMENT, "copy_weights");
    CHECK(loaded == NULL);

    kva_session_options session_options;
    kva_session *created = NULL;
    OK(kva_session_options_init(&session_options, sizeof session_options));
    session_options.policy = unknown[i];
    FAILS(kva_session_create(model, &session_options, &created), KVA_ERROR_INVALID_ARGUMENT, "options.policy");
    OK(kva_session_options_init(&session_options, sizeof session_options));
    session_options.kv_dtype = unknown[i];
    FAILS(kva_session_create(model, &session_options, &created), KVA_ERROR_INVALID_ARGUMENT, "options.kv_dtype");
    OK(kva_session_options_init(&session_options, sizeof session_options));
    session_options.capacity = UINT64_MAX;
    FAILS(kva_session_create(model, &session_options, &created), KVA_ERROR_INVALID_ARGUMENT, "capacity");
    CHECK(created == NULL);
  }

  /* Sampling values: the session's state does not matter, and must not change. */
  const uint32_t token = 5;
  OK(kva_session_prefill(session, &token, 1, NULL, 0));
  kva_sampling_options good, bad;
  OK(kva_sampling_options_init(&good, sizeof good));
  const kva_logit_bias outside = {TEST_VOCABULARY, 1};
  uint32_t sampled = 7;
#define BAD(field, value) \
  do { \
    bad = good; \
    bad.field = (value); \
    INVALID(kva_session_sample(session, &bad, &sampled)); \
  } while (0)
  const float zero = 0.0f, not_a_number = zero / zero;
  BAD(temperature, -1.0f);
  BAD(temperature, not_a_number);
  BAD(top_p, -0.5f);
  BAD(top_p, 1.5f);
  BAD(top_p, not_a_number);
  BAD(min_p, -0.5f);
  BAD(min_p, 1.5f);
  BAD(repetition_penalty, 0.0f);
  BAD(repetition_penalty, -1.0f);
  BAD(repetition_penalty, not_a_number);
  BAD(frequency_penalty, not_a_number);
  BAD(presence_penalty, not_a_number);
  BAD(reserved, 1u);
  BAD(logit_bias_count, 1u); /* with NULL */
  bad = good;
  bad.logit_bias = &outside;
  bad.logit_bias_count = 1;
  FAILS(kva_session_sample(session, &bad, &sampled), KVA_ERROR_INVALID_ARGUMENT, "320");
  CHECK(sampled == 7 && kva_session_length(session) == 1);
  OK(kva_session_sample(session, &good, &sampled));
  CHECK(sampled < TEST_VOCABULARY);
}

int main(void) {
  kva_model *model = test_model();
  kva_session *session = test_session(model, 16);
  nothing(model, session);
  misaligned(model, session);
  unknown_values(model, session);
  kva_session_free(session);
  kva_model_free(model);
  return 0;
}
