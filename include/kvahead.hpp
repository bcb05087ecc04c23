/// @file kvahead.hpp
/// C++17 wrapper of kvahead.h: handles that free themselves, errors as values or as exceptions. Header only.
///
///     auto model = kva::Model::load("SmolLM2-135M-Instruct.gguf").value();
///     auto session = kva::Session::create(model).value();
///     auto prompt = model.tokenize("The capital of France is").value();
///     session.generate(prompt, {}, [](std::uint32_t, std::string_view text) {
///       std::cout << text << std::flush;
///       return kva::Flow::proceed;
///     }).value();
///
/// Errors. Every call that can fail returns a `kva::Result<T>`, which must not be ignored. Ask it (`if (result)`,
/// `result.error()`), or take its value: `result.value()` and `kva::unwrap(...)` throw `kva::Exception` where there is
/// none. Built with -fno-exceptions they print the error and abort instead, so ask first.
///
/// Lifetime. A handle is moved, never copied, and freed with its object. A session or a detokenizer keeps its model
/// alive. A handle that was moved from is empty: calls on it fail with `ErrorCode::invalid_argument`.
///
/// Threads. A model may be used from many threads; a session from one at a time (a second caller gets
/// `ErrorCode::busy`); `Session::cancel` from any thread. Destroy a handle only when no other thread uses it.
///
/// Callbacks. An exception that leaves a progress or text callback stops the work and is thrown again from the call that
/// ran the callback. One that leaves a log callback is dropped: there is no call to report it to.

#ifndef KVAHEAD_HPP
#define KVAHEAD_HPP

#include "kvahead.h"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

/// 1 where the including program is built with exceptions.
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
#define KVAHEAD_HAS_EXCEPTIONS 1
#else
#define KVAHEAD_HAS_EXCEPTIONS 0
#endif

namespace kva {

// ---------------------------------------------------------------------------------------------------- errors

/// What went wrong, in terms that a program can act on. A later library may know more codes than this list.
enum class ErrorCode : std::int32_t {
  invalid_argument = KVA_ERROR_INVALID_ARGUMENT,  ///< NULL, out of range, of the wrong size, or an unknown enum value
  not_found = KVA_ERROR_NOT_FOUND,                ///< a file or folder does not exist
  invalid_format = KVA_ERROR_INVALID_FORMAT,      ///< a file is not a valid checkpoint or tokenizer
  unsupported = KVA_ERROR_UNSUPPORTED,            ///< valid, but not for this build, machine or model
  out_of_memory = KVA_ERROR_OUT_OF_MEMORY,
  capacity = KVA_ERROR_CAPACITY,                  ///< the session's context, or a memory budget, is full
  io = KVA_ERROR_IO,
  busy = KVA_ERROR_BUSY,                          ///< another thread is using the session
  cancelled = KVA_ERROR_CANCELLED,                ///< by Session::cancel or by a progress callback
  device = KVA_ERROR_DEVICE,                      ///< the compute device failed or is not there
  internal = KVA_ERROR_INTERNAL,                  ///< a defect in kvahead: please report it
};

/// A code for the program and a message for people.
class Error {
 public:
  Error(ErrorCode code, std::string message) : code_(code), message_(std::move(message)) {}

  [[nodiscard]] ErrorCode code() const noexcept { return code_; }
  /// One line: the argument or file, its value, and what would be right.
  [[nodiscard]] const std::string& message() const noexcept { return message_; }

 private:
  ErrorCode code_;
  std::string message_;
};

#if KVAHEAD_HAS_EXCEPTIONS
/// What `Result::value` throws.
class Exception : public std::exception {
 public:
  explicit Exception(Error error) : error_(std::move(error)) {}

  [[nodiscard]] const char* what() const noexcept override { return error_.message().c_str(); }
  [[nodiscard]] ErrorCode code() const noexcept { return error_.code(); }
  [[nodiscard]] const Error& error() const noexcept { return error_; }

 private:
  Error error_;
};
#endif

namespace detail {

[[noreturn]] inline void raise(const Error& error) {
#if KVAHEAD_HAS_EXCEPTIONS
  throw Exception(error);
#else
  std::fprintf(stderr, "kvahead: %s\n", error.message().c_str());
  std::abort();
#endif
}

}  // namespace detail

/// A `T`, or the error that came instead of it.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  [[nodiscard]] bool ok() const noexcept { return state_.index() == 0; }
  [[nodiscard]] explicit operator bool() const noexcept { return ok(); }

  /// The value; throws `kva::Exception` (or aborts, without exceptions) where there is none.
  [[nodiscard]] T& value() & {
    require();
    return *std::get_if<0>(&state_);
  }
  [[nodiscard]] const T& value() const& {
    require();
    return *std::get_if<0>(&state_);
  }
  [[nodiscard]] T value() && {
    require();
    return std::move(*std::get_if<0>(&state_));
  }
  [[nodiscard]] T value_or(T otherwise) && { return ok() ? std::move(*std::get_if<0>(&state_)) : std::move(otherwise); }

  /// The value of a result that is `ok()`.
  [[nodiscard]] T& operator*() & noexcept { return *std::get_if<0>(&state_); }
  [[nodiscard]] const T& operator*() const& noexcept { return *std::get_if<0>(&state_); }
  [[nodiscard]] T* operator->() noexcept { return std::get_if<0>(&state_); }
  [[nodiscard]] const T* operator->() const noexcept { return std::get_if<0>(&state_); }

  /// The error of a result that is not `ok()`.
  [[nodiscard]] const Error& error() const& noexcept { return *std::get_if<1>(&state_); }
  [[nodiscard]] Error error() && noexcept { return std::move(*std::get_if<1>(&state_)); }

 private:
  void require() const {
    if (!ok()) detail::raise(error());
  }

  std::variant<T, Error> state_;
};

/// Success, or an error.
template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  [[nodiscard]] bool ok() const noexcept { return state_.index() == 0; }
  [[nodiscard]] explicit operator bool() const noexcept { return ok(); }

  /// Nothing; throws `kva::Exception` (or aborts, without exceptions) on an error.
  void value() const {
    if (!ok()) detail::raise(error());
  }

  [[nodiscard]] const Error& error() const& noexcept { return *std::get_if<1>(&state_); }
  [[nodiscard]] Error error() && noexcept { return std::move(*std::get_if<1>(&state_)); }

 private:
  std::variant<std::monostate, Error> state_;
};

/// `unwrap(f())` is `f().value()`.
template <class T>
T unwrap(Result<T>&& result) {
  return std::move(result).value();
}
inline void unwrap(Result<void>&& result) { result.value(); }

// ----------------------------------------------------------------------------------------------------- views

