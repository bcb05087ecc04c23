/* What the C tests share: checks that name the line, and the golden checkpoints. */
#ifndef KVAHEAD_TEST_SUPPORT_H
#define KVAHEAD_TEST_SUPPORT_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <kvahead.h>

#define CHECK(condition) \
  do { \
    if (!(condition)) test_fail(__FILE__, __LINE__, #condition); \
  } while (0)

/* The call succeeds. */
#define OK(call) test_ok(__FILE__, __LINE__, #call, (call))

/* The call fails with this code, and a message that contains this text (which may be ""). */
#define FAILS(call, code, text) test_fails(__FILE__, __LINE__, #call, (call), (code), (text))

#define COUNT(array) (sizeof(array) / sizeof *(array))

_Noreturn void test_fail(const char *file, int line, const char *what);
void test_ok(const char *file, int line, const char *call, kva_error *error);
void test_fails(const char *file, int line, const char *call, kva_error *error, int32_t code, const char *text);

/* Whether this is a run under valgrind, which is to be short. */
int test_quick(void);

/* malloc that cannot fail. */
void *test_allocate(size_t bytes);

/* A whole file; freed by the caller. */
unsigned char *test_read_file(const char *path, size_t *length);

/* The small model that most tests use, in f32, on two threads. */
#define TEST_MODEL KVAHEAD_TEST_DATA "/golden/smollm2"
enum { TEST_VOCABULARY = 320, TEST_CONTEXT = 512 };
kva_model *test_model(void);
kva_session *test_session(const kva_model *model, uint64_t capacity);

/* What Hugging Face transformers computed: tokens, the logits after each of them, and the greedy continuation. */
typedef struct golden {
  size_t count;       /* tokens */
  size_t greedy_count;
  uint32_t *tokens;
  uint32_t *greedy;
  float *logits;      /* count x TEST_VOCABULARY */
} golden;
golden golden_read(void);
void golden_free(golden *golden);

/* Decodes greedily and checks that the tokens from `from` on are the golden ones. */
void test_goes_on_as_golden(kva_session *session, const golden *golden, size_t from, size_t count);

/* Counts its calls in an `int`. */
void test_count_free(void *user_data);

#endif
