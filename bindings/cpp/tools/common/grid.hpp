/// Grids of policies: "policy=infinigen;select=0.01,0.02" is every combination of the values, each a set of flags.

#pragma once

#include <string>
#include <utility>
#include <vector>

#include "policy.hpp"

namespace grid {

struct Point {
  policy::Flags flags;
  /// As written, in order: {"policy", "infinigen"}, {"select", "0.01"}.
  std::vector<std::pair<std::string, std::string>> settings;
  /// All of them, for people: "infinigen, select 0.01".
  std::string label;
  /// The same without the setting that varies last: points of one curve share it.
  std::string curve;
};

/// `base`, changed by each combination of a specification's values. Keys are the names of flags without their dashes; a flag
/// without a value stands alone. Throws UsageError.
[[nodiscard]] std::vector<Point> expand(const std::string& specification, const policy::Flags& base);

/// The same for each specification, which may also name a JSON file that lists some: strings as above, or objects such as
/// {"policy": "infinigen", "select": [0.01, 0.02], "no-attend-cache": true}.
[[nodiscard]] std::vector<Point> expand(const std::vector<std::string>& specifications, const policy::Flags& base);

}  // namespace grid
