#include "program.hpp"

#include <array>
#include <cstdarg>
#include <cstdio>
#include <exception>

#include "files.hpp"
#include "interrupt.hpp"
#include "terminal.hpp"

namespace program {
int run(const std::string& name, const std::function<int()>& body) {
  try {
    interrupt::install();
    return body();
  } catch (const args::UsageError& error) {
    std::fprintf(stderr, "%s: %s\nTry '%s --help'.\n", name.c_str(), error.what(), name.c_str());
    return 2;
  } catch (const std::exception& error) {
    if (interrupt::requested()) {
      std::fprintf(stderr, "%s: interrupted\n", name.c_str());
      return interrupt::exit_status();
    }
    std::fprintf(stderr, "%s: %s\n", name.c_str(), error.what());
    return 1;
  }
}

std::string format(const char* form, ...) {
  va_list arguments;
  va_list again;
  va_start(arguments, form);
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, form, arguments);
  va_end(arguments);
  std::string text(static_cast<std::size_t>(length) + 1, '\0');
  std::vsnprintf(text.data(), text.size(), form, again);
  va_end(again);
  text.pop_back();
  return text;
}

double rounded(float value) { return std::stod(format("%.7g", static_cast<double>(value))); }

std::string bytes(std::uint64_t count) {
  static constexpr std::array<const char*, 5> units = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(count);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < units.size()) {
    value /= 1024;
    ++unit;
  }
  return format(unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
}

Words<kva::DType> dtypes() {
  return {{"auto", kva::DType::automatic}, {"f32", kva::DType::f32}, {"f16", kva::DType::f16}, {"bf16", kva::DType::bf16}};
}

Words<kva::Device> devices() {
  return {{"auto", kva::Device::automatic}, {"cpu", kva::Device::cpu}, {"cuda", kva::Device::cuda}};
}

std::string name(kva::DType dtype) { return word(dtype, dtypes()); }

void ModelFlags::declare(args::Parser& parser, bool shapes) {
  parser.group("Model");
  parser.option("--model", "PATH", "a Hugging Face folder or a .gguf file", path);
  if (shapes) {
    parser.option("--shape", "NAME",
                  "instead of --model: opt-6.7b, opt-13b, opt-30b, llama-2-7b, llama-2-13b, llama-3-8b or smollm2-135m, "
                  "with random weights",
                  shape);
    parser.option("--random-weights", "SEED", "the weights of --shape", random_weights);
  }
  parser.choice("--dtype", "type of the weights in memory; auto: as stored, quantized ones kept in blocks on the CPU where that can be, else as bf16 (default auto)", dtypes(), dtype);
  parser.choice("--device", "where to compute; auto: cuda where it works, cpu otherwise (default auto)", devices(), device);
  parser.flag("--copy-weights", "read all weights of a folder into memory, rather than map its files", copy_weights);
  parser.option("--threads", "N", "threads to compute with; 0: all processors (default 0)", threads);
  parser.option("--speculation-cache", "FOLDER",
                "keep what infinigen learns from the calibration text there (default: next to the model)", speculation_cache);
  parser.option("--calibration", "FILE", "a text to calibrate infinigen on (default: one of the library's own)", calibration);
}

void ModelFlags::check() const {
  if (path.empty() == shape.empty()) {
    throw args::UsageError(path.empty() ? "no model: give --model PATH" : "--model and --shape exclude each other");
  }
  if (!shape.empty() && !random_weights) throw args::UsageError("--shape needs --random-weights SEED");
  if (shape.empty() && random_weights) throw args::UsageError("--random-weights needs --shape NAME");
}

kva::Model ModelFlags::load() const {
  terminal::Progress progress(path.empty() ? "making " + shape : "loading " + path);
  kva::ModelOptions options;
  options.device = device;
  options.threads = threads;
  options.dtype = dtype;
  options.copy_weights = copy_weights;
  options.speculation_cache_path = speculation_cache;
  if (!calibration.empty()) options.calibration_text = files::read(calibration);
  options.progress = [&](float fraction) {
    progress.show(static_cast<double>(fraction));
    return interrupt::requested() ? kva::Flow::stop : kva::Flow::proceed;
  };
  return path.empty() ? kva::Model::random(shape, *random_weights, options).value()
                      : kva::Model::load(path, options).value();
}

}  // namespace program
