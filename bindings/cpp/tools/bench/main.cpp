/// kva-bench: speed and memory of prefill and decode.

#include <cstdio>
#include <iostream>

#include "../common/files.hpp"
#include "../common/interrupt.hpp"
#include "../common/json.hpp"
#include "../common/machine.hpp"
#include "../common/terminal.hpp"
#include "interactive.hpp"
#include "measure.hpp"
#include "report.hpp"

namespace bench {
namespace {

/// Before the first measurement, not after an hour of them.
void check_lengths(const kva::Model& model, const Options& options) {
  const std::uint64_t longest = model.info().value().context_length;
  for (const std::uint64_t context : options.contexts) {
    if (context > longest || options.steps > longest - context) {
      throw args::UsageError("--context " + std::to_string(context) + " and --gen " + std::to_string(options.steps) +
                             " exceed the model's context length of " + std::to_string(longest));
    }
  }
}

int run(const Options& options) {
  const kva::Model model = options.model.load();
  if (!options.interactive) check_lengths(model, options);
  if (!options.json.empty()) files::check_writable(options.json);
  if (!options.timeline.empty()) {
    files::check_writable(options.timeline);
    model.set_timing(kva::Timing::operations).value();  // an error where the device cannot
    model.set_timing(kva::Timing::off).value();
  }
  warm_up(model, options);
  if (options.interactive) {
    Interactive(model, options).serve(std::cin, std::cout);
    return interrupt::requested() ? interrupt::exit_status() : 0;
  }

  print_heading(model, options);
  print_columns(options);
  std::uint64_t peak = machine::peak_memory_bytes();
  std::vector<Row> rows;
  try {
    for (const std::uint64_t context : options.contexts) {
      for (const std::uint64_t batch : options.batches) {
        {
          terminal::Progress progress("context " + std::to_string(context) + ", batch " + std::to_string(batch));
          const auto more = measure(model, options, context, batch,
                                    [&](double fraction, const std::string& doing) { progress.show(fraction, doing); });
          rows.insert(rows.end(), more.begin(), more.end());
        }
        for (auto row = rows.end() - static_cast<std::ptrdiff_t>(options.policies.size()); row != rows.end(); ++row) {
          print(model, *row, options);
        }
        peak = std::max(peak, rows.back().peak_memory_bytes);
      }
    }
  } catch (const Interrupted&) {
  } catch (const kva::Exception& error) {
    if (!interrupt::requested() || error.code() != kva::ErrorCode::cancelled) throw;
  }
  std::printf("\npeak memory %s\n", program::bytes(peak).c_str());
  if (!options.json.empty()) files::write(options.json, json::text(to_json(model, options, rows, peak), 2) + "\n");
  if (!interrupt::requested()) return 0;
  std::fputs("kva-bench: interrupted; the rows above are complete\n", stderr);
  return interrupt::exit_status();
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  return program::run("kva-bench", [&] {
    bench::Options options;
    return bench::parse(argc, argv, options) ? bench::run(options) : 0;
  });
}
