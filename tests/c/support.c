#include "support.h"

void test_fail(const char *file, int line, const char *what) {
  fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
  exit(1);
}

void test_ok(const char *file, int line, const char *call, kva_error *error) {
  if (!error) return;
  fprintf(stderr, "%s:%d: %s: error %d: %s\n", file, line, call, (int)kva_error_code(error), kva_error_message(error));
  exit(1);
}

void test_fails(const char *file, int line, const char *call, kva_error *error, int32_t code, const char *text) {
  if (!error) {
    fprintf(stderr, "%s:%d: %s: succeeded, but error %d was due\n", file, line, call, (int)code);
    exit(1);
  }
  const char *message = kva_error_message(error);
  if (kva_error_code(error) != code || !*message || !strstr(message, text)) {
    fprintf(stderr, "%s:%d: %s: error %d: %s\n  but error %d with \"%s\" was due\n", file, line, call,
            (int)kva_error_code(error), message, (int)code, text);
    exit(1);
  }
  kva_error_free(error);
}

int test_quick(void) { return getenv("KVAHEAD_TEST_QUICK") != NULL; }

void *test_allocate(size_t bytes) {
  void *memory = malloc(bytes ? bytes : 1);
  CHECK(memory);
  return memory;
}

unsigned char *test_read_file(const char *path, size_t *length) {
  FILE *file = fopen(path, "rb");
  if (!file) test_fail(path, 0, "cannot open");
  CHECK(fseek(file, 0, SEEK_END) == 0);
  const long size = ftell(file);
  CHECK(size >= 0 && fseek(file, 0, SEEK_SET) == 0);
  unsigned char *bytes = test_allocate((size_t)size);
  CHECK(fread(bytes, 1, (size_t)size, file) == (size_t)size);
  fclose(file);
  *length = (size_t)size;
  return bytes;
}

kva_model *test_model(void) {
  kva_model_options options;
  kva_model *model = NULL;
  OK(kva_model_options_init(&options, sizeof options));
  options.dtype = KVA_DTYPE_F32;
  options.threads = 2;
  OK(kva_model_load(TEST_MODEL, &options, &model));
  CHECK(model);
  return model;
}

kva_session *test_session(const kva_model *model, uint64_t capacity) {
  kva_session_options options;
  kva_session *session = NULL;
  OK(kva_session_options_init(&options, sizeof options));
  options.capacity = capacity;
  OK(kva_session_create(model, &options, &session));
  CHECK(session);
  return session;
}

/* The bytes of a tensor in a safetensors file; enough of a reader for the files that our script writes. */
static const unsigned char *tensor(const unsigned char *file, const char *header, const char *name, size_t *bytes) {
  char key[32];
  snprintf(key, sizeof key, "\"%s\":{", name);
  const char *entry = strstr(header, key);
  CHECK(entry);
  const char *offsets = strstr(entry, "\"data_offsets\":[");
  CHECK(offsets);
  unsigned long long begin = 0, end = 0;
  CHECK(sscanf(offsets, "\"data_offsets\":[%llu,%llu]", &begin, &end) == 2 && begin <= end);
  *bytes = (size_t)(end - begin);
  return file + begin;
}

static uint32_t *tokens_of(const unsigned char *bytes, size_t count) {
  uint32_t *tokens = test_allocate(count * sizeof *tokens);
  for (size_t i = 0; i < count; i++) {
    int64_t token;
    memcpy(&token, bytes + i * sizeof token, sizeof token);
    tokens[i] = (uint32_t)token;
  }
  return tokens;
}

golden golden_read(void) {
  size_t length = 0, bytes = 0;
  unsigned char *file = test_read_file(TEST_MODEL "/golden.safetensors", &length);
  uint64_t header_length;
  CHECK(length > sizeof header_length);
  memcpy(&header_length, file, sizeof header_length);
  CHECK(header_length < length - sizeof header_length);
  char *header = test_allocate((size_t)header_length + 1);
  memcpy(header, file + sizeof header_length, (size_t)header_length);
  header[header_length] = 0;
  const unsigned char *data = file + sizeof header_length + header_length;

  golden golden;
  const unsigned char *values = tensor(data, header, "tokens", &bytes);
  golden.count = bytes / 8;
  golden.tokens = tokens_of(values, golden.count);
  values = tensor(data, header, "greedy", &bytes);
  golden.greedy_count = bytes / 8;
  golden.greedy = tokens_of(values, golden.greedy_count);
  values = tensor(data, header, "logits", &bytes);
  CHECK(bytes == golden.count * TEST_VOCABULARY * sizeof(float));
  golden.logits = test_allocate(bytes);
  memcpy(golden.logits, values, bytes);
  free(header);
  free(file);
  return golden;
}

void golden_free(golden *golden) {
  free(golden->tokens);
  free(golden->greedy);
  free(golden->logits);
}

void test_goes_on_as_golden(kva_session *session, const golden *golden, size_t from, size_t count) {
  for (size_t i = from; i < from + count; i++) {
    uint32_t token = KVA_TOKEN_NONE;
    OK(kva_session_sample(session, NULL, &token));
    if (token != golden->greedy[i]) {
      fprintf(stderr, "greedy token %zu is %u, not %u\n", i, (unsigned)token, (unsigned)golden->greedy[i]);
      exit(1);
    }
    OK(kva_session_decode(session, token, NULL, 0));
  }
}

void test_count_free(void *user_data) { ++*(int *)user_data; }
