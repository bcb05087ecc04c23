/* Handles keep what they need alive, whatever is freed first; user data is freed exactly once on every path. */
#include "support.h"

static void handles_outlive_the_model(const golden *golden) {
  kva_model *model = test_model();
  kva_session *session = test_session(model, 0);
  kva_detokenizer *detokenizer = NULL;
  OK(kva_detokenizer_create(model, 0, &detokenizer));
  OK(kva_session_prefill(session, golden->tokens, 3, NULL, 0));
  kva_model_free(model);
  OK(kva_session_prefill(session, golden->tokens + 3, golden->count - 3, NULL, 0));
  test_goes_on_as_golden(session, golden, 0, 3);
  kva_session_free(session);
  const char *text = NULL;
  size_t length = 0;
  OK(kva_detokenizer_push(detokenizer, golden->tokens[0], &text, &length));
  kva_detokenizer_free(detokenizer);
}

typedef struct watch {
  int calls;
  int freed;
  int result;
  float last;
  int levels[5];
} watch;

static int32_t progress(void *user_data, float fraction) {
  watch *watch = user_data;
  CHECK(watch->freed == 0 && fraction >= 0 && fraction <= 1 && fraction >= watch->last);
  watch->last = fraction;
  watch->calls++;
  return watch->result;
}

static void write_log(void *user_data, int32_t level, const char *message) {
  watch *watch = user_data;
  CHECK(watch->freed == 0 && level >= KVA_LOG_ERROR && level <= KVA_LOG_DEBUG && strlen(message) > 0);
  watch->levels[level]++;
  watch->calls++;
}

static void release(void *user_data) { ((watch *)user_data)->freed++; }

static kva_model_options watched(watch *on_progress, watch *on_log) {
  kva_model_options options;
  OK(kva_model_options_init(&options, sizeof options));
  memset(on_progress, 0, sizeof *on_progress);
  memset(on_log, 0, sizeof *on_log);
  options.progress = progress;
  options.progress_user_data = on_progress;
  options.progress_free_user_data = release;
  options.log = write_log;
  options.log_user_data = on_log;
  options.log_free_user_data = release;
  return options;
}

static void model_callbacks(void) {
  watch on_progress, on_log;
  kva_model *model = NULL;

  /* Success: progress is done with at once, the log when the last handle is freed. */
  kva_model_options options = watched(&on_progress, &on_log);
  OK(kva_model_load(TEST_MODEL, &options, &model));
  CHECK(on_progress.calls > 0 && on_progress.last == 1 && on_progress.freed == 1);
  CHECK(on_log.levels[KVA_LOG_INFO] > 0 && on_log.levels[KVA_LOG_DEBUG] == 0 && on_log.freed == 0);
  kva_session *session = test_session(model, 0);
  kva_detokenizer *detokenizer = NULL;
  OK(kva_detokenizer_create(model, 0, &detokenizer));
  kva_model_free(model);
  CHECK(on_log.freed == 0);
  kva_detokenizer_free(detokenizer);
  CHECK(on_log.freed == 0);
  kva_session_free(session);
  CHECK(on_log.freed == 1 && on_progress.freed == 1);

  /* Quieter. */
  options = watched(&on_progress, &on_log);
  options.log_level = KVA_LOG_ERROR;
  OK(kva_model_load(TEST_MODEL, &options, &model));
  CHECK(on_log.calls == 0);
  kva_model_free(model);
  CHECK(on_log.freed == 1);

  /* Cancelled by progress, at the first call. */
  model = NULL;
  options = watched(&on_progress, &on_log);
  on_progress.result = 1;
  FAILS(kva_model_load(TEST_MODEL, &options, &model), KVA_ERROR_CANCELLED, "");
  CHECK(on_progress.calls == 1 && on_progress.freed == 1 && on_log.freed == 1 && model == NULL);

  /* Every way to fail before anything is loaded. */
#define FREED_ONCE(change, call, code) \
  do { \
    options = watched(&on_progress, &on_log); \
    change; \
    FAILS(call, code, ""); \
    CHECK(on_progress.freed == 1 && on_log.freed == 1 && on_progress.calls == 0 && model == NULL); \
  } while (0)
  FREED_ONCE(, kva_model_load(NULL, &options, &model), KVA_ERROR_INVALID_ARGUMENT);
  FREED_ONCE(, kva_model_load(TEST_MODEL, &options, NULL), KVA_ERROR_INVALID_ARGUMENT);
  FREED_ONCE(, kva_model_load(KVAHEAD_TEST_DATA "/nowhere", &options, &model), KVA_ERROR_NOT_FOUND);
  FREED_ONCE(options.device = 99, kva_model_load(TEST_MODEL, &options, &model), KVA_ERROR_INVALID_ARGUMENT);
  FREED_ONCE(options.dtype = 99, kva_model_load(TEST_MODEL, &options, &model), KVA_ERROR_INVALID_ARGUMENT);
  FREED_ONCE(options.log_level = 99, kva_model_load(TEST_MODEL, &options, &model), KVA_ERROR_INVALID_ARGUMENT);
  FREED_ONCE(options.copy_weights = 2, kva_model_load(TEST_MODEL, &options, &model), KVA_ERROR_INVALID_ARGUMENT);
  FREED_ONCE(, kva_model_create_random(NULL, 1, &options, &model), KVA_ERROR_INVALID_ARGUMENT);
  FREED_ONCE(, kva_model_create_random("no such shape", 1, &options, &model), KVA_ERROR_INVALID_ARGUMENT);

  /* Data without a callback to use it, and a field from the future. */
  options = watched(&on_progress, &on_log);
  options.progress = NULL;
  options.log = NULL;
  OK(kva_model_load(TEST_MODEL, &options, &model));
  CHECK(on_progress.freed == 1 && on_log.freed == 1);
  kva_model_free(model);
  model = NULL;
  struct {
    kva_model_options known;
    uint64_t unknown;
  } future = {watched(&on_progress, &on_log), 1};
  future.known.struct_size = sizeof future;
  FAILS(kva_model_load(TEST_MODEL, &future.known, &model), KVA_ERROR_UNSUPPORTED, "");
  CHECK(on_progress.freed == 1 && on_log.freed == 1 && model == NULL);

  /* The one exception: where struct_size is refused, nobody knows where the data is. */
  options = watched(&on_progress, &on_log);
  options.struct_size = 4;
  FAILS(kva_model_load(TEST_MODEL, &options, &model), KVA_ERROR_INVALID_ARGUMENT, "struct_size");
  CHECK(on_progress.freed == 0 && on_log.freed == 0);
}

