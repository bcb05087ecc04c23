#include "input.hpp"

#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "../common/files.hpp"

namespace evaluate {
namespace {

std::vector<std::uint32_t> parse_ids(const std::string& file, const std::string& text) {
  const auto json = nlohmann::json::parse(text, nullptr, false);
  if (json.is_discarded()) throw std::runtime_error(file + ": not JSON");
  const bool wrapped = json.is_object() && json.contains("token_ids");
  const auto& ids = wrapped ? json["token_ids"] : json;
  if (!ids.is_array()) throw std::runtime_error(file + ": must be a JSON array, or an object whose token_ids is one");
  std::vector<std::uint32_t> tokens;
  tokens.reserve(ids.size());
  for (const auto& id : ids) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() > std::numeric_limits<std::uint32_t>::max()) {
      throw std::runtime_error(file + ": token_ids[" + std::to_string(tokens.size()) + "] is " + id.dump() +
                               ", not a token id");
    }
    tokens.push_back(id.get<std::uint32_t>());
  }
  return tokens;
}

}  // namespace

std::vector<std::uint32_t> read_tokens(const Options& options, const kva::Model& model) {
  if (!options.token_ids.empty()) return parse_ids(options.token_ids, files::read(options.token_ids));
  auto tokens = model.tokenize(files::read(options.text), kva::Tokenize::add_special | kva::Tokenize::parse_special);
  if (!tokens) throw std::runtime_error(options.text + ": " + tokens.error().message());
  return std::move(tokens).value();
}

}  // namespace evaluate
