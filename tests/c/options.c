/* struct_size: too small, too large, from the future; nothing past it is touched. */
#include <stddef.h>

#include "support.h"

/* Sizes of the first version of each struct that has grown since. */
enum {
  FIRST_MODEL = offsetof(kva_model_options, speculation_cache_path),
  FIRST_SESSION = offsetof(kva_session_options, kv_tier),
  FIRST_INFINIGEN = offsetof(kva_infinigen_options, correct),
  FIRST_STATISTICS = offsetof(kva_statistics, kv_steps)
};

/* Room for a struct and for what a later version might append; the tail shows whether anyone wrote there. */
typedef union any_struct {
  kva_model_options model;
  kva_session_options session;
  kva_infinigen_options infinigen;
  kva_sampling_options sampling;
  kva_generate_options generate;
  kva_model_info info;
  kva_estimate estimate;
  kva_statistics statistics;
  kva_generate_result result;
  uint32_t struct_size;
  unsigned char bytes[4096 + 64];
} any_struct;

static int tail_is(const any_struct *room, size_t from, size_t to, unsigned char value) {
  for (size_t i = from; i < to; i++) {
    if (room->bytes[i] != value) return 0;
  }
  return 1;
}

/* `oldest`: size of the struct's first version. */
#define TEST_INIT(init, member, type, oldest) \
  do { \
    static const size_t wrong[] = {0, 3, 4, (oldest) - 1, 4097, UINT32_MAX, SIZE_MAX}; \
    for (size_t i = 0; i < COUNT(wrong); i++) { \
      memset(&room, 0xaa, sizeof room); \
      FAILS(init(&room.member, wrong[i]), KVA_ERROR_INVALID_ARGUMENT, "struct_size"); \
      CHECK(tail_is(&room, 0, sizeof room, 0xaa)); \
    } \
    memset(&room, 0xaa, sizeof room); \
    OK(init(&room.member, sizeof(type))); \
    CHECK(room.struct_size == sizeof(type) && tail_is(&room, sizeof(type), sizeof room, 0xaa)); \
    memset(&room, 0xaa, sizeof room); \
    OK(init(&room.member, oldest)); /* a program compiled with the first header */ \
    CHECK(room.struct_size == (oldest) && tail_is(&room, oldest, sizeof room, 0xaa)); \
    memset(&room, 0xaa, sizeof room); \
    OK(init(&room.member, 4096)); /* a program compiled with a later header */ \
    CHECK(room.struct_size == 4096); \
    CHECK(tail_is(&room, sizeof(type), 4096, 0) && tail_is(&room, 4096, sizeof room, 0xaa)); \
  } while (0)

/* `call` uses `room`, which `prepare` makes good except for its struct_size. */
#define TEST_SIZES(prepare, type, oldest, call) \
  do { \
    static const uint32_t wrong[] = {0, 3, 4, (oldest) - 1, 4097, UINT32_MAX}; \
    for (size_t i = 0; i < COUNT(wrong); i++) { \
      prepare; \
      room.struct_size = wrong[i]; \
      FAILS(call, KVA_ERROR_INVALID_ARGUMENT, "struct_size"); \
    } \
    prepare; \
    room.struct_size = sizeof(type); \
    OK(call); \
  } while (0)

/* For results: a later version's struct is filled with zeros where this library knows nothing. */
#define TEST_RESULT(type, oldest, call) \
  do { \
    TEST_SIZES(memset(&room, 0xaa, sizeof room), type, oldest, call); \
    CHECK(room.struct_size == sizeof(type) && tail_is(&room, sizeof(type), sizeof room, 0xaa)); \
    memset(&room, 0xaa, sizeof room); \
    room.struct_size = oldest; \
    OK(call); \
    CHECK(room.struct_size == (oldest) && tail_is(&room, oldest, sizeof room, 0xaa)); \
    memset(&room, 0xaa, sizeof room); \
    room.struct_size = sizeof(type) + 24; \
    OK(call); \
    CHECK(room.struct_size == sizeof(type) + 24 && tail_is(&room, sizeof(type), sizeof(type) + 24, 0)); \
    CHECK(tail_is(&room, sizeof(type) + 24, sizeof room, 0xaa)); \
  } while (0)

