#include "options.hpp"

namespace evaluate {

bool parse(int argc, char** argv, Options& options) {
  args::Parser parser("kva-evaluate",
                      "How well a model predicts a text: mean negative log likelihood (NLL, natural logarithm) and "
                      "perplexity.");
  options.model.declare(parser, false);
  parser.choice("--policy", "what a layer attends (default full)", program::policies(), options.policy);
  parser.choice("--kv-dtype", "type of keys and values; auto: that of the weights (default auto)", program::dtypes(), options.kv_dtype);

  parser.group("Text");
  parser.option("--text", "FILE", "a text; names of special tokens in it mean the token; - is standard input",
                options.text);
  parser.option("--token-ids", "FILE", "instead: a JSON array of token ids, or an object with token_ids", options.token_ids);

  parser.group("Evaluation");
  parser.option("--prefill", "P", "leave the first P positions out of the mean (default 0)", options.prefill);
  parser.flag("--stepwise", "run the positions from P on one decode step at a time, as a generation does (slower)",
              options.stepwise);
  parser.option("--json", "FILE", "write the results to FILE as well", options.json);

  parser.epilog(
      "Position i is where token i went in and token i+1 is predicted: nll[i] is the negative log likelihood of\n"
      "token i+1 after tokens 0 to i. Of n tokens there are n-1 positions; the mean is over positions P to n-2.\n"
      "The JSON holds mean_nll, perplexity, positions (how many the mean is over) and nll (of all n-1).\n"
      "\n"
      "Examples:\n"
      "  kva-evaluate --model model.gguf --text book.txt\n"
      "  kva-evaluate --model model.gguf --token-ids emma-2k.json --prefill 1024 --json result.json\n");
  if (!parser.parse(argc, argv)) return false;
  options.model.check();

  if (options.text.empty() == options.token_ids.empty()) {
    throw args::UsageError(options.text.empty() ? "nothing to evaluate: give --text FILE or --token-ids FILE"
                                                : "--text and --token-ids exclude each other");
  }
  return true;
}

}  // namespace evaluate
