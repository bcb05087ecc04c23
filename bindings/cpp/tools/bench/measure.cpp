#include "measure.hpp"

#include <algorithm>
#include <chrono>

#include "../common/interrupt.hpp"
#include "../common/machine.hpp"
#include "../common/traffic.hpp"
#include "prompt.hpp"

namespace bench {
namespace {

template <class Work>
double seconds(Work&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void check_interrupt() {
  if (interrupt::requested()) throw Interrupted();
}

/// Called before each piece of work with what it is; throws after Ctrl-C.
using Show = std::function<void(const std::string& doing)>;

/// One policy's sequences.
class Contestant {
 public:
  Contestant(const kva::Model& model, const Options& options, const grid::Point& point, std::uint64_t context, std::uint64_t batch)
      : model_(&model),
        options_(&options),
        session_options_(point.flags.session(context + options.steps)),
        context_(context),
        batch_(batch),
        vocabulary_(model.info().value().vocabulary_size),
        logits_(static_cast<std::size_t>(batch) * vocabulary_) {}

  /// Makes the sequences anew; returns the seconds of their prefills (0 where they are filled instead).
  double prefill(const Show& show) {
    sessions_.clear();  // gives its KV back before more is taken
    double time = 0;
    for (std::uint64_t i = 0; i < batch_; ++i) {
      show("prefill");
      sessions_.push_back(kva::Session::create(*model_, session_options_).value());
      if (context_ == 0) continue;
      const interrupt::Watch watch(sessions_.back());
      if (options_->fill) {
        sessions_.back().fill(context_, options_->seed + i).value();
        continue;
      }
      const auto prompt = random_tokens(context_, vocabulary_, options_->seed + i);
      time += seconds([&] { sessions_.back().prefill(prompt, {logits_.data(), vocabulary_}).value(); });
    }
    return time;
  }

  /// Back to the context. A policy that has dropped for good what it would attend there begins anew.
  void cut_back(const Show& show) {
    for (kva::Session& session : sessions_) {
      const auto done = session.truncate(context_);
      if (done) continue;
      if (done.error().code() != kva::ErrorCode::unsupported) done.value();
      prefill(show);
      return;
    }
  }

  /// Returns the seconds of all steps.
  double decode(const Show& show) { return decode_some(options_->steps, show); }

  /// Share of the steps' time in which entries were on their way from host memory, in steps that measure it; absent where
  /// nothing can be.
  std::optional<double> link_busy(const Show& show) {
    if (!model_->set_timing(kva::Timing::fetches)) return {};
    cut_back(show);
    decode_some(1, show);  // what is measured is captured anew
    cut_back(show);
    decode_some(options_->steps, show);
    const kva::Statistics s = sessions_.front().statistics().value();
    model_->set_timing(kva::Timing::off).value();
    if (!(s.decode_seconds > 0)) return {};
    return s.kv_link_seconds / s.decode_seconds;
  }

  /// Writes the timeline of a step that has been replayed, where --gen lets that be.
  void timeline(const Show& show) {
    model_->set_timing(kva::Timing::operations).value();
    cut_back(show);
    decode_some(std::min<std::uint64_t>(options_->steps, 4), show);
    model_->write_timeline(options_->timeline).value();
    model_->set_timing(kva::Timing::off).value();
  }

  /// Adds the counters of the last decode; the KV is what is held now.
  void count(kva::Statistics& total) const {
    total.kv_device_bytes = total.kv_pinned_bytes = total.kv_file_bytes = 0;
    total.kv_index_bytes = total.kv_cache_bytes = 0;
    for (const kva::Session& session : sessions_) total = traffic::sum(total, session.statistics().value());
  }

 private:
  /// Returns the seconds of all of them.
  double decode_some(std::uint64_t steps, const Show& show) {
    std::vector<kva::Session*> all;
    for (kva::Session& session : sessions_) {
      session.reset_statistics().value();
      all.push_back(&session);
    }
    double time = 0;
    for (std::uint64_t step = 0; step < steps; ++step) {
      show("decode");
      const auto tokens = random_tokens(all.size(), vocabulary_, options_->seed + step);
      time += seconds([&] { kva::decode_batch(all, tokens, logits_).value(); });
    }
    return time;
  }

  const kva::Model* model_;
  const Options* options_;
  kva::SessionOptions session_options_;
  std::uint64_t context_;
  std::uint64_t batch_;
  std::uint32_t vocabulary_;
  std::vector<float> logits_;
  std::vector<kva::Session> sessions_;
};

}  // namespace

double Spread::median() const {
  std::vector<double> sorted = samples;
  std::sort(sorted.begin(), sorted.end());
  const std::size_t half = sorted.size() / 2;
  return sorted.size() % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

double Spread::min() const { return *std::min_element(samples.begin(), samples.end()); }
double Spread::max() const { return *std::max_element(samples.begin(), samples.end()); }

std::uint64_t Row::kv_bytes() const {
  return statistics.kv_device_bytes + statistics.kv_pinned_bytes + statistics.kv_file_bytes;
}

void warm_up(const kva::Model& model, const Options& options) {
  const kva::ModelInfo info = model.info().value();
  const std::size_t tokens = static_cast<std::size_t>(std::min<std::uint64_t>(8, info.context_length - 1));
  const auto prompt = random_tokens(tokens, info.vocabulary_size, options.seed);
  for (const grid::Point& point : options.policies) {
    policy::Flags flags = point.flags;
    flags.file.clear();  // nothing is to be left behind
    flags.trace.clear();
    kva::Session session = kva::Session::create(model, flags.session(0)).value();
    session.prefill(prompt).value();
    session.decode(0).value();
  }
}

std::vector<Row> measure(const kva::Model& model, const Options& options, std::uint64_t context, std::uint64_t batch,
                         const RowProgress& progress) {
  machine::reset_peak_memory();
  std::vector<Contestant> contestants;
  std::vector<Row> rows;
  for (const grid::Point& point : options.policies) {
    contestants.emplace_back(model, options, point, context, batch);
    Row& row = rows.emplace_back();
    row.policy = &point;
    row.context = context;
    row.batch = batch;
  }
  const double turns = static_cast<double>(options.repetitions * rows.size());
  double turn = 0;
  for (std::uint64_t repetition = 0; repetition < options.repetitions; ++repetition) {
    for (std::size_t i = 0; i < rows.size(); ++i, ++turn) {
      const auto show = [&](const std::string& doing) {
        check_interrupt();
        progress(turn / turns, rows.size() == 1 ? doing : rows[i].policy->label + ", " + doing);
      };
      if (repetition == 0 || !options.prefill_once) {
        const double time = contestants[i].prefill(show);
        if (context != 0 && !options.fill) rows[i].prefill.samples.push_back(static_cast<double>(context * batch) / time);
      } else {
        contestants[i].cut_back(show);
      }
      const double time = contestants[i].decode(show);
      rows[i].decode.samples.push_back(static_cast<double>(options.steps * batch) / time);
      rows[i].ratio.samples.push_back(rows[i].decode.samples.back() / rows[0].decode.samples.back());
      contestants[i].count(rows[i].statistics);
    }
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto show = [&](const std::string& doing) {
      check_interrupt();
      progress(1, rows[i].policy->label + ", " + doing + " to measure the link");
    };
    if (rows[i].statistics.kv_host_fetched_bytes != 0) rows[i].link_busy = contestants[i].link_busy(show);
    if (!options.timeline.empty()) contestants[i].timeline(show);
  }
  for (Row& row : rows) row.peak_memory_bytes = machine::peak_memory_bytes();
  return rows;
}

}  // namespace bench
