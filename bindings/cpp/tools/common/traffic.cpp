#include "traffic.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "program.hpp"

namespace traffic {
namespace {

std::optional<double> ratio(double part, double whole) {
  if (!(whole > 0)) return {};
  return part / whole;
}

double number(std::uint64_t count) { return static_cast<double>(count); }

nlohmann::json optional(const std::optional<double>& value) {
  if (!value) return nullptr;
  return *value;
}

void append(std::string& list, const std::string& item) { list += (list.empty() ? "" : ", ") + item; }

}  // namespace

kva::Statistics sum(const kva::Statistics& a, const kva::Statistics& b) {
  kva::Statistics total = a;
  total.prefill_tokens += b.prefill_tokens;
  total.prefill_seconds += b.prefill_seconds;
  total.decode_tokens += b.decode_tokens;
  total.decode_seconds += b.decode_seconds;
  total.sampled_tokens += b.sampled_tokens;
  total.sample_seconds += b.sample_seconds;
  total.kv_device_bytes += b.kv_device_bytes;
  total.kv_pinned_bytes += b.kv_pinned_bytes;
  total.kv_file_bytes += b.kv_file_bytes;
  total.kv_steps += b.kv_steps;
  total.kv_selected += b.kv_selected;
  total.kv_candidates += b.kv_candidates;
  total.kv_attended += b.kv_attended;
  total.kv_held += b.kv_held;
  total.kv_hits += b.kv_hits;
  total.kv_misses += b.kv_misses;
  total.kv_host_fetched_bytes += b.kv_host_fetched_bytes;
  total.kv_file_fetched_bytes += b.kv_file_fetched_bytes;
  total.kv_file_read_bytes += b.kv_file_read_bytes;
  total.kv_read_seconds += b.kv_read_seconds;
  total.kv_wait_seconds += b.kv_wait_seconds;
  total.kv_evicted += b.kv_evicted;
  total.kv_corrected += b.kv_corrected;
  total.kv_link_seconds += b.kv_link_seconds;
  total.kv_index_bytes += b.kv_index_bytes;
  total.kv_cache_bytes += b.kv_cache_bytes;
  return total;
}

std::optional<double> selected(const kva::Statistics& s) { return ratio(number(s.kv_selected), number(s.kv_candidates)); }
std::optional<double> attended(const kva::Statistics& s) { return ratio(number(s.kv_attended), number(s.kv_held)); }
std::optional<double> hit_rate(const kva::Statistics& s) { return ratio(number(s.kv_hits), number(s.kv_hits + s.kv_misses)); }
std::optional<double> missed(const kva::Statistics& s) { return ratio(number(s.kv_misses), number(s.kv_candidates)); }

std::optional<double> hidden(const kva::Statistics& s) {
  const auto waited = ratio(s.kv_wait_seconds, s.kv_read_seconds);
  if (!waited) return {};
  return std::clamp(1 - *waited, 0.0, 1.0);
}

std::optional<double> selected_per_head(const kva::Statistics& s, std::uint64_t heads) {
  return ratio(number(s.kv_selected), number(s.kv_steps * heads));
}

std::string percent(const std::optional<double>& share) {
  if (!share) return "-";
  return program::format(*share >= 0.1 ? "%.1f%%" : *share >= 0.01 ? "%.2f%%" : "%.3f%%", *share * 100);
}

std::string where(const kva::Statistics& s) {
  std::string list;
  if (s.kv_device_bytes != 0) {
    std::string device = program::bytes(s.kv_device_bytes) + " device";
    if (s.kv_index_bytes != 0) device += " (index " + program::bytes(s.kv_index_bytes) + ", cache " + program::bytes(s.kv_cache_bytes) + ")";
    append(list, device);
  }
  if (s.kv_pinned_bytes != 0) append(list, program::bytes(s.kv_pinned_bytes) + " RAM");
  if (s.kv_file_bytes != 0) append(list, program::bytes(s.kv_file_bytes) + " file");
  return list.empty() ? "nothing" : list;
}

std::string fetched(const kva::Statistics& s) {
  std::string list;
  if (s.kv_host_fetched_bytes != 0) append(list, program::bytes(s.kv_host_fetched_bytes) + " RAM");
  if (s.kv_file_fetched_bytes != 0) {
    append(list, program::bytes(s.kv_file_fetched_bytes) + " file (" + program::bytes(s.kv_file_read_bytes) + " read)");
  }
  return list.empty() ? "nothing" : list;
}

nlohmann::json json(const kva::Statistics& s) {
  return {{"kv_fraction_selected", optional(selected(s))},
          {"kv_fraction_attended", optional(attended(s))},
          {"hit_rate", optional(hit_rate(s))},
          {"misses_per_step_fraction", optional(missed(s))},
          {"bytes_fetched",
           {{"host", s.kv_host_fetched_bytes}, {"file", s.kv_file_fetched_bytes}, {"file_read", s.kv_file_read_bytes}}},
          {"read_hidden", optional(hidden(s))},
          {"evicted", s.kv_evicted},
          {"corrected", s.kv_corrected},
          {"kv_bytes",
           {{"index", s.kv_index_bytes},
            {"cache", s.kv_cache_bytes},
            {"device", s.kv_device_bytes},
            {"host", s.kv_pinned_bytes},
            {"file", s.kv_file_bytes}}}};
}

}  // namespace traffic
