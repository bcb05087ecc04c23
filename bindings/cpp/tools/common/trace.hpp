/// Traces of a policy's steps, as the library writes them for `trace_path` (docs/policies.md describes the format).

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace trace {

struct Header {
  std::uint32_t layers = 0;
  std::uint32_t kv_heads = 0;
};

/// What one KV head of one layer did in one decode step.
struct Record {
  std::uint32_t step = 0;  ///< position of the step's token
  std::uint16_t layer = 0;
  std::uint16_t kv_head = 0;
  std::uint32_t candidates = 0;  ///< past tokens
  std::uint32_t hits = 0;
  std::vector<std::uint32_t> selected;  ///< rows, ascending
  std::vector<std::uint32_t> missed;    ///< those that were not on the device, ascending
  std::vector<std::uint32_t> corrected;  ///< those that a correction has added, ascending
};

/// Reads a file from its beginning to its end, one record at a time. What it says is checked; errors name the file and where
/// in it.
Header read(const std::string& path, const std::function<void(const Header&, const Record&)>& take);

}  // namespace trace
