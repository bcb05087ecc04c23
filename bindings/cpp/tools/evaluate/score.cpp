#include "score.hpp"

#include <algorithm>
#include <cmath>

namespace evaluate {
namespace {

constexpr std::size_t chunk = 512;  // the library's own, so that the division changes no result

double negative_log_likelihood(const std::vector<float>& logits, std::uint32_t token) {
  const double greatest = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - greatest);
  return greatest + std::log(sum) - static_cast<double>(logits.at(token));
}

}  // namespace

std::vector<double> score(kva::Session& session, const std::vector<std::uint32_t>& tokens, const Done& done) {
  std::vector<double> nll;
  nll.reserve(tokens.size());
  for (std::size_t start = 0; start < tokens.size(); start += chunk) {
    const kva::Tokens part(tokens.data() + start, std::min(chunk, tokens.size() - start));
    for (const float log_probability : session.score(part).value()) nll.push_back(-static_cast<double>(log_probability));
    done(start + part.size());
  }
  if (!nll.empty()) nll.erase(nll.begin());  // nothing predicts the first token
  return nll;
}

std::vector<double> score_stepwise(kva::Session& session, const std::vector<std::uint32_t>& tokens, std::size_t prefill,
                                   std::uint32_t vocabulary, const Done& done) {
  std::vector<float> logits(vocabulary);
  std::vector<double> nll;
  nll.reserve(tokens.size());
  if (prefill > 0) {
    const std::vector<float> scores = session.score({tokens.data(), prefill}).value();
    for (std::size_t i = 1; i < prefill; ++i) nll.push_back(-static_cast<double>(scores[i]));
    session.get_logits(logits).value();
    nll.push_back(negative_log_likelihood(logits, tokens[prefill]));
    done(prefill);
  }
  session.reset_statistics().value();
  for (std::size_t i = prefill; i + 1 < tokens.size(); ++i) {
    session.decode(tokens[i], logits).value();
    nll.push_back(negative_log_likelihood(logits, tokens[i + 1]));
    done(i + 1);
  }
  return nll;
}

}  // namespace evaluate
