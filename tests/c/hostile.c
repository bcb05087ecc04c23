/* Mutilated checkpoints: each of them is an error or a model, never a crash. */
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include "support.h"

static char folder[] = "/tmp/kvahead-hostile-XXXXXX";

static const char *in_folder(const char *name) {
  static char path[512];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

static void write_file(const char *name, const void *bytes, size_t length) {
  FILE *file = fopen(in_folder(name), "wb");
  CHECK(file);
  CHECK(fwrite(bytes, 1, length, file) == length);
  CHECK(fclose(file) == 0);
}

/* splitmix64: the same corpus every time. */
static uint64_t state = 20240601;
static uint64_t draw(void) {
  uint64_t z = (state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

static unsigned loaded, refused;

/* Loads what is there, and uses it where that works: a damaged weight is a number like any other. */
static void load(const char *path) {
  kva_model *model = NULL;
  kva_error *error = kva_model_load(path, NULL, &model);
  if (error) {
    CHECK(model == NULL && strlen(kva_error_message(error)) > 0);
    if (kva_error_code(error) == KVA_ERROR_INTERNAL) test_fail(path, 0, kva_error_message(error));
    kva_error_free(error);
    refused++;
    return;
  }
  loaded++;
  kva_session_options options;
  kva_session *session = NULL;
  OK(kva_session_options_init(&options, sizeof options));
  options.capacity = 8;
  error = kva_session_create(model, &options, &session);
  if (!error) {
    const uint32_t tokens[] = {5, 6, 7};
    kva_generate_options generate;
    OK(kva_generate_options_init(&generate, sizeof generate));
    generate.max_tokens = 2;
    error = kva_session_generate(session, tokens, 3, &generate, NULL);
    if (error) CHECK(kva_error_code(error) != KVA_ERROR_INTERNAL);
  }
  kva_error_free(error);
  size_t count = 0;
  kva_error_free(kva_model_tokenize(model, "It was <|im_end|>", 17, 3, NULL, 0, &count));
  const kva_chat_message message = {"user", "hi"};
  kva_error_free(kva_model_apply_chat_template(model, &message, 1, 1, NULL, 0, &count));
  kva_session_free(session);
  kva_model_free(model);
}

/* Truncates, flips and overwrites one file; `target` is what is loaded. `dense` is how much of its beginning holds structure rather than weights. */
static void mutilate(const char *source, const char *name, const char *target, size_t dense, unsigned variants) {
  size_t length = 0;
  unsigned char *bytes = test_read_file(source, &length), *copy = test_allocate(length + 64);
  if (dense > length) dense = length;
  write_file(name, bytes, length);
  const unsigned before = loaded;
  load(target);
  if (loaded != before + 1) test_fail(source, 0, "does not load unharmed");

  static const size_t lengths[] = {0, 1, 3, 4, 7, 8, 9, 15, 16, 23, 24, 25};
  for (size_t i = 0; i < COUNT(lengths) && lengths[i] < length; i++) {
    write_file(name, bytes, lengths[i]);
    load(target);
  }
  for (unsigned i = 0; i < variants; i++) {
    write_file(name, bytes, draw() % (i % 2 ? dense : length));
    load(target);
  }
  for (unsigned i = 0; i < 3 * variants; i++) {
    memcpy(copy, bytes, length);
    for (uint64_t flips = 1 + draw() % (i % 3 ? 2 : 16); flips; flips--) {
      copy[draw() % dense] ^= (unsigned char)(1u << draw() % 8);
    }
    write_file(name, copy, length);
    load(target);
  }
  /* Numbers that overflow where they are believed. */
  for (unsigned i = 0; i < variants; i++) {
    static const uint64_t numbers[] = {0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 0x7fffffffffffffff, 0x8000000000000000, UINT64_MAX};
    memcpy(copy, bytes, length);
    const uint64_t number = numbers[draw() % COUNT(numbers)];
    const size_t at = dense > 8 ? draw() % (dense - 8) : 0;
    memcpy(copy + at, &number, sizeof number < length - at ? sizeof number : length - at);
    write_file(name, copy, length);
    load(target);
  }
  /* More than there should be. */
  memcpy(copy, bytes, length);
  memset(copy + length, 0xff, 64);
  write_file(name, copy, length + 64);
  load(target);
  write_file(name, bytes, length);
  free(copy);
  free(bytes);
}

static void copy_file(const char *name) {
  char source[512];
  size_t length = 0;
  snprintf(source, sizeof source, "%s/%s", TEST_MODEL, name);
  unsigned char *bytes = test_read_file(source, &length);
  write_file(name, bytes, length);
  free(bytes);
}

static size_t safetensors_header(const char *path) {
  size_t length = 0;
  unsigned char *bytes = test_read_file(path, &length);
  uint64_t header;
  memcpy(&header, bytes, sizeof header);
  free(bytes);
  return (size_t)header + 8;
}

/* Files that are well formed and lie. */
static void lies(void) {
  static const char *const configs[] = {
      "", "null", "[]", "{}", "{\"model_type\":\"llama\"}", "{\"architectures\":[\"LlamaForCausalLM\"]}",
      "{\"model_type\":\"llama\",\"hidden_size\":-1}", "{\"model_type\":\"llama\",\"hidden_size\":1e300}",
      "{\"model_type\":\"unheard-of\",\"architectures\":[\"UnheardOfForCausalLM\"]}",
  };
  for (size_t i = 0; i < COUNT(configs); i++) {
    write_file("config.json", configs[i], strlen(configs[i]));
    const unsigned before = loaded;
    load(folder);
    CHECK(loaded == before);
  }
  /* Absurd numbers in place of the real ones, one at a time. */
  size_t length = 0;
  char *config = (char *)test_read_file(TEST_MODEL "/config.json", &length);
  config = realloc(config, length + 1);
  CHECK(config);
  config[length] = 0;
  static const char *const keys[] = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
                                     "num_key_value_heads", "vocab_size", "head_dim", "max_position_embeddings"};
  static const char *const values[] = {"0", "-1", "1", "7", "4294967296", "9223372036854775807", "18446744073709551615", "1e99", "null", "\"72\""};
  for (size_t i = 0; i < COUNT(keys); i++) {
    for (size_t j = 0; j < COUNT(values); j++) {
      char key[64], changed[4096];
      snprintf(key, sizeof key, "\"%s\":", keys[i]);
      const char *at = strstr(config, key);
      CHECK(at);
      const char *value = at + strlen(key), *rest = value + strcspn(value, ",}");
      const int written = snprintf(changed, sizeof changed, "%.*s %s%s", (int)(value - config), config, values[j], rest);
      CHECK(written > 0 && (size_t)written < sizeof changed);
      write_file("config.json", changed, (size_t)written);
      load(folder);
    }
  }
  write_file("config.json", config, length);
  free(config);

  /* An index that points outside the folder, or at nothing. */
  CHECK(unlink(in_folder("model.safetensors")) == 0);
  const unsigned before = loaded;
  load(folder);
  static const char *const indexes[] = {
      "{\"weight_map\":{\"model.embed_tokens.weight\":\"../../etc/passwd\"}}",
      "{\"weight_map\":{\"model.embed_tokens.weight\":\"/etc/passwd\"}}",
      "{\"weight_map\":{\"model.embed_tokens.weight\":\"missing.safetensors\"}}",
      "{\"weight_map\":{\"model.embed_tokens.weight\":\".\"}}",
      "{\"weight_map\":{}}",
      "{\"weight_map\":7}",
      "{",
  };
  for (size_t i = 0; i < COUNT(indexes); i++) {
    write_file("model.safetensors.index.json", indexes[i], strlen(indexes[i]));
    load(folder);
  }
  CHECK(unlink(in_folder("model.safetensors.index.json")) == 0);
  CHECK(loaded == before);
  copy_file("model.safetensors");
}

static void not_files(void) {
  kva_model *model = NULL;
  FAILS(kva_model_load("/nowhere/at/all", NULL, &model), KVA_ERROR_NOT_FOUND, "/nowhere/at/all");
  static const char *const odd[] = {"/", "/dev", "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/environ"};
  for (size_t i = 0; i < COUNT(odd); i++) {
    kva_error *error = kva_model_load(odd[i], NULL, &model);
    CHECK(error && model == NULL && kva_error_code(error) != KVA_ERROR_INTERNAL);
    kva_error_free(error);
  }
}

int main(void) {
  const unsigned variants = test_quick() ? 1 : 20;
  CHECK(mkdtemp(folder));
  static const char *const files[] = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"};
  for (size_t i = 0; i < COUNT(files); i++) copy_file(files[i]);
  for (size_t i = 0; i < COUNT(files); i++) {
    char source[512];
    snprintf(source, sizeof source, "%s/%s", TEST_MODEL, files[i]);
    const size_t dense = strcmp(files[i], "model.safetensors") == 0 ? safetensors_header(source) : SIZE_MAX;
    mutilate(source, files[i], folder, dense, variants);
  }
  lies();
  char gguf[512];
  snprintf(gguf, sizeof gguf, "%s", in_folder("model.gguf"));
  mutilate(KVAHEAD_TEST_DATA "/gguf/smollm2.gguf", "model.gguf", gguf, 16384, 2 * variants);
  mutilate(KVAHEAD_TEST_DATA "/gguf/qwen2.v2.gguf", "model.gguf", gguf, 512, variants);
  not_files();
  for (size_t i = 0; i < COUNT(files); i++) CHECK(unlink(in_folder(files[i])) == 0);
  CHECK(unlink(gguf) == 0 && rmdir(folder) == 0);
  printf("%u loaded, %u refused\n", loaded, refused);
  return 0;
}
