// Errors as values, where there are no exceptions.
#include <cstdio>

#include "kvahead.hpp"

int main() {
  static_assert(KVAHEAD_HAS_EXCEPTIONS == 0);
  const auto missing = kva::Model::load("/nowhere");
  if (missing || missing.error().code() != kva::ErrorCode::not_found) return 1;

  auto model = kva::Model::load(KVAHEAD_TEST_DATA "/golden/smollm2");
  if (!model) return std::fprintf(stderr, "%s\n", model.error().message().c_str()), 1;
  auto session = kva::Session::create(*model);
  auto prompt = model->tokenize("Once upon a time");
  if (!session || !prompt) return 1;
  std::size_t calls = 0;
  const auto generated = session->generate(*prompt, {}, [&](std::uint32_t, std::string_view) {
    return ++calls == 3 ? kva::Flow::stop : kva::Flow::proceed;
  });
  return generated && generated->finish == kva::Finish::callback && generated->tokens == 3 ? 0 : 1;
}
