/// JSON as text. Names of files need not be UTF-8, JSON must: what is not is replaced, instead of an exception.

#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace json {

/// `indent` spaces a level; -1: on one line.
[[nodiscard]] inline std::string text(const nlohmann::json& value, int indent) {
  return value.dump(indent, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace json
