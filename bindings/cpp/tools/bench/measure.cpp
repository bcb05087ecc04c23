#include "measure.hpp"

#include <algorithm>
#include <chrono>

#include "../common/interrupt.hpp"
#include "../common/machine.hpp"
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

}  // namespace

double Spread::median() const {
  std::vector<double> sorted = samples;
  std::sort(sorted.begin(), sorted.end());
  const std::size_t half = sorted.size() / 2;
  return sorted.size() % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

double Spread::min() const { return *std::min_element(samples.begin(), samples.end()); }
double Spread::max() const { return *std::max_element(samples.begin(), samples.end()); }

kva::SessionOptions session_options(const Options& options, std::uint64_t capacity) {
  kva::SessionOptions session;
  session.policy = options.policy;
  session.kv_dtype = options.kv_dtype;
  session.capacity = capacity;
  return session;
}

void warm_up(const kva::Model& model, const Options& options) {
  const kva::ModelInfo info = model.info().value();
  const std::size_t tokens = static_cast<std::size_t>(std::min<std::uint64_t>(8, info.context_length - 1));
  kva::Session session = kva::Session::create(model, session_options(options, 0)).value();
  session.prefill(random_tokens(tokens, info.vocabulary_size, options.seed)).value();
  session.decode(0).value();
}

Row measure(const kva::Model& model, const Options& options, std::uint64_t context, std::uint64_t batch,
            const RowProgress& progress) {
  const std::uint32_t vocabulary = model.info().value().vocabulary_size;
  std::vector<kva::Session> sessions;
  std::vector<float> logits(static_cast<std::size_t>(batch) * vocabulary);
  Row row;
  row.context = context;
  row.batch = batch;
  machine::reset_peak_memory();

  for (std::uint64_t repetition = 0; repetition < options.repetitions; ++repetition) {
    const double done = static_cast<double>(repetition) / static_cast<double>(options.repetitions);
    if (repetition == 0 || !options.prefill_once) {
      sessions.clear();  // gives its KV back before more is taken
      double time = 0;
      for (std::uint64_t i = 0; i < batch; ++i) {
        check_interrupt();
        progress(done, "prefill");
        sessions.push_back(kva::Session::create(model, session_options(options, context + options.steps)).value());
        if (context == 0) continue;
        const auto prompt = random_tokens(context, vocabulary, options.seed + i);
        const interrupt::Watch watch(sessions.back());
        time += seconds([&] { sessions.back().prefill(prompt, {logits.data(), vocabulary}).value(); });
      }
      if (context != 0) row.prefill.samples.push_back(static_cast<double>(context * batch) / time);
    } else {
      for (kva::Session& session : sessions) session.truncate(context).value();
    }

    std::vector<kva::Session*> all;
    for (kva::Session& session : sessions) all.push_back(&session);
    double time = 0;
    for (std::uint64_t step = 0; step < options.steps; ++step) {
      check_interrupt();
      progress(done, "decode");
      const auto tokens = random_tokens(all.size(), vocabulary, options.seed + step);
      time += seconds([&] { kva::decode_batch(all, tokens, logits).value(); });
    }
    row.decode.samples.push_back(static_cast<double>(options.steps * batch) / time);
  }

  for (const kva::Session& session : sessions) {
    const kva::Statistics statistics = session.statistics().value();
    row.kv_bytes += statistics.kv_device_bytes + statistics.kv_pinned_bytes + statistics.kv_file_bytes;
  }
  row.peak_memory_bytes = machine::peak_memory_bytes();
  return row;
}

}  // namespace bench
