#include "interactive.hpp"

#include <istream>
#include <ostream>

#include "../common/json.hpp"
#include "../common/machine.hpp"
#include "measure.hpp"
#include "prompt.hpp"
#include "report.hpp"

namespace bench {
namespace {

/// One untimed step: another program has had the processor's caches meanwhile.
void warm(kva::Session& session, std::uint32_t token) {
  const std::size_t length = session.length();
  session.decode(token).value();
  session.truncate(length).value();
}

nlohmann::json measured(std::uint64_t tokens, const machine::Contention::Reading& reading) {
  return {{"tokens", tokens}, {"seconds", reading.seconds}, {"others", reading.others}};
}

}  // namespace

Interactive::Interactive(const kva::Model& model, const Options& options)
    : model_(model), options_(options), vocabulary_(model.info().value().vocabulary_size), logits_(vocabulary_) {
  sessions_.emplace(0, new_session());
}

kva::Session Interactive::new_session() const { return kva::Session::create(model_, options_.policies.front().flags.session(0)).value(); }

std::vector<std::uint32_t> Interactive::new_tokens(std::uint64_t count) const {
  if (count == 0) throw std::runtime_error("tokens and depth must be at least 1");
  const std::uint64_t longest = model_.info().value().context_length;
  if (count > longest) throw std::runtime_error("the model's context length is " + std::to_string(longest) + " tokens");
  return random_tokens(static_cast<std::size_t>(count), vocabulary_, options_.seed);
}

void Interactive::serve(std::istream& requests, std::ostream& answers) {
  for (std::string line; std::getline(requests, line);) {
    if (line.empty()) continue;
    nlohmann::json reply;
    try {
      reply = answer(nlohmann::json::parse(line));
    } catch (const std::exception& error) {
      reply = {{"error", error.what()}};
    }
    answers << json::text(reply, -1) << std::endl;
  }
}

nlohmann::json Interactive::answer(const nlohmann::json& request) {
  const std::string op = request.at("op");
  if (op == "describe") return describe(model_, options_);
  if (op == "fill") return fill(request.at("depth"));
  if (op == "prefill") return prefill(request.at("tokens"));
  if (op == "decode") return decode(request.at("depth"), request.at("tokens"));
  throw std::runtime_error("op '" + op + "' is not one of describe, fill, prefill, decode");
}

nlohmann::json Interactive::fill(std::uint64_t depth) {
  if (depth == 0) throw std::runtime_error("depth 0 is always there and needs no fill");
  sessions_.erase(depth);
  kva::Session session = new_session();
  nlohmann::json reply = timed_prefill(session, depth);
  sessions_.emplace(depth, std::move(session));
  return reply;
}

nlohmann::json Interactive::prefill(std::uint64_t tokens) {
  kva::Session& session = sessions_.at(0);
  session.truncate(0).value();
  return timed_prefill(session, tokens);
}

nlohmann::json Interactive::decode(std::uint64_t depth, std::uint64_t tokens) {
  const auto found = sessions_.find(depth);
  if (found == sessions_.end()) throw std::runtime_error("no sequence of depth " + std::to_string(depth) + ": fill it first");
  kva::Session& session = found->second;
  session.truncate(depth).value();
  const auto input = new_tokens(tokens);
  warm(session, input[0]);
  const machine::Contention clock;
  for (const std::uint32_t token : input) session.decode(token, logits_).value();
  const auto reading = clock.read();
  session.truncate(depth).value();
  return measured(tokens, reading);
}

nlohmann::json Interactive::timed_prefill(kva::Session& session, std::uint64_t tokens) {
  const auto prompt = new_tokens(tokens);
  warm(session, prompt[0]);
  const machine::Contention clock;
  session.prefill(prompt, logits_).value();
  return measured(tokens, clock.read());
}

}  // namespace bench
