#include <cstdio>

#include "test.hpp"

namespace test {

const kva::Model& model() {
  static const kva::Model loaded = [] {
    kva::ModelOptions options;
    options.dtype = kva::DType::f32;
    options.threads = 2;
    return kva::Model::load(model_path, options).value();
  }();
  return loaded;
}

std::vector<std::uint32_t> greedy(kva::Session& session, kva::Tokens tokens, std::size_t count) {
  session.prefill(tokens).value();
  std::vector<std::uint32_t> chosen;
  for (std::size_t i = 0; i < count; ++i) {
    chosen.push_back(session.sample().value());
    session.decode(chosen.back()).value();
  }
  return chosen;
}

}  // namespace test

int main() {
  int failed = 0;
  for (const test::Case& one : test::cases()) {
    try {
      one.body();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", one.name, error.what());
      ++failed;
    }
  }
  std::printf("%zu tests, %d failed\n", test::cases().size(), failed);
  return failed == 0 ? 0 : 1;
}
