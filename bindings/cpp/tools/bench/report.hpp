/// Results of kva-bench, for people and for programs.

#pragma once

#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "measure.hpp"

namespace bench {

/// The line over a table: what was measured.
void print_heading(const kva::Model& model, const Options& options);
void print_columns(const Options& options);
/// A line, and under it what the policy did, where it left something out.
void print(const kva::Model& model, const Row& row, const Options& options);

/// {"version", "machine", "model", "options"}
[[nodiscard]] nlohmann::json describe(const kva::Model& model, const Options& options);

/// {"rows": [...], "peak_memory_bytes"} and all of `describe`.
[[nodiscard]] nlohmann::json to_json(const kva::Model& model, const Options& options, const std::vector<Row>& rows,
                                     std::uint64_t peak_memory_bytes);

}  // namespace bench
