/// What a policy attended and moved, from a session's statistics, in the terms that the tools print.

#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "kvahead.hpp"

namespace traffic {

/// Adds up the counters of sessions that decode together. Their times overlap, so these are added too.
[[nodiscard]] kva::Statistics sum(const kva::Statistics& a, const kva::Statistics& b);

/// Shares, 0 to 1; absent where nothing was counted.
[[nodiscard]] std::optional<double> selected(const kva::Statistics& statistics);  ///< of the past, over speculated layers
[[nodiscard]] std::optional<double> attended(const kva::Statistics& statistics);  ///< of what full attends, all layers
[[nodiscard]] std::optional<double> hit_rate(const kva::Statistics& statistics);  ///< of what was selected
[[nodiscard]] std::optional<double> missed(const kva::Statistics& statistics);    ///< of the past: what a step fetches
[[nodiscard]] std::optional<double> hidden(const kva::Statistics& statistics);    ///< of read time: nothing waited for it

/// Tokens that a decode step selects in one KV head of one speculated layer, on average.
[[nodiscard]] std::optional<double> selected_per_head(const kva::Statistics& statistics, std::uint64_t heads);

/// "3.25%", or "-".
[[nodiscard]] std::string percent(const std::optional<double>& share);

/// "1.0 MiB device, 2.5 GiB RAM": only tiers that hold something.
[[nodiscard]] std::string where(const kva::Statistics& statistics);

/// "12.0 MiB RAM, 3.0 MiB file (4.1 MiB read)", or "nothing".
[[nodiscard]] std::string fetched(const kva::Statistics& statistics);

/// All of it. {"kv_fraction_selected", "kv_fraction_attended", "hit_rate", "misses_per_step_fraction", "bytes_fetched",
/// "read_hidden", "evicted", "corrected", "kv_bytes"}
[[nodiscard]] nlohmann::json json(const kva::Statistics& statistics);

}  // namespace traffic
