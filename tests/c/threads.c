/* A busy session says so to everyone else, and changes nothing; a model serves many threads at once. */
#include <pthread.h>

#include "support.h"

#define BUSY(call) FAILS(call, KVA_ERROR_BUSY, "busy")

typedef struct attempt {
  kva_session *busy;
  kva_session *idle;
  const golden *golden;
  int calls;
} attempt;

/* Everything that needs the session, while a generation of it is in progress. */
static void *try_everything(void *argument) {
  attempt *attempt = argument;
  kva_session *busy = attempt->busy;
  const size_t length = kva_session_length(busy), idle_length = kva_session_length(attempt->idle);
  float logits[TEST_VOCABULARY];
  uint32_t token = 5;
  size_t count = 0;
  logits[0] = 77;
  BUSY(kva_session_prefill(busy, &token, 1, logits, TEST_VOCABULARY));
  BUSY(kva_session_score(busy, &token, 1, logits));
  BUSY(kva_session_decode(busy, token, logits, TEST_VOCABULARY));
  BUSY(kva_session_sample(busy, NULL, &token));
  BUSY(kva_session_truncate(busy, 0));
  BUSY(kva_session_get_tokens(busy, NULL, 0, &count));
  kva_statistics statistics = {.struct_size = sizeof statistics};
  BUSY(kva_session_get_statistics(busy, &statistics));
  BUSY(kva_session_reset_statistics(busy));
  int freed = 0;
  kva_generate_options options;
  OK(kva_generate_options_init(&options, sizeof options));
  options.user_data = &freed;
  options.free_user_data = test_count_free;
  BUSY(kva_session_generate(busy, &token, 1, &options, NULL));
  CHECK(freed == 1);
  kva_session *const batch[] = {attempt->idle, busy};
  const uint32_t tokens[] = {5, 5};
  BUSY(kva_batch_decode(batch, tokens, 2, NULL, 0));
  CHECK(logits[0] == 77 && token == 5 && count == 0);
  CHECK(kva_session_length(busy) == length && kva_session_length(attempt->idle) == idle_length);
  CHECK(kva_session_capacity(busy) == TEST_CONTEXT);
  /* The idle one was not left locked. */
  OK(kva_session_decode(attempt->idle, 5, NULL, 0));
  return NULL;
}

static int32_t try_while_busy(void *user_data, uint32_t token, const char *text, size_t text_len) {
  attempt *attempt = user_data;
  (void)token, (void)text, (void)text_len;
  if (attempt->calls++ == 2) {
    try_everything(attempt); /* on the thread that generates */
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, try_everything, attempt) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
  }
  return 0;
}

static void busy(const kva_model *model, const golden *golden) {
  attempt attempt = {.busy = test_session(model, 0), .idle = test_session(model, 0), .golden = golden};
  kva_generate_options options;
  OK(kva_generate_options_init(&options, sizeof options));
  options.max_tokens = 6;
  options.callback = try_while_busy;
  options.user_data = &attempt;
  OK(kva_session_generate(attempt.busy, golden->tokens, golden->count, &options, NULL));
  CHECK(attempt.calls >= 6);
  test_goes_on_as_golden(attempt.busy, golden, 6, 3);
  kva_session_free(attempt.busy);
  kva_session_free(attempt.idle);
}

typedef struct worker {
  const kva_model *model;
  const golden *golden;
} worker;

static void *work(void *argument) {
  const worker *worker = argument;
  for (int i = 0; i < (test_quick() ? 1 : 4); i++) {
    kva_session *session = test_session(worker->model, 0);
    size_t count = 0;
    OK(kva_model_tokenize(worker->model, "a truth", 7, 0, NULL, 0, &count));
    OK(kva_session_prefill(session, worker->golden->tokens, worker->golden->count, NULL, 0));
    test_goes_on_as_golden(session, worker->golden, 0, worker->golden->greedy_count);
    kva_session_free(session);
  }
  return NULL;
}

static void many_sessions_on_many_threads(const kva_model *model, const golden *golden) {
  worker worker = {model, golden};
  pthread_t threads[4];
  for (size_t i = 0; i < COUNT(threads); i++) CHECK(pthread_create(&threads[i], NULL, work, &worker) == 0);
  for (size_t i = 0; i < COUNT(threads); i++) CHECK(pthread_join(threads[i], NULL) == 0);
}

int main(void) {
  golden golden = golden_read();
  kva_model *model = test_model();
  busy(model, &golden);
  many_sessions_on_many_threads(model, &golden);
  kva_model_free(model);
  golden_free(&golden);
  return 0;
}
