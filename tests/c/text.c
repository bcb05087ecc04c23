/* Text to tokens and back, whole and one token at a time; the chat template. */
#include "support.h"

static const char sample[] = "It was a \xe2\x80\x9ctruth\xe2\x80\x9d, na\xc3\xafvely \xf0\x9f\x99\x82 told.";

static void round_trip(const kva_model *model) {
  uint32_t tokens[128];
  char text[256];
  size_t count = 0, again = 77, text_len = 0;
  OK(kva_model_tokenize(model, sample, sizeof sample - 1, 0, NULL, 0, &count));
  CHECK(count > 3 && count < COUNT(tokens));
  char needed[32];
  snprintf(needed, sizeof needed, "%zu are needed", count);
  memset(tokens, 0xaa, sizeof tokens);
  FAILS(kva_model_tokenize(model, sample, sizeof sample - 1, 0, tokens, count - 1, &again), KVA_ERROR_INVALID_ARGUMENT, needed);
  CHECK(again == 77 && tokens[0] == 0xaaaaaaaa);
  OK(kva_model_tokenize(model, sample, sizeof sample - 1, 0, tokens, COUNT(tokens), &again));
  CHECK(again == count && tokens[count] == 0xaaaaaaaa);

  OK(kva_model_detokenize(model, tokens, count, 0, NULL, 0, &text_len));
  CHECK(text_len == sizeof sample - 1);
  memset(text, 'x', sizeof text);
  FAILS(kva_model_detokenize(model, tokens, count, 0, text, text_len, &again), KVA_ERROR_INVALID_ARGUMENT, "needed");
  CHECK(text[0] == 'x' && again == count);
  OK(kva_model_detokenize(model, tokens, count, 0, text, text_len + 1, &text_len));
  CHECK(strcmp(text, sample) == 0 && text[sizeof sample] == 'x');
  const uint32_t outside = 5000;
  FAILS(kva_model_detokenize(model, &outside, 1, 0, text, sizeof text, &text_len), KVA_ERROR_INVALID_ARGUMENT, "5000");

  /* One at a time: whole characters, together the same text. */
  kva_detokenizer *detokenizer = NULL;
  OK(kva_detokenizer_create(model, 0, &detokenizer));
  for (int round = 0; round < 2; round++) {
    size_t at = 0, length = 0;
    const char *piece = NULL;
    for (size_t i = 0; i < count; i++) {
      OK(kva_detokenizer_push(detokenizer, tokens[i], &piece, &length));
      CHECK(piece[length] == 0 && strlen(piece) == length);
      CHECK(length == 0 || ((unsigned char)piece[0] & 0xc0) != 0x80);
      CHECK(at + length < sizeof sample);
      CHECK(memcmp(sample + at, piece, length) == 0);
      at += length;
    }
    CHECK(at == sizeof sample - 1);
    OK(kva_detokenizer_finish(detokenizer, &piece, &length));
    CHECK(length == 0 && piece[0] == 0);
  }
  kva_detokenizer_free(detokenizer);

  OK(kva_model_tokenize(model, NULL, 0, 0, NULL, 0, &count));
  CHECK(count == 0);
  OK(kva_model_detokenize(model, NULL, 0, 0, text, 1, &text_len));
  CHECK(text_len == 0 && text[0] == 0);
}

static void special_tokens(const kva_model *model) {
  static const char text[] = "<|im_end|>";
  uint32_t token[16];
  size_t count = 0, length = 0;
  char back[64];
  OK(kva_model_tokenize(model, text, sizeof text - 1, 0, token, COUNT(token), &count));
  CHECK(count > 1);
  OK(kva_model_tokenize(model, text, sizeof text - 1, KVA_TOKENIZE_PARSE_SPECIAL, token, COUNT(token), &count));
  CHECK(count == 1 && token[0] == 2);
  OK(kva_model_detokenize(model, token, 1, 0, back, sizeof back, &length));
  CHECK(strcmp(back, text) == 0);
  OK(kva_model_detokenize(model, token, 1, KVA_DETOKENIZE_SKIP_SPECIAL, back, sizeof back, &length));
  CHECK(length == 0 && back[0] == 0);
  uint32_t stop[8];
  OK(kva_model_get_stop_tokens(model, stop, COUNT(stop), &count));
  int found = 0;
  for (size_t i = 0; i < count; i++) found |= stop[i] == 2;
  CHECK(found);
  FAILS(kva_model_get_stop_tokens(model, stop, 0, &count), KVA_ERROR_INVALID_ARGUMENT, "needed");
}

static void chat(const kva_model *model) {
  static const kva_chat_message messages[] = {{"system", "Be brief."}, {"user", "Who is Emma?"}};
  char text[512];
  size_t length = 0, with_prompt = 0;
  OK(kva_model_apply_chat_template(model, messages, COUNT(messages), 0, text, sizeof text, &length));
  CHECK(strlen(text) == length && strstr(text, "Be brief.") && strstr(text, "Who is Emma?"));
  OK(kva_model_apply_chat_template(model, messages, COUNT(messages), 1, NULL, 0, &with_prompt));
  CHECK(with_prompt > length);
  FAILS(kva_model_apply_chat_template(model, messages, COUNT(messages), 0, text, length, &with_prompt),
        KVA_ERROR_INVALID_ARGUMENT, "needed");
}

/* A model without a tokenizer says so, and works with tokens all the same. */
static void without_tokenizer(void) {
  kva_model *model = NULL;
  OK(kva_model_load(KVAHEAD_TEST_DATA "/golden/llama-mha", NULL, &model));
  kva_model_info info = {.struct_size = sizeof info};
  OK(kva_model_get_info(model, &info));
  CHECK(info.has_tokenizer == 0 && info.has_chat_template == 0);
  size_t count = 0;
  const uint32_t token = 5;
  const kva_chat_message message = {"user", "hi"};
  kva_detokenizer *detokenizer = NULL;
  FAILS(kva_model_tokenize(model, "a", 1, 0, NULL, 0, &count), KVA_ERROR_UNSUPPORTED, "tokenizer");
  FAILS(kva_model_detokenize(model, &token, 1, 0, NULL, 0, &count), KVA_ERROR_UNSUPPORTED, "tokenizer");
  FAILS(kva_model_apply_chat_template(model, &message, 1, 1, NULL, 0, &count), KVA_ERROR_UNSUPPORTED, "");
  FAILS(kva_detokenizer_create(model, 0, &detokenizer), KVA_ERROR_UNSUPPORTED, "tokenizer");

  kva_session *session = test_session(model, 16);
  kva_generate_options options;
  kva_generate_result result = {.struct_size = sizeof result};
  OK(kva_generate_options_init(&options, sizeof options));
  options.max_tokens = 3;
  options.ignore_stop_tokens = 1;
  OK(kva_session_generate(session, &token, 1, &options, &result));
  CHECK(result.finish_reason == KVA_FINISH_LENGTH && result.tokens == 3 && kva_session_length(session) == 4);
  static const char *const stop[] = {"x"};
  options.stop_strings = stop;
  options.stop_string_count = 1;
  FAILS(kva_session_generate(session, &token, 1, &options, &result), KVA_ERROR_UNSUPPORTED, "tokenizer");
  CHECK(kva_session_length(session) == 4);
  kva_session_free(session);
  kva_model_free(model);
}

int main(void) {
  kva_model *model = test_model();
  round_trip(model);
  special_tokens(model);
  chat(model);
  kva_model_free(model);
  without_tokenizer();
  return 0;
}
