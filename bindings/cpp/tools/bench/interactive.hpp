/// Measurements on request, so that a script can alternate between this program and another engine.

#pragma once

#include <iosfwd>
#include <map>
#include <nlohmann/json_fwd.hpp>

#include "options.hpp"

namespace bench {

/// Answers one JSON line for each JSON line; --help describes them. Every depth keeps a session of its own, so that it is
/// prefilled once.
class Interactive {
 public:
  Interactive(const kva::Model& model, const Options& options);

  /// Until the input ends.
  void serve(std::istream& requests, std::ostream& answers);

 private:
  [[nodiscard]] nlohmann::json answer(const nlohmann::json& request);
  [[nodiscard]] nlohmann::json fill(std::uint64_t depth);
  [[nodiscard]] nlohmann::json prefill(std::uint64_t tokens);
  [[nodiscard]] nlohmann::json decode(std::uint64_t depth, std::uint64_t tokens);
  [[nodiscard]] nlohmann::json timed_prefill(kva::Session& session, std::uint64_t tokens);
  [[nodiscard]] kva::Session new_session() const;
  [[nodiscard]] std::vector<std::uint32_t> new_tokens(std::uint64_t count) const;

  const kva::Model& model_;
  const Options& options_;
  std::uint32_t vocabulary_;
  std::vector<float> logits_;
  std::map<std::uint64_t, kva::Session> sessions_;  ///< by depth
};

}  // namespace bench
