/* Generation: the text that is streamed, the reasons to stop, and the user data that is freed once. */
#include "support.h"

typedef struct stream {
  char text[4096];
  size_t length;
  uint32_t tokens[512];
  size_t count; /* of calls with a new token */
  size_t session_length;
  kva_session *session;
  size_t stop_after; /* 0: never */
  int freed;
} stream;

static int32_t receive(void *user_data, uint32_t token, const char *text, size_t text_len) {
  stream *stream = user_data;
  CHECK(stream->freed == 0);
  CHECK(text[text_len] == 0 && strlen(text) == text_len && stream->length + text_len < sizeof stream->text);
  memcpy(stream->text + stream->length, text, text_len + 1);
  stream->length += text_len;
  if (kva_session_length(stream->session) != stream->session_length) {
    CHECK(kva_session_length(stream->session) == stream->session_length + 1);
    stream->session_length++;
    stream->tokens[stream->count++] = token;
  } else {
    /* What was held back comes with the last token again. */
    CHECK(text_len > 0 && stream->count > 0 && stream->tokens[stream->count - 1] == token);
  }
  return stream->stop_after && stream->count == stream->stop_after;
}

static void release(void *user_data) { ((stream *)user_data)->freed++; }

static kva_generate_options options_for(stream *stream, kva_session *session, size_t prompt) {
  kva_generate_options options;
  OK(kva_generate_options_init(&options, sizeof options));
  memset(stream, 0, sizeof *stream);
  stream->session = session;
  stream->session_length = kva_session_length(session) + prompt;
  options.callback = receive;
  options.user_data = stream;
  options.free_user_data = release;
  return options;
}

static void greedy(const kva_model *model, const golden *golden) {
  stream stream;
  kva_session *session = test_session(model, 0);
  kva_generate_options options = options_for(&stream, session, golden->count);
  kva_generate_result result = {.struct_size = sizeof result};
  options.max_tokens = golden->greedy_count;
  OK(kva_session_generate(session, golden->tokens, golden->count, &options, &result));
  CHECK(result.finish_reason == KVA_FINISH_LENGTH && result.tokens == golden->greedy_count && result.reserved == 0);
  CHECK(result.last_token == golden->greedy[golden->greedy_count - 1]);
  CHECK(stream.freed == 1 && stream.count == golden->greedy_count);
  CHECK(memcmp(stream.tokens, golden->greedy, golden->greedy_count * sizeof(uint32_t)) == 0);
  CHECK(kva_session_length(session) == golden->count + golden->greedy_count);
  char text[4096];
  size_t length = 0;
  OK(kva_model_detokenize(model, golden->greedy, golden->greedy_count, KVA_DETOKENIZE_SKIP_SPECIAL, text, sizeof text, &length));
  CHECK(length == stream.length && memcmp(text, stream.text, length) == 0);

  /* In two halves, the second with an empty prompt and without a callback. */
  OK(kva_session_truncate(session, 0));
  options = options_for(&stream, session, golden->count);
  options.max_tokens = 4;
  OK(kva_session_generate(session, golden->tokens, golden->count, &options, NULL));
  OK(kva_generate_options_init(&options, sizeof options));
  options.max_tokens = golden->greedy_count - 4;
  OK(kva_session_generate(session, NULL, 0, &options, NULL));
  uint32_t *tokens = test_allocate((golden->count + golden->greedy_count) * sizeof *tokens);
  size_t count = 0;
  OK(kva_session_get_tokens(session, tokens, golden->count + golden->greedy_count, &count));
  CHECK(count == golden->count + golden->greedy_count);
  CHECK(memcmp(tokens + golden->count, golden->greedy, golden->greedy_count * sizeof *tokens) == 0);
  free(tokens);
  kva_session_free(session);
}

