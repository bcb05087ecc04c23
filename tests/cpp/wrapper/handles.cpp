// Ownership: who frees what, and what is left of a handle that was moved from.
#include <type_traits>

#include "test.hpp"

template <class Handle>
constexpr bool move_only = std::is_nothrow_move_constructible_v<Handle> && std::is_nothrow_move_assignable_v<Handle> &&
                           !std::is_copy_constructible_v<Handle> && !std::is_copy_assignable_v<Handle>;
static_assert(move_only<kva::Model> && move_only<kva::Session> && move_only<kva::Detokenizer>);
static_assert(sizeof(kva::Session) == sizeof(void*), "a handle costs what its pointer costs");

TEST(a_session_outlives_its_model) {
  kva::Session session;
  {
    kva::Model model = kva::Model::load(test::model_path).value();
    session = kva::Session::create(model).value();
  }
  CHECK(session.prefill(test::prompt));
  CHECK(session.length() == test::prompt.size());
}

TEST(a_handle_that_was_moved_from_is_empty_and_safe) {
  kva::Session session = kva::Session::create(test::model()).value();
  kva::Session other = std::move(session);
  CHECK(other && !session);
  CHECK(session.length() == 0 && session.capacity() == 0);
  session.cancel();
  FAILS(session.prefill(test::prompt), invalid_argument, "session");
  FAILS(session.statistics(), invalid_argument, "session");
  const kva::Model no_model;
  FAILS(no_model.info(), invalid_argument, "model");
  FAILS(kva::Session::create(no_model), invalid_argument, "model");
  FAILS(kva::Detokenizer().push(1), invalid_argument, "");
}

TEST(options_begin_with_the_librarys_defaults) {
  const kva::SamplingOptions sampling;
  CHECK(sampling.temperature == 0.0f && sampling.top_p == 1.0f && sampling.repetition_penalty == 1.0f);
  const kva::SessionOptions session;
  CHECK(session.policy == kva::Policy::full && session.kv_dtype == kva::DType::automatic);
}

TEST(info_describes_the_model) {
  const kva::ModelInfo info = test::model().info().value();
  CHECK(info.architecture == "llama" && !info.backend.empty() && !info.weight_storage.empty());
  CHECK(info.dtype == kva::DType::f32);
  CHECK(info.layers == 3 && info.heads == 9 && info.kv_heads == 3 && info.head_dim == 8 && info.hidden_size == 72);
  CHECK(info.vocabulary_size == test::vocabulary && info.context_length == test::context);
  CHECK(info.has_tokenizer && info.has_chat_template);
  CHECK(info.eos_token == 2u);
  CHECK(info.weight_bytes == info.parameters * 4);
  CHECK(info.load_seconds > 0);
}

TEST(an_estimate_grows_with_sessions) {
  const kva::Estimate one = test::model().estimate({}, 1).value();
  const kva::Estimate two = test::model().estimate({}, 2).value();
  CHECK(one.kv_device_bytes > 0 && two.kv_device_bytes == 2 * one.kv_device_bytes);
  CHECK(one.weight_bytes == test::model().info()->weight_bytes);
}
