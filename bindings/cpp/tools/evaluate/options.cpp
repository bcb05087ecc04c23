#include "options.hpp"

namespace evaluate {
namespace {

constexpr const char* epilog =
    "Position i is where token i went in and token i+1 is predicted: nll[i] is the negative log likelihood of\n"
    "token i+1 after tokens 0 to i. Of n tokens there are n-1 positions; the mean is over positions P to n-2.\n"
    "The JSON holds mean_nll, perplexity, positions (how many the mean is over) and nll (of all n-1).\n"
    "\n"
    "With any policy but full, tokens 0 to P-1 are a dense prefill, and every later one is a decode step under the\n"
    "policy (teacher forcing); what is counted is counted over these steps. kv_fraction_selected is over speculated\n"
    "layers, kv_fraction_attended over all (resident ones count as 1), misses_per_step_fraction is what a step\n"
    "fetches, as a share of the past.\n"
    "\n"
    "A sweep's SPEC lists flags without their dashes, each with the values that it takes in turn; every combination\n"
    "is evaluated. A JSON FILE lists such strings, or objects: [{\"policy\": \"window\", \"budget\": [0.05, 0.1]}].\n"
    "In the plot the setting that varies last in a SPEC makes a curve's points. The relative size of the KV is the share\n"
    "that is attended, over all layers, times the bits that a number takes over 16 (8 for int8, 4.5 for int4).\n"
    "\n"
    "Examples:\n"
    "  kva-evaluate --model model.gguf --text book.txt\n"
    "  kva-evaluate --model model.gguf --token-ids emma-2k.json --prefill 1024 --policy infinigen --json result.json\n"
    "  kva-evaluate --model model.gguf --token-ids emma-2k.json --prefill 1024 --csv sweep.csv --svg sweep.svg \\\n"
    "    --sweep policy=full --sweep 'policy=window;budget=0.05,0.1,0.2' --sweep 'policy=infinigen;select=0.01,0.02,0.05'\n"
    "  kva-evaluate --read-trace run.trace --heatmap run.svg\n";

void check_heatmap(const Options& options) {
  if (!options.heatmap.empty() && !options.sweep.empty()) {
    throw args::UsageError("--heatmap shows one evaluation, and --sweep makes many");
  }
  if (!options.heatmap.empty() && options.policy.policy != kva::Policy::infinigen) {
    throw args::UsageError("--heatmap needs --policy infinigen (or --read-trace FILE): the others fetch nothing by choice");
  }
}

}  // namespace

bool parse(int argc, char** argv, Options& options) {
  args::Parser parser("kva-evaluate",
                      "How well a model predicts a text: mean negative log likelihood (NLL, natural logarithm) and "
                      "perplexity.");
  std::vector<std::string> sweeps;
  options.model.declare(parser, false);
  options.policy.declare(parser);

  parser.group("Text");
  parser.option("--text", "FILE", "a text; names of special tokens in it mean the token; - is standard input",
                options.text);
  parser.option("--token-ids", "FILE", "instead: a JSON array of token ids, or an object with token_ids", options.token_ids);

  parser.group("Evaluation");
  parser.option("--prefill", "P", "leave the first P positions out of the mean (default 0)", options.prefill);
  parser.flag("--stepwise",
              "run the tokens from P on one decode step at a time, as a generation does (slower); with any policy but full "
              "it is always so",
              options.stepwise);
  parser.option("--json", "FILE", "write the results to FILE as well", options.json);

  parser.group("Many policies");
  parser.repeated("--sweep", "SPEC|FILE.json", "evaluate a grid of policies (see below); may be given many times", sweeps);
  parser.option("--csv", "FILE", "with --sweep: write a line for each evaluation", options.csv);
  parser.option("--svg", "FILE", "with --sweep: draw perplexity against the relative size of the KV", options.svg);
  parser.choice("--svg-x", "with --svg: the share of the KV that is attended, selected, or fetched in a step (default attended)",
                program::Words<Across>{{"attended", Across::attended}, {"selected", Across::selected}, {"fetched", Across::fetched}},
                options.svg_x);

  parser.group("What was fetched");
  parser.option("--heatmap", "FILE", "draw the share of entries that was fetched, by layer, as SVG", options.heatmap);
  parser.choice("--heatmap-by", "columns of the heat map: when it was fetched, or which tokens were (default step)",
                program::Words<Columns>{{"step", Columns::step}, {"position", Columns::position}}, options.heatmap_by);
  parser.option("--read-trace", "FILE", "draw the heat map of a trace that --trace has written, and do nothing else",
                options.read_trace);
  parser.epilog(epilog);
  if (!parser.parse(argc, argv)) return false;

  if (!options.read_trace.empty()) {
    if (options.heatmap.empty()) throw args::UsageError("--read-trace needs --heatmap FILE");
    return true;
  }
  options.model.check();
  if (options.text.empty() == options.token_ids.empty()) {
    throw args::UsageError(options.text.empty() ? "nothing to evaluate: give --text FILE or --token-ids FILE"
                                                : "--text and --token-ids exclude each other");
  }
  if (sweeps.empty()) options.policy.check();
  options.sweep = grid::expand(sweeps, options.policy);
  if (options.sweep.empty() && !(options.csv.empty() && options.svg.empty())) {
    throw args::UsageError(std::string(options.csv.empty() ? "--svg" : "--csv") + " needs --sweep SPEC");
  }
  check_heatmap(options);
  return true;
}

}  // namespace evaluate
