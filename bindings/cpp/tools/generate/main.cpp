/// kva-generate: streams a continuation of a prompt.

#include <cstdio>
#include <stdexcept>

#include "../common/files.hpp"
#include "../common/interrupt.hpp"
#include "options.hpp"
#include "statistics.hpp"

namespace generate {
namespace {

/// The prompt as tokens. Only a chat template may write special tokens by name: a plain prompt is text.
std::vector<std::uint32_t> tokens(const Options& options, const kva::Model& model) {
  std::string text = options.prompt ? *options.prompt : files::read(*options.prompt_file);
  if (!options.chat) return model.tokenize(text).value();
  std::vector<kva::ChatMessage> messages;
  if (options.system) messages.push_back({"system", *options.system});
  messages.push_back({"user", std::move(text)});
  return model.tokenize(model.apply_chat_template(messages).value(), kva::Tokenize::parse_special).value();
}

int run(const Options& options) {
  const kva::Model model = options.model.load();
  const auto prompt = tokens(options, model);
  if (prompt.empty()) throw args::UsageError("the prompt is empty");

  kva::Session session = kva::Session::create(model, options.policy.session(options.context)).value();
  const interrupt::Watch watch(session);

  bool line_open = false;
  const auto generated = session.generate(prompt, options.generation, [&](std::uint32_t, std::string_view text) {
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
      throw std::runtime_error("cannot write to standard output");
    }
    if (!text.empty()) line_open = text.back() != '\n';
    return kva::Flow::proceed;
  });
  if (line_open) std::puts("");
  std::fflush(stdout);

  const bool interrupted = !generated && generated.error().code() == kva::ErrorCode::cancelled && interrupt::requested();
  if (!generated && !interrupted) kva::unwrap(kva::Result<kva::Generated>(generated.error()));
  report(model, session, options.policy, interrupted ? "interrupted" : describe(generated->finish), options.statistics);
  return interrupted ? interrupt::exit_status() : 0;
}

}  // namespace
}  // namespace generate

int main(int argc, char** argv) {
  return program::run("kva-generate", [&] {
    generate::Options options;
    return generate::parse(argc, argv, options) ? generate::run(options) : 0;
  });
}
