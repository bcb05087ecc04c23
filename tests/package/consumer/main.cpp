// Loads a model and generates three tokens.
#include <cstdio>
#include <kvahead.hpp>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  auto model = kva::Model::load(argv[1]);
  if (!model) return std::fprintf(stderr, "%s\n", model.error().message().c_str()), 1;
  kva::Session session = kva::Session::create(*model).value();
  kva::GenerateOptions options;
  options.max_tokens = 3;
  options.ignore_model_stop_tokens = true;
  const auto prompt = model->tokenize("Once upon a time").value();
  const auto generated = session.generate(prompt, options).value();
  std::printf("kvahead %s: %zu + %d tokens\n", kva_version(), prompt.size(), static_cast<int>(generated.tokens));
  return generated.tokens == 3 ? 0 : 1;
}
