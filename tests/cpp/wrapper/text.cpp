// Tokenizer, detokenizer, chat template.
#include "test.hpp"

TEST(text_survives_the_round_trip) {
  for (const std::string text : {"Once upon a time", "naïve café 😀 日本語", "", " two  spaces "}) {
    const auto tokens = test::model().tokenize(text, kva::Tokenize::plain).value();
    CHECK(test::model().detokenize(tokens).value() == text);
  }
}

TEST(special_names_are_tokens_only_when_asked) {
  const auto text = test::model().tokenize("<|im_end|>", kva::Tokenize::plain).value();
  const auto special = test::model().tokenize("<|im_end|>", kva::Tokenize::parse_special).value();
  CHECK(text.size() > 1);
  CHECK(special == std::vector<std::uint32_t>{2});
  CHECK(test::model().detokenize(special).value() == "<|im_end|>");
  CHECK(test::model().detokenize(special, kva::Detokenize::skip_special).value().empty());
}

TEST(tokens_that_arrive_one_at_a_time_make_whole_characters) {
  const std::string text = "café 😀 日本語!";
  kva::Detokenizer detokenizer = kva::Detokenizer::create(test::model()).value();
  std::string joined;
  const auto tokens = test::model().tokenize(text, kva::Tokenize::plain).value();
  for (const std::uint32_t token : tokens) {
    const std::string piece = detokenizer.push(token).value();
    CHECK(piece.empty() || (static_cast<unsigned char>(piece[0]) & 0xC0) != 0x80);  // begins no character in its middle
    joined += piece;
  }
  joined += detokenizer.finish().value();
  CHECK(joined == text);
}

TEST(the_chat_template_is_the_checkpoints) {
  const std::string text = test::model().apply_chat_template({{"system", "Be brief."}, {"user", "Hi"}}).value();
  CHECK(text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  const std::string closed = test::model().apply_chat_template({{"system", "Be brief."}, {"user", "Hi"}}, false).value();
  CHECK(text == closed + "<|im_start|>assistant\n");
}

TEST(stop_tokens_hold_the_end_token) {
  bool found = false;
  for (const std::uint32_t token : test::model().stop_tokens().value()) found = found || token == 2;
  CHECK(found);
}
