#include "options.hpp"

namespace generate {

bool parse(int argc, char** argv, Options& options) {
  args::Parser parser("kva-generate",
                      "Continues a prompt, or answers it with --chat, and streams the text to standard output. "
                      "Speed goes to standard error. Ctrl-C stops.");
  options.model.declare(parser, false);
  parser.option("-c, --context", "N", "most tokens to hold, prompt included; 0: the model's context length (default 0)",
                options.context);
  options.policy.declare(parser);

  parser.group("Prompt");
  parser.option("-p, --prompt", "TEXT", "the prompt", options.prompt);
  parser.option("-f, --prompt-file", "FILE", "read the prompt from FILE; - is standard input", options.prompt_file);
  parser.flag("--chat", "the prompt is a user's message: put it in the model's chat template", options.chat);
  parser.option("--system", "TEXT", "with --chat: the system message", options.system);

  kva::SamplingOptions& sampling = options.generation.sampling;
  parser.group("Generation");
  parser.option("-n, --max-tokens", "N", "stop after N tokens; 0: when the model ends the text or the context is full (default 0)",
                options.generation.max_tokens);
  parser.repeated("--stop", "TEXT", "stop before TEXT; may be given many times", options.generation.stop_strings);
  parser.option("-t, --temperature", "T", "0 picks the likeliest token, higher is more random (default 0)",
                sampling.temperature);
  parser.option("--top-k", "K", "sample from the K likeliest tokens; 0: off (default 0)", sampling.top_k);
  parser.option("--top-p", "P", "sample from the likeliest tokens that reach probability P; 1: off (default 1)",
                sampling.top_p);
  parser.option("--min-p", "P", "drop tokens less likely than P times the likeliest; 0: off (default 0)", sampling.min_p);
  parser.option("--repetition-penalty", "X", "divide the odds of tokens seen before; 1: off (default 1)",
                sampling.repetition_penalty);
  parser.option("--frequency-penalty", "X", "lower tokens by X for each time seen; 0: off (default 0)",
                sampling.frequency_penalty);
  parser.option("--presence-penalty", "X", "lower tokens that were seen by X; 0: off (default 0)",
                sampling.presence_penalty);
  parser.option("--seed", "N", "the same seed and prompt give the same text (default 0)", sampling.seed);
  parser.flag("--stats", "print more than the speed: load time, weights, memory, where the KV is, what was fetched, why it ended", options.statistics);

  parser.epilog(
      "Examples:\n"
      "  kva-generate --model model.gguf --prompt 'The capital of France is' -n 20\n"
      "  kva-generate --model model.gguf --chat --prompt 'Why is the sky blue?' --temperature 0.7 --seed 1\n"
      "  kva-generate --model model.gguf --chat --prompt-file long.txt --policy infinigen --kv-tier file --cache 10% --stats\n"
      "  cat question.txt | kva-generate --model model.gguf --chat --prompt-file -\n");
  if (!parser.parse(argc, argv)) return false;
  options.model.check();
  options.policy.check();

  if (options.prompt.has_value() == options.prompt_file.has_value()) {
    throw args::UsageError(options.prompt ? "--prompt and --prompt-file exclude each other"
                                          : "no prompt: give --prompt TEXT or --prompt-file FILE");
  }
  if (options.system && !options.chat) throw args::UsageError("--system needs --chat");
  return true;
}

}  // namespace generate
