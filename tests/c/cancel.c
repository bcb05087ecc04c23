/* Cancelling: before a call, during one, from a callback and from a signal handler; afterwards the session goes on as if nothing had been. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#include "support.h"

static void before_a_call(const kva_model *model, const golden *golden) {
  kva_session *session = test_session(model, 0);
  float logits[TEST_VOCABULARY], scores[4];
  logits[0] = scores[0] = 77;
  kva_session_cancel(session);
  FAILS(kva_session_prefill(session, golden->tokens, golden->count, logits, TEST_VOCABULARY), KVA_ERROR_CANCELLED, "");
  CHECK(kva_session_length(session) == 0 && logits[0] == 77);
  OK(kva_session_prefill(session, golden->tokens, golden->count, logits, TEST_VOCABULARY));
  kva_session_cancel(session);
  kva_session_cancel(session); /* twice is once */
  FAILS(kva_session_decode(session, 1, NULL, 0), KVA_ERROR_CANCELLED, "");
  test_goes_on_as_golden(session, golden, 0, 2);
  kva_session_cancel(session);
  FAILS(kva_session_score(session, golden->tokens, 4, scores), KVA_ERROR_CANCELLED, "");
  kva_session_cancel(session);
  FAILS(kva_session_generate(session, golden->tokens, 4, NULL, NULL), KVA_ERROR_CANCELLED, "");
  kva_session_cancel(session);
  kva_session_clear_cancel(session);
  CHECK(scores[0] == 77 && kva_session_length(session) == golden->count + 2);
  test_goes_on_as_golden(session, golden, 2, 3);
  kva_session_free(session);
}

typedef struct run {
  kva_session *session;
  size_t calls;
  size_t cancel_after;
  int freed;
} run;

static int32_t cancel_from_callback(void *user_data, uint32_t token, const char *text, size_t text_len) {
  run *run = user_data;
  (void)token, (void)text, (void)text_len;
  if (++run->calls == run->cancel_after) kva_session_cancel(run->session);
  return 0;
}

static void release(void *user_data) { ((run *)user_data)->freed++; }

static void from_a_callback(const kva_model *model, const golden *golden) {
  kva_session *session = test_session(model, 0);
  run run = {.session = session, .cancel_after = 5};
  kva_generate_options options;
  OK(kva_generate_options_init(&options, sizeof options));
  options.max_tokens = golden->greedy_count;
  options.callback = cancel_from_callback;
  options.user_data = &run;
  options.free_user_data = release;
  kva_generate_result result = {.struct_size = sizeof result, .tokens = 77};
  FAILS(kva_session_generate(session, golden->tokens, golden->count, &options, &result), KVA_ERROR_CANCELLED, "");
  CHECK(run.calls == 5 && run.freed == 1 && result.tokens == 77);
  CHECK(kva_session_length(session) == golden->count + 5);
  test_goes_on_as_golden(session, golden, 5, golden->greedy_count - 5);
  kva_session_free(session);
}

/* Another thread cancels at odd moments, many times. Each request stops exactly one call. */
typedef struct storm {
  kva_session *session;
  atomic_int cancelled;
  int rounds;
} storm;

static void *cancel_many(void *argument) {
  storm *storm = argument;
  for (int i = 0; i < storm->rounds; i++) {
    const struct timespec pause = {0, 1000L * (i * 37 % 400)};
    nanosleep(&pause, NULL);
    kva_session_cancel(storm->session);
    while (atomic_load(&storm->cancelled) == i) {
      const struct timespec moment = {0, 20000};
      nanosleep(&moment, NULL);
    }
  }
  return NULL;
}

static void from_another_thread(const kva_model *model, const golden *golden) {
  kva_session *session = test_session(model, 0);
  storm storm = {.session = session, .rounds = test_quick() ? 5 : 40};
  atomic_init(&storm.cancelled, 0);
  uint32_t prompt[400];
  for (size_t i = 0; i < COUNT(prompt); i++) prompt[i] = golden->tokens[i % golden->count];
  OK(kva_session_prefill(session, golden->tokens, golden->count, NULL, 0));
  pthread_t thread;
  CHECK(pthread_create(&thread, NULL, cancel_many, &storm) == 0);
  while (atomic_load(&storm.cancelled) < storm.rounds) {
    kva_error *error = kva_session_prefill(session, prompt, COUNT(prompt), NULL, 0);
    if (error) {
      CHECK(kva_error_code(error) == KVA_ERROR_CANCELLED);
      kva_error_free(error);
      CHECK(kva_session_length(session) == golden->count);
      atomic_fetch_add(&storm.cancelled, 1);
    } else {
      CHECK(kva_session_length(session) == golden->count + COUNT(prompt));
      OK(kva_session_truncate(session, golden->count - 1));
      /* The request may also come now: this call is then the one that it stops. */
      while ((error = kva_session_prefill(session, golden->tokens + golden->count - 1, 1, NULL, 0))) {
        CHECK(kva_error_code(error) == KVA_ERROR_CANCELLED);
        kva_error_free(error);
        CHECK(kva_session_length(session) == golden->count - 1);
        atomic_fetch_add(&storm.cancelled, 1);
      }
    }
  }
  CHECK(pthread_join(thread, NULL) == 0);
  test_goes_on_as_golden(session, golden, 0, golden->greedy_count);
  kva_session_free(session);
}

static kva_session *interrupted;

static void on_signal(int number) {
  (void)number;
  kva_session_cancel(interrupted);
}

static int32_t raise_after_three(void *user_data, uint32_t token, const char *text, size_t text_len) {
  (void)token, (void)text, (void)text_len;
  if (++*(int *)user_data == 3) raise(SIGUSR1);
  return 0;
}

static void from_a_signal_handler(const kva_model *model, const golden *golden) {
  kva_session *session = interrupted = test_session(model, 0);
  struct sigaction action = {0};
  action.sa_handler = on_signal;
  CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
  int calls = 0;
  kva_generate_options options;
  OK(kva_generate_options_init(&options, sizeof options));
  options.callback = raise_after_three;
  options.user_data = &calls;
  FAILS(kva_session_generate(session, golden->tokens, golden->count, &options, NULL), KVA_ERROR_CANCELLED, "");
  CHECK(kva_session_length(session) == golden->count + 3);
  test_goes_on_as_golden(session, golden, 3, 3);
  kva_session_free(session);
}

int main(void) {
  golden golden = golden_read();
  kva_model *model = test_model();
  before_a_call(model, &golden);
  from_a_callback(model, &golden);
  from_another_thread(model, &golden);
  from_a_signal_handler(model, &golden);
  kva_model_free(model);
  golden_free(&golden);
  return 0;
}