static void finish_reasons(const kva_model *model, const golden *golden) {
  stream stream;
  kva_generate_result result = {.struct_size = sizeof result};

  /* The callback stops after 3 tokens. */
  kva_session *session = test_session(model, 0);
  kva_generate_options options = options_for(&stream, session, golden->count);
  stream.stop_after = 3;
  OK(kva_session_generate(session, golden->tokens, golden->count, &options, &result));
  CHECK(result.finish_reason == KVA_FINISH_CALLBACK && result.tokens == 3 && stream.count == 3 && stream.freed == 1);
  CHECK(kva_session_length(session) == golden->count + 3);
  test_goes_on_as_golden(session, golden, 3, 3);

  /* A stop token of the caller's: neither emitted nor kept. */
  OK(kva_session_truncate(session, 0));
  options = options_for(&stream, session, golden->count);
  size_t at = 0; /* the first place of a token that has not come before */
  for (size_t i = 1; i < golden->greedy_count && !at; i++) {
    size_t j = 0;
    while (j < i && golden->greedy[j] != golden->greedy[i]) j++;
    if (j == i) at = i;
  }
  CHECK(at > 0);
  options.stop_tokens = &golden->greedy[at];
  options.stop_token_count = 1;
  OK(kva_session_generate(session, golden->tokens, golden->count, &options, &result));
  CHECK(result.finish_reason == KVA_FINISH_STOP_TOKEN && result.tokens == at && result.last_token == golden->greedy[at]);
  CHECK(stream.count == at && kva_session_length(session) == golden->count + at);
  const uint32_t outside = TEST_VOCABULARY;
  options = options_for(&stream, session, 0);
  options.stop_tokens = &outside;
  options.stop_token_count = 1;
  FAILS(kva_session_generate(session, NULL, 0, &options, NULL), KVA_ERROR_INVALID_ARGUMENT, "320");
  CHECK(stream.freed == 1);
  test_goes_on_as_golden(session, golden, at, 2);

  /* A stop string: the text ends before it. */
  char text[4096];
  size_t length = 0;
  OK(kva_model_detokenize(model, golden->greedy, golden->greedy_count, KVA_DETOKENIZE_SKIP_SPECIAL, text, sizeof text, &length));
  size_t begin = length / 2;
  while (((unsigned char)text[begin] & 0xc0) == 0x80) begin++;
  const char *const stop_strings[] = {"never to be seen", text + begin};
  const char *first = strstr(text, text + begin);
  OK(kva_session_truncate(session, 0));
  options = options_for(&stream, session, golden->count);
  options.stop_strings = stop_strings;
  options.stop_string_count = 2;
  options.max_tokens = golden->greedy_count;
  OK(kva_session_generate(session, golden->tokens, golden->count, &options, &result));
  CHECK(result.finish_reason == KVA_FINISH_STOP_STRING);
  CHECK(stream.length == (size_t)(first - text) && memcmp(stream.text, text, stream.length) == 0);
  const char *const broken[] = {NULL};
  options = options_for(&stream, session, 0);
  options.stop_strings = broken;
  options.stop_string_count = 1;
  FAILS(kva_session_generate(session, NULL, 0, &options, NULL), KVA_ERROR_INVALID_ARGUMENT, "options.stop_strings[0]");
  CHECK(stream.freed == 1);
  kva_session_free(session);

  /* The session is full. */
  session = test_session(model, golden->count + 5);
  options = options_for(&stream, session, golden->count);
  OK(kva_session_generate(session, golden->tokens, golden->count, &options, &result));
  CHECK(result.finish_reason == KVA_FINISH_CONTEXT && result.tokens == 5);
  options = options_for(&stream, session, 1);
  FAILS(kva_session_generate(session, golden->tokens, 1, &options, NULL), KVA_ERROR_CAPACITY, "");
  CHECK(stream.freed == 1 && stream.count == 0);
  kva_session_free(session);
}

/* The same seed gives the same tokens; another seed others. */
static void seeds(const kva_model *model, const golden *golden) {
  uint32_t tokens[3][24];
  for (size_t i = 0; i < 3; i++) {
    stream stream;
    kva_session *session = test_session(model, 0);
    kva_sampling_options sampling;
    OK(kva_sampling_options_init(&sampling, sizeof sampling));
    sampling.temperature = 1.5f;
    sampling.seed = i < 2 ? 1 : 2;
    kva_generate_options options = options_for(&stream, session, golden->count);
    options.sampling = &sampling;
    options.ignore_stop_tokens = 1;
    options.max_tokens = 24;
    OK(kva_session_generate(session, golden->tokens, golden->count, &options, NULL));
    memcpy(tokens[i], stream.tokens, sizeof tokens[i]);
    kva_session_free(session);
  }
  CHECK(memcmp(tokens[0], tokens[1], sizeof tokens[0]) == 0);
  CHECK(memcmp(tokens[0], tokens[2], sizeof tokens[0]) != 0);
}

/* Sampling one token at a time: biases are applied, and sampling changes nothing. */
static void biases(const kva_model *model, const golden *golden) {
  kva_session *session = test_session(model, 0);
  kva_sampling_options sampling;
  OK(kva_sampling_options_init(&sampling, sizeof sampling));
  OK(kva_session_prefill(session, golden->tokens, golden->count, NULL, 0));
  const kva_logit_bias wanted = {123, 1000}, forbidden = {golden->greedy[0], -1000};
  uint32_t token = KVA_TOKEN_NONE;
  sampling.logit_bias_count = 1;
  sampling.logit_bias = &wanted;
  OK(kva_session_sample(session, &sampling, &token));
  CHECK(token == 123);
  sampling.logit_bias = &forbidden;
  OK(kva_session_sample(session, &sampling, &token));
  CHECK(token != golden->greedy[0] && token != 123);
  test_goes_on_as_golden(session, golden, 0, 3);
  kva_session_free(session);
}

int main(void) {
  golden golden = golden_read();
  kva_model *model = test_model();
  greedy(model, &golden);
  finish_reasons(model, &golden);
  seeds(model, &golden);
  biases(model, &golden);
  kva_model_free(model);
  golden_free(&golden);
  return 0;
}