/* For options: what this library does not know must be unset. */
#define TEST_OPTIONS(init, member, type, oldest, call) \
  do { \
    TEST_SIZES(OK(init(&room.member, sizeof(type))), type, oldest, call); \
    memset(&room, 0xff, sizeof room); /* what an older program does not have is not read */ \
    OK(init(&room.member, oldest)); \
    OK(call); \
    OK(init(&room.member, sizeof(type) + 24)); \
    OK(call); \
    room.bytes[sizeof(type) + 17] = 1; \
    FAILS(call, KVA_ERROR_UNSUPPORTED, #type); \
  } while (0)

static any_struct room;

static kva_error *load(void) {
  kva_model *model = NULL;
  kva_error *error = kva_model_load(TEST_MODEL, &room.model, &model);
  CHECK(!error == !!model);
  kva_model_free(model);
  return error;
}

static kva_error *create(const kva_model *model) {
  kva_session *session = NULL;
  kva_error *error = kva_session_create(model, &room.session, &session);
  CHECK(!error == !!session);
  kva_session_free(session);
  return error;
}

static kva_error *sample(kva_session *session) {
  uint32_t token = KVA_TOKEN_NONE;
  kva_error *error = kva_session_sample(session, &room.sampling, &token);
  CHECK(!error == (token != KVA_TOKEN_NONE));
  return error;
}

static kva_error *generate(kva_session *session) {
  const uint32_t prompt[] = {5, 6};
  OK(kva_session_truncate(session, 0));
  kva_error *error = kva_session_generate(session, prompt, 2, &room.generate, NULL);
  CHECK(!error == (kva_session_length(session) != 0));
  return error;
}

static kva_error *generate_result(kva_session *session) {
  kva_generate_options options;
  OK(kva_generate_options_init(&options, sizeof options));
  options.max_tokens = 2;
  const uint32_t prompt[] = {5, 6};
  OK(kva_session_truncate(session, 0));
  kva_error *error = kva_session_generate(session, prompt, 2, &options, &room.result);
  CHECK(!error == (kva_session_length(session) != 0));
  return error;
}

static kva_error *infinigen_init(kva_infinigen_options *options, size_t size) {
  return kva_infinigen_options_init(options, size, KVA_INFINIGEN_PAPER);
}

/* The settings lie in `room`; the policy does not use them, but they are looked at. */
static kva_error *create_with_infinigen(const kva_model *model) {
  kva_session_options options;
  kva_session *session = NULL;
  OK(kva_session_options_init(&options, sizeof options));
  options.infinigen = &room.infinigen;
  kva_error *error = kva_session_create(model, &options, &session);
  CHECK(!error == !!session);
  kva_session_free(session);
  return error;
}

static void nested_sampling_options(kva_session *session) {
  kva_sampling_options sampling;
  kva_generate_options options;
  const uint32_t prompt[] = {5, 6};
  OK(kva_sampling_options_init(&sampling, sizeof sampling));
  OK(kva_generate_options_init(&options, sizeof options));
  OK(kva_session_truncate(session, 0));
  sampling.struct_size = 4;
  options.sampling = &sampling;
  FAILS(kva_session_generate(session, prompt, 2, &options, NULL), KVA_ERROR_INVALID_ARGUMENT, "options.sampling");
}

int main(void) {
  TEST_INIT(kva_model_options_init, model, kva_model_options, FIRST_MODEL);
  TEST_INIT(kva_session_options_init, session, kva_session_options, FIRST_SESSION);
  TEST_INIT(infinigen_init, infinigen, kva_infinigen_options, FIRST_INFINIGEN);
  TEST_INIT(kva_sampling_options_init, sampling, kva_sampling_options, sizeof(kva_sampling_options));
  TEST_INIT(kva_generate_options_init, generate, kva_generate_options, sizeof(kva_generate_options));

  kva_model *model = test_model();
  kva_session *session = test_session(model, 16);
  const uint32_t token = 5;
  OK(kva_session_prefill(session, &token, 1, NULL, 0));
  TEST_OPTIONS(kva_model_options_init, model, kva_model_options, FIRST_MODEL, load());
  TEST_OPTIONS(kva_session_options_init, session, kva_session_options, FIRST_SESSION, create(model));
  TEST_OPTIONS(infinigen_init, infinigen, kva_infinigen_options, FIRST_INFINIGEN, create_with_infinigen(model));
  TEST_OPTIONS(kva_sampling_options_init, sampling, kva_sampling_options, sizeof(kva_sampling_options), sample(session));
  TEST_OPTIONS(kva_generate_options_init, generate, kva_generate_options, sizeof(kva_generate_options),
               generate(session));
  TEST_RESULT(kva_model_info, offsetof(kva_model_info, weight_storage), kva_model_get_info(model, &room.info));
  TEST_RESULT(kva_estimate, offsetof(kva_estimate, scratch_pinned_bytes), kva_model_estimate(model, NULL, 1, &room.estimate));
  TEST_RESULT(kva_statistics, FIRST_STATISTICS, kva_session_get_statistics(session, &room.statistics));
  TEST_RESULT(kva_generate_result, sizeof(kva_generate_result), generate_result(session));
  nested_sampling_options(session);
  kva_session_free(session);
  kva_model_free(model);
  return 0;
}
