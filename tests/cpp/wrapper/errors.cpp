// Result, Exception, and how errors of the library come through.
#include <array>

#include "test.hpp"

TEST(a_value_throws_where_there_is_none) {
  bool thrown = false;
  try {
    static_cast<void>(kva::Model::load("/nowhere/model").value());
  } catch (const kva::Exception& error) {
    thrown = true;
    CHECK(error.code() == kva::ErrorCode::not_found);
    CHECK(std::string(error.what()).find("/nowhere/model") != std::string::npos);
    CHECK(error.error().message() == error.what());
  }
  CHECK(thrown);
}

TEST(unwrap_gives_values_and_throws) {
  const auto tokens = kva::unwrap(test::model().tokenize("Hello"));
  CHECK(!tokens.empty());
  kva::Session session = kva::unwrap(kva::Session::create(test::model()));
  kva::unwrap(session.prefill(tokens));
  bool thrown = false;
  try {
    kva::unwrap(session.truncate(1000));
  } catch (const kva::Exception& error) {
    thrown = error.code() == kva::ErrorCode::invalid_argument;
  }
  CHECK(thrown);
}

TEST(a_result_is_its_value_or_its_error) {
  kva::Result<std::string> value(std::string("text"));
  CHECK(value && value.ok() && *value == "text" && value->size() == 4 && value.value() == "text");
  CHECK(std::move(value).value_or("other") == "text");
  kva::Result<std::string> error(kva::Error(kva::ErrorCode::io, "disk"));
  CHECK(!error && error.error().code() == kva::ErrorCode::io && error.error().message() == "disk");
  CHECK(std::move(error).value_or("other") == "other");
  CHECK(kva::Result<void>().ok());
}

TEST(errors_name_what_is_wrong) {
  kva::Session session = kva::Session::create(test::model()).value();
  FAILS(session.prefill(std::vector<std::uint32_t>{1, 320}), invalid_argument, "320");
  FAILS(session.sample(), invalid_argument, "");
  FAILS(session.truncate(1), invalid_argument, "");
  kva::SessionOptions options;
  options.capacity = test::context + 1;
  FAILS(kva::Session::create(test::model(), options), invalid_argument, "513");
  options.capacity = 4;
  session = kva::Session::create(test::model(), options).value();
  FAILS(session.prefill(test::prompt), capacity, "");
  CHECK(session.length() == 0);
  kva::SamplingOptions sampling;
  sampling.temperature = -1;
  CHECK(session.prefill(std::vector<std::uint32_t>{1}));
  FAILS(session.sample(sampling), invalid_argument, "temperature");
}

TEST(text_that_c_would_cut_short_is_refused) {
  using namespace std::string_literals;
  FAILS(kva::Model::load("a\0b"s), invalid_argument, "path");
  FAILS(kva::Model::random("a\0b"s, 1), invalid_argument, "shape");
  FAILS(test::model().apply_chat_template({{"user", "a\0b"s}}), invalid_argument, "content");
  kva::Session session = kva::Session::create(test::model()).value();
  kva::GenerateOptions options;
  options.stop_strings = {"a\0b"s};
  FAILS(session.generate(test::prompt, options), invalid_argument, "stop string");
}

TEST(views_come_from_what_holds_elements) {
  std::array<std::uint32_t, 3> array = {1, 2, 3};
  const std::uint32_t plain[] = {1, 2, 3};
  const std::vector<std::uint32_t> vector = {1, 2, 3};
  for (const kva::Tokens view : {kva::Tokens(array), kva::Tokens(plain), kva::Tokens(vector), kva::Tokens(plain, 3)}) {
    CHECK(view.size() == 3 && view[0] == 1 && *(view.end() - 1) == 3);
  }
  CHECK(kva::Tokens().size() == 0 && kva::Tokens().data() == nullptr);
}
