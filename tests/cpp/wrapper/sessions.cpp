// Prefill, decode, batches, scores, generation.
#include <cmath>

#include "test.hpp"

TEST(prefill_and_decode_give_the_same_logits) {
  std::vector<float> all(test::vocabulary);
  std::vector<float> stepped(test::vocabulary);
  kva::Session session = kva::Session::create(test::model()).value();
  CHECK(session.prefill(test::prompt, all));
  kva::Session other = kva::Session::create(test::model()).value();
  for (const std::uint32_t token : test::prompt) CHECK(other.decode(token, stepped));
  for (std::size_t i = 0; i < all.size(); ++i) CHECK(std::abs(all[i] - stepped[i]) < 1e-4f);
  CHECK(session.tokens().value() == test::prompt && other.tokens().value() == test::prompt);
}

TEST(a_batch_does_what_single_steps_do) {
  constexpr std::size_t count = 3;
  std::vector<kva::Session> sessions;
  std::vector<kva::Session*> pointers;
  std::vector<std::uint32_t> tokens;
  std::vector<float> expected;
  for (std::size_t i = 0; i < count; ++i) {
    sessions.push_back(kva::Session::create(test::model()).value());
    CHECK(sessions.back().prefill({test::prompt.data(), i + 1}));
    tokens.push_back(static_cast<std::uint32_t>(10 + i));
    std::vector<float> row(test::vocabulary);
    CHECK(sessions.back().decode(tokens.back(), row));
    expected.insert(expected.end(), row.begin(), row.end());
    CHECK(sessions.back().truncate(i + 1));
  }
  for (kva::Session& session : sessions) pointers.push_back(&session);
  std::vector<float> logits(count * test::vocabulary);
  CHECK(kva::decode_batch(pointers, tokens, logits));
  CHECK(logits == expected);
  FAILS(kva::decode_batch(pointers, {tokens.data(), 2}), invalid_argument, "2 tokens for 3 sessions");
  pointers[1] = pointers[0];
  FAILS(kva::decode_batch(pointers, tokens), invalid_argument, "");
  pointers[1] = nullptr;
  FAILS(kva::decode_batch(pointers, tokens), invalid_argument, "");
}

TEST(scores_are_log_probabilities) {
  kva::Session session = kva::Session::create(test::model()).value();
  const auto scores = session.score(test::prompt).value();
  CHECK(scores.size() == test::prompt.size() && std::isnan(scores[0]));
  kva::Session other = kva::Session::create(test::model()).value();
  std::vector<float> logits(test::vocabulary);
  CHECK(other.prefill({test::prompt.data(), 1}, logits));
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
  const double expected = static_cast<double>(logits[test::prompt[1]]) - std::log(sum);
  CHECK(std::abs(static_cast<double>(scores[1]) - expected) < 1e-4);
}

TEST(generation_emits_what_decoding_chooses) {
  kva::Session stepped = kva::Session::create(test::model()).value();
  const auto expected = test::greedy(stepped, test::prompt, 12);
  kva::GenerateOptions options;
  options.max_tokens = 12;
  options.ignore_model_stop_tokens = true;
  std::vector<std::uint32_t> tokens;
  std::string text;
  kva::Session session = kva::Session::create(test::model()).value();
  const auto generated = session.generate(test::prompt, options, [&](std::uint32_t token, std::string_view piece) {
    if (tokens.size() < 12) tokens.push_back(token);
    text += piece;
    return kva::Flow::proceed;
  }).value();
  CHECK(generated.finish == kva::Finish::length && generated.tokens == 12 && generated.last_token == expected.back());
  CHECK(tokens == expected);
  CHECK(text == test::model().detokenize(expected, kva::Detokenize::skip_special).value());
  CHECK(session.tokens().value() == stepped.tokens().value());

  options.max_tokens = 1;
  CHECK(session.generate({}, options)->tokens == 1);  // goes on from where it is
}

TEST(generation_ends_for_each_reason) {
  kva::GenerateOptions options;
  options.ignore_model_stop_tokens = true;
  options.max_tokens = 40;
  std::string text;
  const auto collect = [&](std::uint32_t, std::string_view piece) { return text += piece, kva::Flow::proceed; };
  kva::Session session = kva::Session::create(test::model()).value();
  CHECK(session.generate(test::prompt, options, collect)->finish == kva::Finish::length);

  const std::string whole = text;
  options.stop_strings = {"never to be seen", whole.substr(6, 3)};
  text.clear();
  session = kva::Session::create(test::model()).value();
  CHECK(session.generate(test::prompt, options, collect)->finish == kva::Finish::stop_string);
  CHECK(text == whole.substr(0, whole.find(options.stop_strings[1])));

  options.stop_strings.clear();
  kva::Session stepped = kva::Session::create(test::model()).value();
  const auto chosen = test::greedy(stepped, test::prompt, 1);
  options.stop_tokens = chosen;
  session = kva::Session::create(test::model()).value();
  const auto stopped = session.generate(test::prompt, options).value();
  CHECK(stopped.finish == kva::Finish::stop_token && stopped.tokens == 0 && stopped.last_token == chosen[0]);
  CHECK(session.length() == test::prompt.size());

  kva::SessionOptions small;
  small.capacity = 20;
  options.stop_tokens.clear();
  session = kva::Session::create(test::model(), small).value();
  CHECK(session.generate(test::prompt, options)->finish == kva::Finish::context);
  CHECK(session.length() == 20);
}

TEST(sampling_repeats_with_its_seed_and_obeys_biases) {
  kva::Session session = kva::Session::create(test::model()).value();
  CHECK(session.prefill(test::prompt));
  kva::SamplingOptions options;
  options.temperature = 2;
  std::vector<std::uint32_t> drawn;
  for (options.seed = 0; options.seed < 32; ++options.seed) drawn.push_back(session.sample(options).value());
  bool varied = false;
  for (options.seed = 0; options.seed < 32; ++options.seed) {
    CHECK(session.sample(options).value() == drawn[static_cast<std::size_t>(options.seed)]);
    varied = varied || drawn[static_cast<std::size_t>(options.seed)] != drawn[0];
  }
  CHECK(varied);
  options.logit_bias = {{123, 1000.0f}};
  CHECK(session.sample(options).value() == 123);
}

TEST(statistics_count) {
  kva::Session session = kva::Session::create(test::model()).value();
  static_cast<void>(test::greedy(session, test::prompt, 5));
  const kva::Statistics statistics = session.statistics().value();
  CHECK(statistics.prefill_tokens == test::prompt.size() && statistics.decode_tokens == 5 && statistics.sampled_tokens == 5);
  CHECK(statistics.prefill_seconds > 0 && statistics.decode_seconds > 0 && statistics.kv_device_bytes > 0);
  CHECK(session.reset_statistics());
  CHECK(session.statistics()->prefill_tokens == 0);
}
