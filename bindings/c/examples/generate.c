/* Continues a text with the likeliest tokens: loads a model, prefills the text, decodes token by token.
 *
 *   cc -std=c11 generate.c -lkvahead -o generate && ./generate MODEL "Once upon a time" 50
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <kvahead.h>

/* Ends the program where `error` is one; the message says what was wrong. */
static void check(kva_error *error) {
  if (!error) return;
  fprintf(stderr, "error %d: %s\n", (int)kva_error_code(error), kva_error_message(error));
  kva_error_free(error);
  exit(1);
}

int main(int argc, char **argv) {
  if (argc < 3 || argc > 4) {
    fprintf(stderr, "usage: %s MODEL TEXT [TOKENS]\n", argv[0]);
    return 2;
  }
  const char *text = argv[2];
  const long limit = argc == 4 ? strtol(argv[3], NULL, 10) : 50;

  kva_model *model = NULL;
  check(kva_model_load(argv[1], NULL, &model));

  /* The first call counts the tokens, the second writes them. */
  size_t count = 0;
  check(kva_model_tokenize(model, text, strlen(text), KVA_TOKENIZE_ADD_SPECIAL, NULL, 0, &count));
  uint32_t *tokens = malloc((count + 1) * sizeof *tokens);
  if (!tokens) return 1;
  check(kva_model_tokenize(model, text, strlen(text), KVA_TOKENIZE_ADD_SPECIAL, tokens, count, &count));

  size_t stop_count = 0;
  check(kva_model_get_stop_tokens(model, NULL, 0, &stop_count));
  uint32_t *stop = malloc((stop_count + 1) * sizeof *stop);
  if (!stop) return 1;
  check(kva_model_get_stop_tokens(model, stop, stop_count, &stop_count));

  /* Prefill computes the logits after the text; sample picks a token from them; decode appends it. */
  kva_session *session = NULL;
  kva_detokenizer *detokenizer = NULL;
  check(kva_session_create(model, NULL, &session));
  check(kva_detokenizer_create(model, KVA_DETOKENIZE_SKIP_SPECIAL, &detokenizer));
  check(kva_session_prefill(session, tokens, count, NULL, 0));
  const char *piece = "";
  size_t piece_len = 0;
  for (long i = 0; i < limit && kva_session_length(session) < kva_session_capacity(session); i++) {
    uint32_t token = 0;
    check(kva_session_sample(session, NULL, &token));
    int stopped = 0;
    for (size_t j = 0; j < stop_count; j++) stopped |= token == stop[j];
    if (stopped) break;
    check(kva_detokenizer_push(detokenizer, token, &piece, &piece_len));
    fwrite(piece, 1, piece_len, stdout);
    fflush(stdout);
    check(kva_session_decode(session, token, NULL, 0));
  }
  check(kva_detokenizer_finish(detokenizer, &piece, &piece_len));
  printf("%.*s\n", (int)piece_len, piece);

  kva_detokenizer_free(detokenizer);
  kva_session_free(session);
  kva_model_free(model);
  free(stop);
  free(tokens);
  return 0;
}
