// A test is a function with a name; a failed check ends it and names its line.

#pragma once

#include <kvahead.hpp>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace test {

struct Case {
  const char* name;
  void (*body)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

inline const std::string model_path = KVAHEAD_TEST_DATA "/golden/smollm2";
constexpr std::size_t vocabulary = 320;
constexpr std::size_t context = 512;

/// The tiny model in f32, loaded once.
const kva::Model& model();

/// Greedy tokens after a prompt, one decode at a time.
std::vector<std::uint32_t> greedy(kva::Session& session, kva::Tokens prompt, std::size_t count);

const std::vector<std::uint32_t> prompt = {1, 42, 7, 99, 300, 5, 5, 18};

}  // namespace test

#define TEST(name)                                       \
  static void name();                                    \
  static const test::Register register_##name(#name, name); \
  static void name()

#define CHECK(condition) \
  if (!(condition)) test::fail(__FILE__, __LINE__, #condition)

/// `result` is an error of this code, whose message holds this text.
#define FAILS(result, expected, text)                                                                        \
  do {                                                                                                       \
    const auto& result_ = (result);                                                                          \
    if (result_.ok()) test::fail(__FILE__, __LINE__, #result " is no error");                                \
    if (result_.error().code() != kva::ErrorCode::expected) test::fail(__FILE__, __LINE__, result_.error().message()); \
    if (result_.error().message().find(text) == std::string::npos) test::fail(__FILE__, __LINE__, result_.error().message()); \
  } while (false)