/// A pointer and a count, for arguments: std::span for C++17. Holds nothing, so what it points to must outlive the call.
/// Made from anything with `data()` and `size()` (vector, array, std::span), from an array, or from pointer and count.
template <class T>
class View {
 public:
  constexpr View() noexcept = default;
  constexpr View(T* data, std::size_t size) noexcept : data_(data), size_(size) {}
  template <std::size_t n>
  constexpr View(T (&array)[n]) noexcept : data_(array), size_(n) {}
  template <class Container,
            class = std::enable_if_t<std::is_convertible_v<decltype(std::declval<Container&>().data()), T*> &&
                                     std::is_convertible_v<decltype(std::declval<Container&>().size()), std::size_t>>>
  constexpr View(Container&& container) noexcept : data_(container.data()), size_(container.size()) {}

  [[nodiscard]] constexpr T* data() const noexcept { return data_; }
  [[nodiscard]] constexpr std::size_t size() const noexcept { return size_; }
  [[nodiscard]] constexpr T* begin() const noexcept { return data_; }
  [[nodiscard]] constexpr T* end() const noexcept { return data_ + size_; }
  [[nodiscard]] constexpr T& operator[](std::size_t i) const noexcept { return data_[i]; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Token ids that a call reads.
using Tokens = View<const std::uint32_t>;
/// Logits that a call writes: one for each token of the vocabulary, for each row asked for.
using Logits = View<float>;

// -------------------------------------------------------------------------------------------------- constants

enum class DType : std::int32_t {
  automatic = KVA_DTYPE_AUTO,  ///< as stored; quantized weights as they are where that can be, else in bf16
  f32 = KVA_DTYPE_F32,
  f16 = KVA_DTYPE_F16,
  bf16 = KVA_DTYPE_BF16,
};

enum class Timing : std::int32_t {
  off = KVA_TIMING_OFF,
  fetches = KVA_TIMING_FETCHES,        ///< `kv_link_seconds` of the statistics
  operations = KVA_TIMING_OPERATIONS,  ///< everything, for `Model::write_timeline`
};

enum class Device : std::int32_t {
  automatic = KVA_DEVICE_AUTO,  ///< CUDA where it works, and the processor otherwise
  cpu = KVA_DEVICE_CPU,
  cuda = KVA_DEVICE_CUDA,  ///< the first CUDA device; an error of code device where there is none
};

/// What a layer attends.
enum class Policy : std::int32_t {
  full = KVA_POLICY_FULL,            ///< every token: exact
  int4 = KVA_POLICY_INT4,            ///< every token, from entries of 4 bits a value (FlexGen)
  h2o = KVA_POLICY_H2O,              ///< what got much attention so far, and the recent tokens; the rest is dropped (H2O)
  window = KVA_POLICY_WINDOW,        ///< the first tokens and the recent ones (StreamingLLM)
  infinigen = KVA_POLICY_INFINIGEN,  ///< what speculation selects, one layer ahead (InfiniGen)
};

/// Where KV is kept that a policy does not hold on the device.
enum class KvTier : std::int32_t {
  device = KVA_KV_TIER_DEVICE,  ///< device memory (main memory, where the device is the processor)
  host = KVA_KV_TIER_HOST,      ///< host memory, pinned for a GPU
  file = KVA_KV_TIER_FILE,
};

/// How it is stored there.
enum class KvPayload : std::int32_t {
  exact = KVA_KV_PAYLOAD_EXACT,  ///< as on the device
  int8 = KVA_KV_PAYLOAD_INT8,
  int4 = KVA_KV_PAYLOAD_INT4,
};

/// How a KV file is used. Combine with `|`.
enum class KvFile : std::uint32_t {
  plain = 0,
  keep = KVA_KV_FILE_KEEP,          ///< leave it in its place, instead of unlinking it as soon as it is open
  buffered = KVA_KV_FILE_BUFFERED,  ///< through the page cache, instead of direct I/O
  checksum = KVA_KV_FILE_CHECKSUM,  ///< keep a checksum of every row, and compare it on every read
};
[[nodiscard]] constexpr KvFile operator|(KvFile a, KvFile b) noexcept {
  return static_cast<KvFile>(static_cast<std::uint32_t>(a) | static_cast<std::uint32_t>(b));
}

/// Which entry gives way when there is no more room for KV.
enum class Eviction : std::int32_t {
  off = KVA_EVICTION_OFF,          ///< none: `ErrorCode::capacity` before the step begins
  fifo = KVA_EVICTION_FIFO,        ///< the oldest
  lru = KVA_EVICTION_LRU,          ///< the one selected longest ago
  counter = KVA_EVICTION_COUNTER,  ///< the one selected least often
};

/// Which defaults `InfinigenOptions` begins with.
enum class InfinigenMode : std::int32_t {
  standard = KVA_INFINIGEN_DEFAULT,  ///< what serves best, by measurement
  paper = KVA_INFINIGEN_PAPER,       ///< the paper's own settings, and nothing else
};

/// The basis that the index is columns of.
enum class IndexBasis : std::int32_t {
  balanced = KVA_INDEX_BALANCED,  ///< balanced over queries and keys, rotated to random positions
  skewed = KVA_INDEX_SKEWED,      ///< the paper's skew
  plain = KVA_INDEX_PLAIN,        ///< the head's own columns
  prompt = KVA_INDEX_PROMPT,      ///< the paper's skew, by the prompt's own queries
};

/// What predicts a layer's queries from the layer before.
enum class Predictor : std::int32_t {
  fitted = KVA_PREDICTOR_FITTED,              ///< its query weight, corrected by regression on the calibration text
  own = KVA_PREDICTOR_OWN,                    ///< its query weight on the previous layer's normalised input (the paper)
  renormalised = KVA_PREDICTOR_RENORMALISED,  ///< the same, normalised as this layer does
  exact = KVA_PREDICTOR_EXACT,                ///< the true query: how well a perfect predictor would do
};

/// How tokens are picked by their speculated scores.
enum class Rule : std::int32_t {
  share = KVA_RULE_SHARE,              ///< a fixed share of the tokens
  probability = KVA_RULE_PROBABILITY,  ///< every token whose log-probability is above a threshold
  paper = KVA_RULE_PAPER,              ///< within alpha of the greatest score, equally many in each head
  replay = KVA_RULE_REPLAY,            ///< what a trace selected, stretched, for measuring
  random = KVA_RULE_RANDOM,  ///< random tokens, for measuring
};

enum class LogLevel : std::int32_t {
  error = KVA_LOG_ERROR,
  warning = KVA_LOG_WARNING,
  info = KVA_LOG_INFO,
  debug = KVA_LOG_DEBUG,
};

/// What a callback wants to happen next.
enum class Flow : std::int32_t { proceed = 0, stop = 1 };

/// Why a generation ended.
enum class Finish : std::int32_t {
  stop_token = KVA_FINISH_STOP_TOKEN,    ///< the model ended the text
  stop_string = KVA_FINISH_STOP_STRING,
  length = KVA_FINISH_LENGTH,            ///< `max_tokens` were emitted
  context = KVA_FINISH_CONTEXT,          ///< the session is full
  callback = KVA_FINISH_CALLBACK,        ///< the callback said stop
};

/// How `Model::tokenize` reads a text. Combine with `|`.
enum class Tokenize : std::uint32_t {
  plain = 0,
  add_special = KVA_TOKENIZE_ADD_SPECIAL,      ///< what the tokenizer puts around a text, such as a begin-of-text token
  parse_special = KVA_TOKENIZE_PARSE_SPECIAL,  ///< names such as <|im_start|> in the text mean the token. Trusted text only
};
[[nodiscard]] constexpr Tokenize operator|(Tokenize a, Tokenize b) noexcept {
  return static_cast<Tokenize>(static_cast<std::uint32_t>(a) | static_cast<std::uint32_t>(b));
}

enum class Detokenize : std::uint32_t {
  everything = 0,
  skip_special = KVA_DETOKENIZE_SKIP_SPECIAL,  ///< leave special tokens out of the text
};

// ------------------------------------------------------------------------------------- the boundary, written once

namespace detail {

/// Takes ownership of what a C call returned.
inline Result<void> check(kva_error* error) {
  if (error == nullptr) return {};
  Error copy(static_cast<ErrorCode>(kva_error_code(error)), kva_error_message(error));
  kva_error_free(error);
  return copy;
}

/// What a C string cannot say is an error, not a shorter string.
inline Result<void> check_no_nul(const std::string& text, const char* what) {
  if (text.find('\0') == std::string::npos) return {};
  return Error(ErrorCode::invalid_argument, std::string(what) + " holds a NUL character");
}

/// One `Deleter` for every handle.
template <auto free_function>
struct Deleter {
  template <class Handle>
  void operator()(Handle* handle) const noexcept {
    free_function(handle);
  }
};
template <class Handle, auto free_function>
using Owned = std::unique_ptr<Handle, Deleter<free_function>>;

/// A C struct with the library's defaults in it.
template <class Options>
Result<Options> defaults(kva_error* (*init)(Options*, std::size_t)) {
  Options options{};
  if (auto done = check(init(&options, sizeof options)); !done) return std::move(done).error();
  return options;
}

/// Keeps the exception of a callback until the C frames below it are gone.
class Caught {
 public:
  /// Calls `f`; an exception is kept, and `otherwise` returned.
  template <class F, class R>
  R guard(R otherwise, F&& f) noexcept {
#if KVAHEAD_HAS_EXCEPTIONS
    try {
      return f();
    } catch (...) {
      exception_ = std::current_exception();
      return otherwise;
    }
#else
    static_cast<void>(otherwise);
    return f();
#endif
  }

  void rethrow() {
#if KVAHEAD_HAS_EXCEPTIONS
    if (exception_) std::rethrow_exception(std::exchange(exception_, nullptr));
#endif
  }

 private:
#if KVAHEAD_HAS_EXCEPTIONS
  std::exception_ptr exception_;
#endif
};

/// Runs a C call of the form (buffer, capacity, *count) twice: for the count, then for the contents.
template <class Buffer, class Call>
Result<Buffer> read_counted(Call&& call) {
  std::size_t count = 0;
  if (auto done = check(call(nullptr, std::size_t{0}, &count)); !done) return std::move(done).error();
  Buffer buffer(count, {});
  if (count == 0) return buffer;
  if (auto done = check(call(buffer.data(), buffer.size(), &count)); !done) return std::move(done).error();
  buffer.resize(count);
  return buffer;
}

/// The same for text, whose capacity counts a NUL that its length does not.
template <class Call>
Result<std::string> read_text(Call&& call) {
  std::size_t length = 0;
  if (auto done = check(call(nullptr, std::size_t{0}, &length)); !done) return std::move(done).error();
  std::string text(length + 1, '\0');
  if (auto done = check(call(text.data(), text.size(), &length)); !done) return std::move(done).error();
  text.resize(length);
  return text;
}

}  // namespace detail

/// The version of the library that is loaded (`KVA_VERSION` is that of the header).
[[nodiscard]] inline std::string_view version() noexcept { return kva_version(); }

// ----------------------------------------------------------------------------------------------------- model

/// Fraction loaded or calibrated, 0 to 1. Called on the thread that does it.
using ProgressCallback = std::function<Flow(float fraction)>;
/// One line of text. Called from any thread, maybe several at once.
using LogCallback = std::function<void(LogLevel level, std::string_view message)>;

struct ModelOptions {
  Device device = Device::automatic;
  DType dtype = DType::automatic;    ///< type of the weights in memory
  std::uint32_t threads = 0;         ///< 0: every processor that the process may use
  bool copy_weights = false;         ///< read all weights; else matrices of a folder stay in its mapped files
  std::uint64_t kv_limit_bytes = 0;  ///< KV of all sessions together; 0: no limit
  ProgressCallback progress;
  LogCallback log;
  LogLevel log_level = LogLevel::info;
  std::string speculation_cache_path;  ///< folder for what is learnt from the calibration text; empty: next to the model
  std::string calibration_text;        ///< plain prose of at least 2,048 tokens; empty: a text of the library's own

  /// The library's defaults.
  ModelOptions() {
    if (const auto c = detail::defaults(kva_model_options_init)) {
      device = static_cast<Device>(c->device);
      dtype = static_cast<DType>(c->dtype);
      threads = c->threads;
      kv_limit_bytes = c->kv_limit_bytes;
      if (c->log_level != 0) log_level = static_cast<LogLevel>(c->log_level);
    }
  }
};

/// A number of tokens: a share of those that a session holds, or a fixed number.
struct Budget {
  float share = 0;
  std::uint64_t tokens = 0;  ///< where it is not 0, in place of the share

  [[nodiscard]] static constexpr Budget of_share(float share) noexcept { return {share, 0}; }
  [[nodiscard]] static constexpr Budget of_tokens(std::uint64_t tokens) noexcept { return {0, tokens}; }
};

/// Settings of `Policy::infinigen`. Shares are of the tokens that a session holds.
struct InfinigenOptions {
  InfinigenMode mode = InfinigenMode::standard;
  IndexBasis basis = IndexBasis::balanced;
  float ratio = 0;                        ///< columns of the index as a share of the head dimension
  std::uint32_t index_bits = 0;           ///< of a number in the index: 4, 8 or 32
  Predictor predictor = Predictor::fitted;
  Rule rule = Rule::share;
  float select_share = 0;                 ///< `Rule::share`: share of the tokens to select
  float select_below = 0;                 ///< `Rule::probability`: how far below 1, as a natural logarithm
  float alpha = 0;                        ///< `Rule::paper`: how far below the greatest score
  float select_cap = 0;                   ///< `Rule::probability`, `paper`, `replay`: most to select, as a share
  Budget random;                          ///< `Rule::random`: tokens to select
  float random_renewed = 1;               ///< `Rule::random`: share of them that are others in the next step
  std::uint32_t sinks = 0;                ///< first tokens, always attended
  std::uint32_t window = 0;               ///< last tokens, always attended
  std::uint32_t resident_layers = 0;      ///< first layers, attended in full from device memory
  Budget cache;                           ///< entries that each layer and KV head keeps on the device
  std::uint64_t cache_least = 0;          ///< fewest of them: a shorter sequence is attended in full
  bool attend_cache = false;              ///< attend everything that is on the device, selected or not
  bool tail = false;                      ///< attend also one entry that stands for everything else
  float correct = 0;                      ///< most to add when the true queries have come, as a share; 0: nothing
  std::string replay_path;                ///< `Rule::replay`: the trace

  /// The library's defaults for a mode.
  explicit InfinigenOptions(InfinigenMode of = InfinigenMode::standard) : mode(of) {
    if (const auto c = init(of)) {
      basis = static_cast<IndexBasis>(c->basis);
      ratio = c->ratio;
      index_bits = c->index_bits;
      predictor = static_cast<Predictor>(c->predictor);
      rule = static_cast<Rule>(c->rule);
      select_share = c->select_share;
      select_below = c->select_below;
      alpha = c->alpha;
      select_cap = c->select_cap;
      random = Budget{c->select_share, c->select_tokens};
      random_renewed = c->select_renewed;
      sinks = c->sinks;
      window = c->window;
      resident_layers = c->resident_layers;
      cache = Budget{c->cache_share, c->cache_tokens};
      cache_least = c->cache_least;
      attend_cache = c->attend_cache != 0;
      tail = c->tail != 0;
      correct = c->correct;
    }
  }

  /// The options as C has them, which point into this object.
  [[nodiscard]] Result<kva_infinigen_options> to_c() const {
    if (auto done = detail::check_no_nul(replay_path, "replay_path"); !done) return std::move(done).error();
    auto c = init(mode);
    if (c) {
      c->basis = static_cast<std::int32_t>(basis);
      c->ratio = ratio;
      c->index_bits = index_bits;
      c->predictor = static_cast<std::int32_t>(predictor);
      c->rule = static_cast<std::int32_t>(rule);
      c->select_share = select_share;
      c->select_below = select_below;
      c->alpha = alpha;
      c->select_cap = select_cap;
      if (rule == Rule::random) {
        c->select_share = random.share;
        c->select_tokens = random.tokens;
        c->select_renewed = random_renewed;
      }
      c->sinks = sinks;
      c->window = window;
      c->resident_layers = resident_layers;
      c->cache_share = cache.share;
      c->cache_tokens = cache.tokens;
      c->cache_least = cache_least;
      c->attend_cache = attend_cache ? 1 : 0;
      c->tail = tail ? 1 : 0;
      c->correct = correct;
      c->replay_path = replay_path.empty() ? nullptr : replay_path.c_str();
    }
    return c;
  }

 private:
  static Result<kva_infinigen_options> init(InfinigenMode mode) {
    kva_infinigen_options c{};
    auto done = detail::check(kva_infinigen_options_init(&c, sizeof c, static_cast<std::int32_t>(mode)));
    if (!done) return std::move(done).error();
    return c;
  }
};

struct SessionOptions {
  Policy policy = Policy::full;
  std::uint64_t capacity = 0;            ///< tokens; 0: the model's context length
  std::uint32_t prefill_chunk = 0;       ///< prompt tokens that run at once; 0: 512, 4096 on a GPU
  DType kv_dtype = DType::automatic;     ///< automatic: the type of the weights
  KvTier kv_tier = KvTier::device;       ///< of the KV that the policy does not hold on the device
  KvPayload kv_payload = KvPayload::exact;
  std::string kv_file_path;              ///< `KvTier::file`: made anew; empty: a nameless file in the temporary folder
  std::uint64_t kv_file_limit_bytes = 0; ///< 0: what `capacity` needs
  KvFile kv_file_flags = KvFile::plain;
  Budget budget;                         ///< `window`, `h2o`: tokens to attend, sinks included
  std::uint32_t sinks = 0;               ///< `window`: first tokens, always attended
  std::uint64_t resident_layers = 0;     ///< `window`: first layers, whose tokens are all attended
  Eviction eviction = Eviction::off;     ///< infinigen: which entry gives way when there is no more room
  std::uint64_t pool_tokens = 0;         ///< infinigen: most tokens to keep, each layer and KV head; 0: as many as there is room for
  InfinigenOptions infinigen;
  std::string trace_path;                ///< what was selected and fetched goes to this file; empty: nowhere

  /// The library's defaults.
  SessionOptions() {
    if (const auto c = detail::defaults(kva_session_options_init)) {
      policy = static_cast<Policy>(c->policy);
      capacity = c->capacity;
      prefill_chunk = c->prefill_chunk;
      kv_dtype = static_cast<DType>(c->kv_dtype);
      kv_tier = static_cast<KvTier>(c->kv_tier);
      kv_payload = static_cast<KvPayload>(c->kv_payload);
      budget = Budget{c->budget_share, c->budget_tokens};
      sinks = c->sinks;
      resident_layers = c->resident_layers;
      eviction = static_cast<Eviction>(c->eviction);
    }
  }

  /// The C struct. It points into this object and at `storage`, which must both outlive its use.
  [[nodiscard]] Result<kva_session_options> to_c(kva_infinigen_options& storage) const {
    if (auto done = detail::check_no_nul(kv_file_path, "kv_file_path"); !done) return std::move(done).error();
    if (auto done = detail::check_no_nul(trace_path, "trace_path"); !done) return std::move(done).error();
    auto c = detail::defaults(kva_session_options_init);
    if (!c) return c;
    c->policy = static_cast<std::int32_t>(policy);
    c->capacity = capacity;
    c->prefill_chunk = prefill_chunk;
    c->kv_dtype = static_cast<std::int32_t>(kv_dtype);
    c->kv_tier = static_cast<std::int32_t>(kv_tier);
    c->kv_payload = static_cast<std::int32_t>(kv_payload);
    c->kv_file_flags = static_cast<std::uint32_t>(kv_file_flags);
    c->kv_file_limit_bytes = kv_file_limit_bytes;
    c->kv_file_path = kv_file_path.empty() ? nullptr : kv_file_path.c_str();
    c->budget_share = budget.share;
    c->budget_tokens = budget.tokens;
    c->sinks = sinks;
    c->resident_layers = resident_layers;
    c->eviction = static_cast<std::int32_t>(eviction);
    c->pool_tokens = pool_tokens;
    c->trace_path = trace_path.empty() ? nullptr : trace_path.c_str();
    if (policy == Policy::infinigen) {
      auto settings = infinigen.to_c();
      if (!settings) return std::move(settings).error();
      storage = *settings;
      c->infinigen = &storage;
    }
    return c;
  }
};

struct ModelInfo {
  std::string architecture;
  std::string backend;  ///< what computes, for people
  DType dtype = DType::automatic;  ///< of the weights, or of what their blocks stand for
  std::string weight_storage;  ///< how the weights lie in memory, for people: "q4_1+q8_0 as bf16"
  std::uint64_t parameters = 0;
  std::uint64_t weight_bytes = 0;
  std::uint32_t layers = 0;
  std::uint32_t heads = 0;
  std::uint32_t kv_heads = 0;
  std::uint32_t head_dim = 0;
  std::uint32_t hidden_size = 0;
  std::uint32_t vocabulary_size = 0;
  std::uint64_t context_length = 0;
  std::optional<std::uint32_t> bos_token;
  std::optional<std::uint32_t> eos_token;  ///< the first of `Model::stop_tokens`
  bool has_tokenizer = false;
  bool has_chat_template = false;
  double load_seconds = 0;
};

/// Bytes that a model and some sessions of it would take.
struct Estimate {
  std::uint64_t weight_bytes = 0;
  std::uint64_t kv_device_bytes = 0;
  std::uint64_t kv_pinned_bytes = 0;
  std::uint64_t kv_file_bytes = 0;
  std::uint64_t scratch_bytes = 0;         ///< once for the whole model
  std::uint64_t scratch_pinned_bytes = 0;  ///< of it, in pinned host memory
};

struct ChatMessage {
  std::string role;  ///< system, user, assistant
  std::string content;
};

/// A loaded model. Move-only; use it from any number of threads.
class Model {
 public:
  Model() = default;
  /// Takes ownership of a handle from the C interface.
  explicit Model(kva_model* handle) noexcept : handle_(handle) {}

  /// Loads a Hugging Face folder or a GGUF file.
  static Result<Model> load(const std::string& path, const ModelOptions& options = {}) {
    if (auto done = detail::check_no_nul(path, "path"); !done) return std::move(done).error();
    return make(options, [&](const kva_model_options* c, kva_model** out) { return kva_model_load(path.c_str(), c, out); });
  }

  /// A model of a named shape ("llama-2-7b") with random weights and no tokenizer, for measurements.
  static Result<Model> random(const std::string& shape, std::uint64_t seed, const ModelOptions& options = {}) {
    if (auto done = detail::check_no_nul(shape, "shape"); !done) return std::move(done).error();
    return make(options, [&](const kva_model_options* c, kva_model** out) {
      return kva_model_create_random(shape.c_str(), seed, c, out);
    });
  }

  [[nodiscard]] Result<ModelInfo> info() const {
    kva_model_info c{};
    c.struct_size = sizeof c;
    if (auto done = detail::check(kva_model_get_info(get(), &c)); !done) return std::move(done).error();
    ModelInfo info;
    if (c.architecture != nullptr) info.architecture = c.architecture;
    if (c.backend != nullptr) info.backend = c.backend;
    if (c.weight_storage != nullptr) info.weight_storage = c.weight_storage;
    info.dtype = static_cast<DType>(c.dtype);
    info.parameters = c.parameters;
    info.weight_bytes = c.weight_bytes;
    info.layers = c.layers;
    info.heads = c.heads;
    info.kv_heads = c.kv_heads;
    info.head_dim = c.head_dim;
    info.hidden_size = c.hidden_size;
    info.vocabulary_size = c.vocabulary_size;
    info.context_length = c.context_length;
    if (c.bos_token != KVA_TOKEN_NONE) info.bos_token = c.bos_token;
    if (c.eos_token != KVA_TOKEN_NONE) info.eos_token = c.eos_token;
    info.has_tokenizer = c.has_tokenizer != 0;
    info.has_chat_template = c.has_chat_template != 0;
    info.load_seconds = c.load_seconds;
    return info;
  }

  /// What `sessions` sessions with `options` would take when full.
  [[nodiscard]] Result<Estimate> estimate(const SessionOptions& options = {}, std::size_t sessions = 1) const {
    kva_infinigen_options infinigen{};
    const auto c_options = options.to_c(infinigen);
    if (!c_options) return c_options.error();
    kva_estimate c{};
    c.struct_size = sizeof c;
    if (auto done = detail::check(kva_model_estimate(get(), &*c_options, sessions, &c)); !done) {
      return std::move(done).error();
    }
    return Estimate{c.weight_bytes,  c.kv_device_bytes, c.kv_pinned_bytes,
                    c.kv_file_bytes, c.scratch_bytes,   c.scratch_pinned_bytes};
  }

  /// Learns from the calibration text what `Policy::infinigen` speculates with, or reads it from the cache; otherwise the
  /// first session with that policy does.
  Result<void> calibrate(const ProgressCallback& progress = {}) const {
    Progress state{progress, {}};
    auto done = detail::check(kva_model_calibrate(get(), progress ? Progress::call : nullptr, &state, nullptr));
    state.caught.rethrow();
    return done;
  }

  /// What decode steps measure of themselves from now on.
  Result<void> set_timing(Timing timing) const {
    return detail::check(kva_model_set_timing(get(), static_cast<std::int32_t>(timing)));
  }
  /// Writes when each operation of the last decode step began and ended, as Chrome's trace events.
  Result<void> write_timeline(const std::string& path) const {
    if (auto done = detail::check_no_nul(path, "path"); !done) return std::move(done).error();
    return detail::check(kva_model_write_timeline(get(), path.c_str()));
  }

  [[nodiscard]] Result<std::vector<std::uint32_t>> tokenize(std::string_view text,
                                                            Tokenize flags = Tokenize::add_special) const {
    return detail::read_counted<std::vector<std::uint32_t>>(
        [&](std::uint32_t* tokens, std::size_t capacity, std::size_t* count) {
          return kva_model_tokenize(get(), text.data(), text.size(), static_cast<std::uint32_t>(flags), tokens, capacity,
                                    count);
        });
  }

  /// For tokens that arrive one at a time use a `Detokenizer`, which never cuts a character in two.
  [[nodiscard]] Result<std::string> detokenize(Tokens tokens, Detokenize flags = Detokenize::everything) const {
    return detail::read_text([&](char* text, std::size_t capacity, std::size_t* length) {
      return kva_model_detokenize(get(), tokens.data(), tokens.size(), static_cast<std::uint32_t>(flags), text, capacity,
                                  length);
    });
  }

  /// Tokens after which the model's texts end.
  [[nodiscard]] Result<std::vector<std::uint32_t>> stop_tokens() const {
    return detail::read_counted<std::vector<std::uint32_t>>(
        [&](std::uint32_t* tokens, std::size_t capacity, std::size_t* count) {
          return kva_model_get_stop_tokens(get(), tokens, capacity, count);
        });
  }

  /// The conversation as one text in the model's own form; tokenize it with `Tokenize::parse_special` alone.
  /// `add_generation_prompt` opens the assistant's next turn.
  [[nodiscard]] Result<std::string> apply_chat_template(const std::vector<ChatMessage>& messages,
                                                        bool add_generation_prompt = true) const {
    std::vector<kva_chat_message> c;
    c.reserve(messages.size());
    for (const ChatMessage& message : messages) {
      if (auto done = detail::check_no_nul(message.role, "role"); !done) return std::move(done).error();
      if (auto done = detail::check_no_nul(message.content, "content"); !done) return std::move(done).error();
      c.push_back({message.role.c_str(), message.content.c_str()});
    }
    return detail::read_text([&](char* text, std::size_t capacity, std::size_t* length) {
      return kva_model_apply_chat_template(get(), c.data(), c.size(), add_generation_prompt ? 1u : 0u, text, capacity,
                                           length);
    });
  }

  [[nodiscard]] kva_model* get() const noexcept { return handle_.get(); }
  [[nodiscard]] explicit operator bool() const noexcept { return handle_ != nullptr; }

 private:
  struct Progress {
    const ProgressCallback& callback;
    detail::Caught caught;

    static std::int32_t call(void* data, float fraction) {
      auto& self = *static_cast<Progress*>(data);
      return self.caught.guard(std::int32_t{1}, [&] { return static_cast<std::int32_t>(self.callback(fraction)); });
    }
  };

  template <class Call>
  static Result<Model> make(const ModelOptions& options, Call&& call) {
    auto done = detail::check_no_nul(options.speculation_cache_path, "speculation_cache_path");
    if (!done) return std::move(done).error();
    auto c = detail::defaults(kva_model_options_init);
    if (!c) return std::move(c).error();
    c->device = static_cast<std::int32_t>(options.device);
    c->dtype = static_cast<std::int32_t>(options.dtype);
    c->threads = options.threads;
    c->copy_weights = options.copy_weights ? 1 : 0;
    c->kv_limit_bytes = options.kv_limit_bytes;
    c->log_level = static_cast<std::int32_t>(options.log_level);
    if (!options.speculation_cache_path.empty()) c->speculation_cache_path = options.speculation_cache_path.c_str();
    if (!options.calibration_text.empty()) {
      c->calibration_text = options.calibration_text.data();
      c->calibration_text_len = options.calibration_text.size();
    }
    // Progress is over when the call returns, so its state may live here; the log lives as long as the model.
    Progress progress{options.progress, {}};
    if (options.progress) {
      c->progress = Progress::call;
      c->progress_user_data = &progress;
    }
    if (options.log) {
      c->log = [](void* data, std::int32_t level, const char* message) {
        const auto& callback = *static_cast<const LogCallback*>(data);
        detail::Caught dropped;
        dropped.guard(0, [&] { return callback(static_cast<LogLevel>(level), message), 0; });
      };
      c->log_user_data = new LogCallback(options.log);
      c->log_free_user_data = [](void* data) { delete static_cast<LogCallback*>(data); };
    }
    kva_model* handle = nullptr;
    done = detail::check(call(&*c, &handle));
    progress.caught.rethrow();
    if (!done) return std::move(done).error();
    return Model(handle);
  }

  detail::Owned<kva_model, kva_model_free> handle_;
};

// ----------------------------------------------------------------------------------------------- detokenizer

/// Text from tokens that arrive one at a time, in whole characters. Move-only.
class Detokenizer {
 public:
  Detokenizer() = default;
  /// Takes ownership of a handle from the C interface.
  explicit Detokenizer(kva_detokenizer* handle) noexcept : handle_(handle) {}

  static Result<Detokenizer> create(const Model& model, Detokenize flags = Detokenize::skip_special) {
    kva_detokenizer* handle = nullptr;
    auto done = detail::check(kva_detokenizer_create(model.get(), static_cast<std::uint32_t>(flags), &handle));
    if (!done) return std::move(done).error();
    return Detokenizer(handle);
  }

  /// The text that has become certain by this token; may be empty.
  [[nodiscard]] Result<std::string> push(std::uint32_t token) {
    const char* text = nullptr;
    std::size_t length = 0;
    auto done = detail::check(kva_detokenizer_push(get(), token, &text, &length));
    if (!done) return std::move(done).error();
    return std::string(text, length);
  }

  /// What was held back for a character that never came whole.
  [[nodiscard]] Result<std::string> finish() {
    const char* text = nullptr;
    std::size_t length = 0;
    auto done = detail::check(kva_detokenizer_finish(get(), &text, &length));
    if (!done) return std::move(done).error();
    return std::string(text, length);
  }

  [[nodiscard]] kva_detokenizer* get() const noexcept { return handle_.get(); }
  [[nodiscard]] explicit operator bool() const noexcept { return handle_ != nullptr; }

 private:
  detail::Owned<kva_detokenizer, kva_detokenizer_free> handle_;
};

// --------------------------------------------------------------------------------------------------- session

struct LogitBias {
  std::uint32_t token = 0;
  float bias = 0;
};

/// How to pick a token. The defaults pick the likeliest.
struct SamplingOptions {
  float temperature = 0;            ///< 0: greedy
  std::uint32_t top_k = 0;          ///< 0: off
  float top_p = 1;                  ///< 1: off
  float min_p = 0;                  ///< 0: off
  float repetition_penalty = 1;     ///< 1: off
  float frequency_penalty = 0;
  float presence_penalty = 0;
  std::uint32_t penalty_window = 0;  ///< last tokens of the session that penalties look at; 0: all
  std::uint64_t seed = 0;
  std::vector<LogitBias> logit_bias;

  /// The library's defaults.
  SamplingOptions() {
    if (const auto c = detail::defaults(kva_sampling_options_init)) {
      temperature = c->temperature;
      top_k = c->top_k;
      top_p = c->top_p;
      min_p = c->min_p;
      repetition_penalty = c->repetition_penalty;
      frequency_penalty = c->frequency_penalty;
      presence_penalty = c->presence_penalty;
      penalty_window = c->penalty_window;
      seed = c->seed;
    }
  }
};

/// Called for each token with the text that has become certain by it: whole UTF-8 characters, maybe none. What was held
/// back at the end comes in one more call, with the last token again.
using TextCallback = std::function<Flow(std::uint32_t token, std::string_view text)>;

struct GenerateOptions {
  std::uint64_t max_tokens = 0;  ///< 0: until the text ends or the session is full
  SamplingOptions sampling;
  std::vector<std::uint32_t> stop_tokens;  ///< besides the model's own
  bool ignore_model_stop_tokens = false;
  std::vector<std::string> stop_strings;  ///< end the text, and are not part of it

  /// The library's defaults.
  GenerateOptions() {
    if (const auto c = detail::defaults(kva_generate_options_init)) max_tokens = c->max_tokens;
  }
};

/// What came of a generation.
struct Generated {
  Finish finish = Finish::length;
  std::uint64_t tokens = 0;                 ///< emitted
  std::optional<std::uint32_t> last_token;  ///< the last one sampled: the stop token, where one ended the text
};

/// Counts and times since the session began or since the last reset.
struct Statistics {
  std::uint64_t prefill_tokens = 0;
  double prefill_seconds = 0;
  std::uint64_t decode_tokens = 0;
  double decode_seconds = 0;
  std::uint64_t sampled_tokens = 0;
  double sample_seconds = 0;
  std::uint64_t kv_device_bytes = 0;
  std::uint64_t kv_pinned_bytes = 0;
  std::uint64_t kv_file_bytes = 0;
  // What the policy did in decode. An entry is the key and value of one token of one KV head of one layer.
  std::uint64_t kv_steps = 0;               ///< decode steps
  std::uint64_t kv_selected = 0;            ///< past entries selected (or attended), over speculated layers
  std::uint64_t kv_candidates = 0;          ///< past entries that there were, over speculated layers
  std::uint64_t kv_attended = 0;            ///< entries attended, over all layers
  std::uint64_t kv_held = 0;                ///< entries that full attention would have attended, over all layers
  std::uint64_t kv_hits = 0;                ///< selected entries that were on the device already
  std::uint64_t kv_misses = 0;              ///< selected entries that were fetched
  std::uint64_t kv_host_fetched_bytes = 0;
  std::uint64_t kv_file_fetched_bytes = 0;  ///< as the entries need them
  std::uint64_t kv_file_read_bytes = 0;     ///< really read: whole blocks, gaps included
  double kv_read_seconds = 0;               ///< reads from files were in flight
  double kv_wait_seconds = 0;               ///< steps stood still for them
  std::uint64_t kv_evicted = 0;             ///< entries overwritten because there was no more room
  std::uint64_t kv_corrected = 0;           ///< selected entries that a correction has added
  double kv_link_seconds = 0;               ///< entries were on their way from host memory, where that is measured
  std::uint64_t kv_index_bytes = 0;         ///< of `kv_device_bytes`: the speculation index
  std::uint64_t kv_cache_bytes = 0;         ///< of `kv_device_bytes`: the hot cache and its tables
  std::uint64_t scratch_bytes = 0;          ///< of the model, in device memory
  std::uint64_t scratch_pinned_bytes = 0;   ///< of the model, in pinned host memory
};

/// One sequence and its KV. Move-only; one thread at a time, except for `cancel`, `length` and `capacity`.
class Session {
 public:
  Session() = default;
  /// Takes ownership of a handle from the C interface.
  explicit Session(kva_session* handle) noexcept : handle_(handle) {}

  static Result<Session> create(const Model& model, const SessionOptions& options = {}) {
    kva_infinigen_options infinigen{};
    const auto c = options.to_c(infinigen);
    if (!c) return c.error();
    kva_session* handle = nullptr;
    if (auto done = detail::check(kva_session_create(model.get(), &*c, &handle)); !done) return std::move(done).error();
    return Session(handle);
  }

  /// Tokens held.
  [[nodiscard]] std::size_t length() const noexcept { return kva_session_length(get()); }
  /// Most tokens that may be held.
  [[nodiscard]] std::size_t capacity() const noexcept { return kva_session_capacity(get()); }

  [[nodiscard]] Result<std::vector<std::uint32_t>> tokens() const {
    return detail::read_counted<std::vector<std::uint32_t>>(
        [&](std::uint32_t* tokens, std::size_t capacity, std::size_t* count) {
          return kva_session_get_tokens(get(), tokens, capacity, count);
        });
  }

  /// Forgets every token from `length` on, and the logits with them.
  Result<void> truncate(std::size_t length) { return detail::check(kva_session_truncate(get(), length)); }

  /// Appends tokens. After an error the session holds what it held before.
  /// `logits`: empty, or room for the vocabulary, filled with those after the last token.
  Result<void> prefill(Tokens tokens, Logits logits = {}) {
    return detail::check(kva_session_prefill(get(), tokens.data(), tokens.size(), logits.data(), logits.size()));
  }

  /// Appends tokens; the i-th result is the log-probability of `tokens[i]` after everything before it (NaN for the first
  /// token of an empty session).
  [[nodiscard]] Result<std::vector<float>> score(Tokens tokens) {
    std::vector<float> scores(tokens.size());
    auto done = detail::check(kva_session_score(get(), tokens.data(), tokens.size(), scores.data()));
    if (!done) return std::move(done).error();
    return scores;
  }

  /// Fills an empty session with `count` tokens whose keys and values are random; nothing is computed. For measuring.
  Result<void> fill(std::size_t count, std::uint64_t seed = 0) {
    return detail::check(kva_session_fill(get(), count, seed));
  }

  /// Appends one token; `logits` as in `prefill`.
  Result<void> decode(std::uint32_t token, Logits logits = {}) {
    return detail::check(kva_session_decode(get(), token, logits.data(), logits.size()));
  }

  /// Writes the logits after the last token, of the last prefill, score or decode, to room for the vocabulary.
  Result<void> get_logits(Logits logits) const {
    return detail::check(kva_session_get_logits(get(), logits.data(), logits.size()));
  }

  /// Picks the next token from the logits of the last prefill or decode; appends nothing.
  [[nodiscard]] Result<std::uint32_t> sample(const SamplingOptions& options = {}) {
    auto sampling = c_sampling(options);
    if (!sampling) return std::move(sampling).error();
    std::uint32_t token = 0;
    auto done = detail::check(kva_session_sample(get(), &sampling->options, &token));
    if (!done) return std::move(done).error();
    return token;
  }

  /// Appends the prompt (empty: goes on from where the session is), then samples and appends tokens until the text ends.
  /// After an error before the first token the session is as it was; after a later one, `cancelled` for instance, it holds
  /// the prompt and every token emitted, and can go on from there.
  Result<Generated> generate(Tokens prompt, const GenerateOptions& options = {}, const TextCallback& callback = {}) {
    auto c = detail::defaults(kva_generate_options_init);
    if (!c) return std::move(c).error();
    auto sampling = c_sampling(options.sampling);
    if (!sampling) return std::move(sampling).error();
    std::vector<const char*> stop_strings;
    stop_strings.reserve(options.stop_strings.size());
    for (const std::string& stop : options.stop_strings) {
      if (auto done = detail::check_no_nul(stop, "stop string"); !done) return std::move(done).error();
      stop_strings.push_back(stop.c_str());
    }
    Text text{callback, {}};

    c->max_tokens = options.max_tokens;
    c->sampling = &sampling->options;
    c->ignore_stop_tokens = options.ignore_model_stop_tokens ? 1 : 0;
    c->stop_tokens = options.stop_tokens.data();
    c->stop_token_count = options.stop_tokens.size();
    c->stop_strings = stop_strings.data();
    c->stop_string_count = stop_strings.size();
    if (callback) {
      c->callback = [](void* data, std::uint32_t token, const char* piece, std::size_t length) -> std::int32_t {
        auto& self = *static_cast<Text*>(data);
        return self.caught.guard(std::int32_t{1}, [&] {
          return static_cast<std::int32_t>(self.callback(token, std::string_view(piece, length)));
        });
      };
      c->user_data = &text;
    }
    kva_generate_result result{};
    result.struct_size = sizeof result;
    auto done = detail::check(kva_session_generate(get(), prompt.data(), prompt.size(), &*c, &result));
    text.caught.rethrow();
    if (!done) return std::move(done).error();
    Generated generated{static_cast<Finish>(result.finish_reason), result.tokens, {}};
    if (result.last_token != KVA_TOKEN_NONE) generated.last_token = result.last_token;
    return generated;
  }

  /// Stops the call in progress, or else the next one, within one layer; it returns `ErrorCode::cancelled`.
  /// From any thread. In a signal handler call `kva_session_cancel` on `get()`.
  void cancel() const noexcept { kva_session_cancel(get()); }
  /// Takes back a cancel that no call has consumed.
  void clear_cancel() const noexcept { kva_session_clear_cancel(get()); }

  [[nodiscard]] Result<Statistics> statistics() const {
    kva_statistics c{};
    c.struct_size = sizeof c;
    if (auto done = detail::check(kva_session_get_statistics(get(), &c)); !done) return std::move(done).error();
    Statistics statistics;
    statistics.prefill_tokens = c.prefill_tokens;
    statistics.prefill_seconds = c.prefill_seconds;
    statistics.decode_tokens = c.decode_tokens;
    statistics.decode_seconds = c.decode_seconds;
    statistics.sampled_tokens = c.sampled_tokens;
    statistics.sample_seconds = c.sample_seconds;
    statistics.kv_device_bytes = c.kv_device_bytes;
    statistics.kv_pinned_bytes = c.kv_pinned_bytes;
    statistics.kv_file_bytes = c.kv_file_bytes;
    statistics.kv_steps = c.kv_steps;
    statistics.kv_selected = c.kv_selected;
    statistics.kv_candidates = c.kv_candidates;
    statistics.kv_attended = c.kv_attended;
    statistics.kv_held = c.kv_held;
    statistics.kv_hits = c.kv_hits;
    statistics.kv_misses = c.kv_misses;
    statistics.kv_host_fetched_bytes = c.kv_host_fetched_bytes;
    statistics.kv_file_fetched_bytes = c.kv_file_fetched_bytes;
    statistics.kv_file_read_bytes = c.kv_file_read_bytes;
    statistics.kv_read_seconds = c.kv_read_seconds;
    statistics.kv_wait_seconds = c.kv_wait_seconds;
    statistics.kv_evicted = c.kv_evicted;
    statistics.kv_corrected = c.kv_corrected;
    statistics.kv_link_seconds = c.kv_link_seconds;
    statistics.kv_index_bytes = c.kv_index_bytes;
    statistics.kv_cache_bytes = c.kv_cache_bytes;
    statistics.scratch_bytes = c.scratch_bytes;
    statistics.scratch_pinned_bytes = c.scratch_pinned_bytes;
    return statistics;
  }
  Result<void> reset_statistics() { return detail::check(kva_session_reset_statistics(get())); }

  [[nodiscard]] kva_session* get() const noexcept { return handle_.get(); }
  [[nodiscard]] explicit operator bool() const noexcept { return handle_ != nullptr; }

 private:
  struct Text {
    const TextCallback& callback;
    detail::Caught caught;
  };
  /// C options, and what they point to. Moving a vector does not move its elements.
  struct Sampling {
    kva_sampling_options options;
    std::vector<kva_logit_bias> bias;
  };

  static Result<Sampling> c_sampling(const SamplingOptions& options) {
    auto c = detail::defaults(kva_sampling_options_init);
    if (!c) return std::move(c).error();
    Sampling sampling{*c, {}};
    sampling.bias.reserve(options.logit_bias.size());
    for (const LogitBias& bias : options.logit_bias) sampling.bias.push_back({bias.token, bias.bias});
    sampling.options.temperature = options.temperature;
    sampling.options.top_k = options.top_k;
    sampling.options.top_p = options.top_p;
    sampling.options.min_p = options.min_p;
    sampling.options.repetition_penalty = options.repetition_penalty;
    sampling.options.frequency_penalty = options.frequency_penalty;
    sampling.options.presence_penalty = options.presence_penalty;
    sampling.options.penalty_window = options.penalty_window;
    sampling.options.seed = options.seed;
    sampling.options.logit_bias = sampling.bias.data();
    sampling.options.logit_bias_count = sampling.bias.size();
    return sampling;
  }

  detail::Owned<kva_session, kva_session_free> handle_;
};

/// One decode step of several sessions of one model: appends `tokens[i]` to `*sessions[i]`. All of them, or none.
/// `logits`: empty, or sessions x vocabulary.
inline Result<void> decode_batch(View<Session* const> sessions, Tokens tokens, Logits logits = {}) {
  if (sessions.size() != tokens.size()) {
    return Error(ErrorCode::invalid_argument, "decode_batch: " + std::to_string(tokens.size()) + " tokens for " +
                                                  std::to_string(sessions.size()) + " sessions; one each is needed");
  }
  std::vector<kva_session*> handles;
  handles.reserve(sessions.size());
  for (const Session* session : sessions) handles.push_back(session == nullptr ? nullptr : session->get());
  return detail::check(
      kva_batch_decode(handles.data(), tokens.data(), handles.size(), logits.data(), logits.size()));
}

}  // namespace kva

#endif  // KVAHEAD_HPP
