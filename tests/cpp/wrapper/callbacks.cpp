// Callbacks, exceptions in them, cancellation.
#include <atomic>
#include <thread>

#include "test.hpp"

namespace {

struct Own {
  int value;
};

kva::GenerateOptions endless() {
  kva::GenerateOptions options;
  options.ignore_model_stop_tokens = true;
  return options;
}

}  // namespace

TEST(an_exception_in_a_text_callback_reaches_the_caller) {
  kva::Session session = kva::Session::create(test::model()).value();
  int calls = 0;
  int caught = 0;
  try {
    static_cast<void>(session.generate(test::prompt, endless(), [&](std::uint32_t, std::string_view) -> kva::Flow {
      if (++calls == 3) throw Own{42};
      return kva::Flow::proceed;
    }));
  } catch (const Own& own) {
    caught = own.value;
  }
  CHECK(caught == 42 && calls == 3);
  CHECK(session.length() == test::prompt.size() + 3);  // what was emitted stays
  CHECK(session.decode(1));
}

TEST(an_exception_in_a_progress_callback_reaches_the_caller) {
  kva::ModelOptions options;
  options.progress = [](float) -> kva::Flow { throw Own{7}; };
  int caught = 0;
  try {
    static_cast<void>(kva::Model::load(test::model_path, options));
  } catch (const Own& own) {
    caught = own.value;
  }
  CHECK(caught == 7);
}

TEST(progress_rises_to_one_and_can_stop) {
  kva::ModelOptions options;
  float last = 0;
  bool rising = true;
  options.progress = [&](float fraction) {
    rising = rising && fraction >= last;
    last = fraction;
    return kva::Flow::proceed;
  };
  CHECK(kva::Model::load(test::model_path, options));
  CHECK(rising && last == 1.0f);
  options.progress = [](float) { return kva::Flow::stop; };
  FAILS(kva::Model::load(test::model_path, options), cancelled, "");
}

TEST(the_log_lives_as_long_as_the_model) {
  const auto alive = std::make_shared<std::atomic<int>>(0);
  {
    kva::Session session;
    {
      kva::ModelOptions options;
      options.log_level = kva::LogLevel::debug;
      options.log = [alive](kva::LogLevel, std::string_view line) -> void {
        ++*alive;
        if (line.empty()) throw Own{0};
        throw Own{1};  // is dropped
      };
      kva::Model model = kva::Model::load(test::model_path, options).value();
      session = kva::Session::create(model).value();
    }
    CHECK(alive.use_count() == 2);
    CHECK(session.prefill(test::prompt));
  }
  CHECK(alive.use_count() == 1);
  CHECK(*alive > 0);

  kva::ModelOptions options;
  options.log = [alive](kva::LogLevel, std::string_view) { ++*alive; };
  CHECK(!kva::Model::load("/nowhere", options));
  CHECK(alive.use_count() == 2);  // the one in `options`
}

TEST(cancel_from_another_thread_stops_a_generation) {
  kva::Session session = kva::Session::create(test::model()).value();
  std::atomic<int> calls{0};
  std::thread other([&] {
    while (calls == 0) std::this_thread::yield();
    session.cancel();
  });
  const auto generated = session.generate(test::prompt, endless(), [&](std::uint32_t, std::string_view) {
    ++calls;
    std::this_thread::yield();
    return kva::Flow::proceed;
  });
  other.join();
  // The tiny model may fill its context before the other thread runs.
  if (generated) {
    session.clear_cancel();
  } else {
    FAILS(generated, cancelled, "");
  }
  CHECK(session.length() >= test::prompt.size() + static_cast<std::size_t>(calls) - 1);
  CHECK(session.truncate(4));
  CHECK(session.decode(1));
}

TEST(a_cancel_is_consumed_once_and_can_be_taken_back) {
  kva::Session session = kva::Session::create(test::model()).value();
  session.cancel();
  FAILS(session.prefill(test::prompt), cancelled, "");
  CHECK(session.length() == 0);
  CHECK(session.prefill(test::prompt));
  session.cancel();
  session.clear_cancel();
  CHECK(session.decode(1));
}

TEST(a_session_in_use_is_busy) {
  kva::Session session = kva::Session::create(test::model()).value();
  kva::ErrorCode inner{};
  CHECK(session.generate(test::prompt, endless(), [&](std::uint32_t, std::string_view) {
    inner = session.decode(1).error().code();
    return kva::Flow::stop;
  }));
  CHECK(inner == kva::ErrorCode::busy);
}