static void generate_callbacks(void) {
  kva_model *model = test_model();
  kva_session *session = test_session(model, 16);
  const uint32_t prompt[] = {5, 6}, outside = TEST_VOCABULARY;
  int freed = 0;
  kva_generate_options options;
  kva_sampling_options sampling;
  kva_generate_result result = {.struct_size = 4};
  OK(kva_sampling_options_init(&sampling, sizeof sampling));
  OK(kva_generate_options_init(&options, sizeof options));
  options.max_tokens = 2;
  options.user_data = &freed;
  options.free_user_data = test_count_free;
  FAILS(kva_session_generate(NULL, prompt, 2, &options, NULL), KVA_ERROR_INVALID_ARGUMENT, "");
  CHECK(freed == 1);
  FAILS(kva_session_generate(session, NULL, 2, &options, NULL), KVA_ERROR_INVALID_ARGUMENT, "");
  CHECK(freed == 2);
  FAILS(kva_session_generate(session, NULL, 0, &options, NULL), KVA_ERROR_INVALID_ARGUMENT, "");
  CHECK(freed == 3);
  FAILS(kva_session_generate(session, &outside, 1, &options, NULL), KVA_ERROR_INVALID_ARGUMENT, "");
  CHECK(freed == 4);
  FAILS(kva_session_generate(session, prompt, 2, &options, &result), KVA_ERROR_INVALID_ARGUMENT, "");
  CHECK(freed == 5);
  sampling.temperature = -1;
  options.sampling = &sampling;
  FAILS(kva_session_generate(session, prompt, 2, &options, NULL), KVA_ERROR_INVALID_ARGUMENT, "");
  CHECK(freed == 6 && kva_session_length(session) == 0);
  options.sampling = NULL;
  kva_session_cancel(session);
  FAILS(kva_session_generate(session, prompt, 2, &options, NULL), KVA_ERROR_CANCELLED, "");
  CHECK(freed == 7);
  OK(kva_session_generate(session, prompt, 2, &options, NULL));
  CHECK(freed == 8);
  options.struct_size = 4;
  FAILS(kva_session_generate(session, prompt, 2, &options, NULL), KVA_ERROR_INVALID_ARGUMENT, "");
  CHECK(freed == 8);
  kva_session_free(session);
  kva_model_free(model);
}

int main(void) {
  golden golden = golden_read();
  handles_outlive_the_model(&golden);
  model_callbacks();
  generate_callbacks();
  golden_free(&golden);
  return 0;
}
