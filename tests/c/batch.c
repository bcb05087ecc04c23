/* A batch gives every session what it would get alone, bit for bit; all of it happens, or nothing. */
#include "support.h"

enum { SESSIONS = 5, STEPS = 6 };

static void equals_single_decodes(const kva_model *model, const golden *golden) {
  kva_session *alone[SESSIONS], *together[SESSIONS];
  uint32_t tokens[SESSIONS];
  float single[TEST_VOCABULARY], *rows = test_allocate(SESSIONS * TEST_VOCABULARY * sizeof *rows);
  for (size_t i = 0; i < SESSIONS; i++) {
    /* Different lengths and different texts. */
    alone[i] = test_session(model, 0);
    together[i] = test_session(model, 0);
    OK(kva_session_prefill(alone[i], golden->tokens + i, 3 + 5 * i, NULL, 0));
    OK(kva_session_prefill(together[i], golden->tokens + i, 3 + 5 * i, NULL, 0));
    OK(kva_session_sample(together[i], NULL, &tokens[i]));
  }
  for (size_t step = 0; step < STEPS; step++) {
    /* Every other step without asking for logits: the sessions keep them all the same. */
    const int ask = step % 2 == 0;
    OK(kva_batch_decode(together, tokens, SESSIONS, ask ? rows : NULL, ask ? SESSIONS * TEST_VOCABULARY : 0));
    for (size_t i = 0; i < SESSIONS; i++) {
      OK(kva_session_decode(alone[i], tokens[i], single, TEST_VOCABULARY));
      if (ask) CHECK(memcmp(single, rows + i * TEST_VOCABULARY, sizeof single) == 0);
      uint32_t next = KVA_TOKEN_NONE;
      OK(kva_session_sample(together[i], NULL, &tokens[i]));
      OK(kva_session_sample(alone[i], NULL, &next));
      CHECK(next == tokens[i] && kva_session_length(alone[i]) == kva_session_length(together[i]));
    }
  }
  /* And the next step of each session alone, after the batches. */
  for (size_t i = 0; i < SESSIONS; i++) {
    OK(kva_session_decode(alone[i], tokens[i], single, TEST_VOCABULARY));
    OK(kva_session_decode(together[i], tokens[i], rows, TEST_VOCABULARY));
    CHECK(memcmp(single, rows, sizeof single) == 0);
    kva_session_free(alone[i]);
    kva_session_free(together[i]);
  }
  free(rows);
}

static void all_or_nothing(const kva_model *model, const golden *golden) {
  kva_session *good = test_session(model, 0), *full = test_session(model, golden->count);
  kva_session *batch[] = {good, full};
  OK(kva_session_prefill(good, golden->tokens, golden->count, NULL, 0));
  OK(kva_session_prefill(full, golden->tokens, golden->count, NULL, 0));
  uint32_t tokens[] = {golden->greedy[0], golden->greedy[0]};
  float logits[2 * TEST_VOCABULARY];
  logits[0] = 77;

  FAILS(kva_batch_decode(batch, tokens, 2, logits, COUNT(logits)), KVA_ERROR_CAPACITY, "sessions[1]");
  OK(kva_session_truncate(full, 1));
  OK(kva_session_decode(full, 5, NULL, 0));
  tokens[1] = TEST_VOCABULARY;
  FAILS(kva_batch_decode(batch, tokens, 2, logits, COUNT(logits)), KVA_ERROR_INVALID_ARGUMENT, "sessions[1]");
  tokens[1] = 5;
  FAILS(kva_batch_decode(batch, tokens, 2, logits, TEST_VOCABULARY), KVA_ERROR_INVALID_ARGUMENT, "640");
  kva_session_cancel(full);
  FAILS(kva_batch_decode(batch, tokens, 2, logits, COUNT(logits)), KVA_ERROR_CANCELLED, "");

  kva_model *other_model = test_model();
  kva_session *other = test_session(other_model, 0);
  kva_session *mixed[] = {good, other};
  FAILS(kva_batch_decode(mixed, tokens, 2, logits, COUNT(logits)), KVA_ERROR_INVALID_ARGUMENT, "another model");
  kva_session_free(other);
  kva_model_free(other_model);

  CHECK(logits[0] == 77 && kva_session_length(good) == golden->count && kva_session_length(full) == 2);
  OK(kva_batch_decode(batch, tokens, 2, logits, COUNT(logits)));
  CHECK(kva_session_length(good) == golden->count + 1 && kva_session_length(full) == 3);
  test_goes_on_as_golden(good, golden, 1, 3);
  kva_session_free(good);
  kva_session_free(full);
}

int main(void) {
  golden golden = golden_read();
  kva_model *model = test_model();
  equals_single_decodes(model, &golden);
  all_or_nothing(model, &golden);
  kva_model_free(model);
  golden_free(&golden);
  return 0;
}
