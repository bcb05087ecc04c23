#include "options.hpp"

#include <algorithm>

namespace bench {

bool parse(int argc, char** argv, Options& options) {
  args::Parser parser("kva-bench",
                      "Measures prefill and decode. For each context length and batch size: a prefill of every sequence, "
                      "then decode steps of the whole batch, repeated. Prompts are random token ids.");
  options.model.declare(parser, true);
  std::vector<std::string> compare;
  options.policy.declare(parser);

  parser.group("Measurement");
  parser.option("--context", "LIST", "tokens of each prompt, as 1,512,4096 (default 512); 0: decode from the empty context",
                options.contexts);
  parser.option("--batch", "LIST", "sequences decoded together (default 1)", options.batches);
  parser.option("--gen", "N", "decode steps in each repetition (default 32)", options.steps);
  parser.option("--repeat", "R", "repetitions (default 3)", options.repetitions);
  parser.flag("--no-prefill-repeat", "prefill once; later repetitions cut the sequences back to their prompts",
              options.prefill_once);
  parser.flag("--fill", "in place of each prefill, fill the KV with random numbers: decode at lengths that take too long to prefill",
              options.fill);
  parser.repeated("--compare", "SPEC",
                  "measure several policies in turn, within each repetition: flags without their dashes, as "
                  "'policy=infinigen;select=0.02'; may be given many times; the sequences of all "
                  "of them are in memory at once. Ratios are to the first",
                  compare);
  parser.option("--seed", "N", "of the prompts (default 0)", options.seed);
  parser.option("--json", "FILE", "write the results to FILE as well", options.json);
  parser.option("--timeline", "FILE",
                "on a GPU: write when each operation of one more decode step began and ended to FILE, in Chrome's trace format "
                "(tools/timeline.py draws it)",
                options.timeline);
  parser.flag("--interactive", "be told what to measure, a line of JSON at a time (see below)", options.interactive);

  parser.epilog(
      "A decode step counts from the call to the return of its logits; sampling is not part of it. Rates are tokens of\n"
      "the whole batch per second: the median of the repetitions, with the least and the greatest.\n"
      "\n"
      "What a policy selected, found on the device, fetched and kept is over the decode steps of all repetitions; reads\n"
      "are hidden as far as no step stood still for them. How long the link was busy is measured in further steps, which\n"
      "the rates leave out: from events before and behind what fetches entries, so a few microseconds a layer are the events'.\n"
      "\n"
      "What a step reads of memory is every weight once for the batch, the entries attended and the index; not the weights\n"
      "that queries are predicted with, nor activations.\n"
      "\n"
      "With --interactive each line of standard input is a request, and its answer is one line:\n"
      "  {\"op\": \"describe\"}                           machine, model, options\n"
      "  {\"op\": \"fill\", \"depth\": D}                   prefill a sequence of D tokens and keep it\n"
      "  {\"op\": \"prefill\", \"tokens\": P}               prefill P tokens into an empty sequence\n"
      "  {\"op\": \"decode\", \"depth\": D, \"tokens\": N}    N steps from depth D (0: empty), then cut back to D\n"
      "Measurements answer {\"tokens\", \"seconds\", \"others\"}, others being the share of all processors that other\n"
      "processes used meanwhile; a request that fails answers {\"error\"}. The program ends with its input.\n"
      "\n"
      "Examples:\n"
      "  kva-bench --model model.gguf --context 1,4096 --gen 64 --repeat 5 --json result.json\n"
      "  kva-bench --model model.gguf --context 7900 --compare policy=full --compare 'policy=infinigen;select=0.02,0.05'\n"
      "  kva-bench --shape llama-2-7b --random-weights 1 --context 2048 --batch 1,4 --no-prefill-repeat\n");
  if (!parser.parse(argc, argv)) return false;
  options.model.check();
  if (options.policy.file_keep) throw args::UsageError("--kv-keep has no use here: one session follows the other");
  if (compare.empty()) {
    options.policy.check();
    options.policies.push_back({options.policy, {}, policy::name(options.policy.policy), {}});
  } else {
    if (options.interactive) throw args::UsageError("--compare and --interactive exclude each other");
    options.policies = grid::expand(compare, options.policy);
  }

  if (!options.timeline.empty() &&
      (options.interactive || options.policies.size() * options.contexts.size() * options.batches.size() != 1)) {
    throw args::UsageError("--timeline is of one step: one --context, one --batch, one policy, and not --interactive");
  }
  const auto zero = [](std::uint64_t value) { return value == 0; };
  if (options.steps == 0) throw args::UsageError("--gen must be at least 1");
  if (options.repetitions == 0) throw args::UsageError("--repeat must be at least 1");
  if (std::any_of(options.batches.begin(), options.batches.end(), zero)) {
    throw args::UsageError("--batch must be at least 1");
  }
  return true;
}

}  // namespace bench
