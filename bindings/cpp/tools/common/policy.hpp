/// The flags that choose what a session attends and where its KV lives, the same in every tool.

#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "args.hpp"
#include "kvahead.hpp"

namespace policy {

/// What the flags said. Settings of `infinigen` that nobody has named keep the defaults of its mode.
struct Flags {
  kva::Policy policy = kva::Policy::full;
  kva::DType kv_dtype = kva::DType::automatic;

  kva::KvTier tier = kva::KvTier::device;
  kva::KvPayload payload = kva::KvPayload::exact;
  std::string file;
  std::uint64_t file_limit = 0;
  bool file_keep = false;
  bool file_buffered = false;
  bool file_checksum = false;
  std::uint64_t pool_tokens = 0;
  kva::Eviction eviction = kva::Eviction::off;
  std::string trace;

  std::optional<kva::Budget> budget;
  std::optional<std::uint32_t> sinks;

  std::optional<kva::InfinigenMode> mode;
  std::optional<float> select;
  std::optional<float> probability;
  std::optional<float> alpha;
  std::optional<float> cap;
  std::optional<kva::Budget> random;
  std::string replay;
  std::optional<float> renew;
  std::optional<float> ratio;
  std::optional<kva::IndexBasis> index;
  std::optional<std::uint32_t> index_bits;
  std::optional<kva::Predictor> predictor;
  std::optional<std::uint32_t> window;
  std::optional<std::uint32_t> resident_layers;
  std::optional<kva::Budget> cache;
  bool no_attend_cache = false;
  bool no_tail = false;
  std::optional<float> correct;

  void declare(args::Parser& parser);
  /// Throws UsageError for flags that the policy, the tier or another flag leaves without a use.
  void check() const;

  /// `capacity`: most tokens; 0: the model's context length.
  [[nodiscard]] kva::SessionOptions session(std::uint64_t capacity) const;

  /// Every setting that the policy uses, defaults included.
  [[nodiscard]] nlohmann::json json() const;
};

[[nodiscard]] std::string name(kva::Policy policy);
[[nodiscard]] std::string name(kva::KvTier tier);

}  // namespace policy
