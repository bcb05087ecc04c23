/// Command lines: declare each flag next to the variable it fills, and get parsing, checks and --help from that.
///
///     args::Parser parser("kva-generate", "Generate text.");
///     parser.option("--model", "PATH", "the model", model);
///     if (!parser.parse(argc, argv)) return 0;  // --help or --version was answered
///
/// Accepts `--name value`, `--name=value` and short names; `--` is not needed, as no program here takes operands.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace args {

/// A command line that cannot be obeyed. The message is for the person who typed it.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Text to value; throws UsageError with what would be right.
void convert(std::string_view text, std::string& value);
void convert(std::string_view text, std::uint32_t& value);
void convert(std::string_view text, std::uint64_t& value);
void convert(std::string_view text, float& value);

template <class T>
void convert(std::string_view text, std::optional<T>& value) {
  T inner{};
  convert(text, inner);
  value = std::move(inner);
}

/// "1,2,3"
template <class T>
void convert(std::string_view text, std::vector<T>& values) {
  values.clear();
  for (std::size_t start = 0; start <= text.size();) {
    const std::size_t end = std::min(text.find(',', start), text.size());
    convert(text.substr(start, end - start), values.emplace_back());
    start = end + 1;
  }
}

class Parser {
 public:
  Parser(std::string program, std::string summary);

  /// Begins a headed part of --help.
  void group(std::string title);

  /// A flag with a value. `names`: "--model", or "-n, --max-tokens".
  template <class T>
  void option(std::string names, std::string placeholder, std::string help, T& target) {
    add(std::move(names), std::move(placeholder), std::move(help), [&target](std::string_view text) { convert(text, target); });
  }

  /// A flag with a value that may be given many times.
  void repeated(std::string names, std::string placeholder, std::string help, std::vector<std::string>& target);

  /// A flag whose value is one of a few words.
  template <class T>
  void choice(std::string names, std::string help, std::vector<std::pair<std::string, T>> words, T& target) {
    std::string list;
    for (const auto& word : words) list += (list.empty() ? "" : "|") + word.first;
    add(std::move(names), list, std::move(help), [&target, words = std::move(words), list](std::string_view text) {
      for (const auto& [word, value] : words) {
        if (word == text) {
          target = value;
          return;
        }
      }
      throw UsageError("must be one of " + list);
    });
  }

  /// A flag with a value that `set` takes; it throws UsageError with what would be right.
  void custom(std::string names, std::string placeholder, std::string help, std::function<void(std::string_view)> set) {
    add(std::move(names), std::move(placeholder), std::move(help), std::move(set));
  }

  /// A flag without a value.
  void flag(std::string names, std::string help, bool& target);

  /// Text under the flags in --help, printed as it is.
  void epilog(std::string text);

  /// Fills the targets. False where --help or --version was asked for and answered. Throws UsageError.
  [[nodiscard]] bool parse(int argc, char** argv) const;

  /// Fills one target, as `--name value` does; `value` is empty for a flag without one. Throws UsageError.
  void assign(const std::string& name, std::string_view value) const;

  [[nodiscard]] std::string help() const;

 private:
  struct Flag {
    std::vector<std::string> names;
    std::string label;        ///< names as in --help
    std::string placeholder;  ///< empty: takes no value
    std::string help;
    std::function<void(std::string_view)> set;
  };
  struct Group {
    std::string title;
    std::vector<Flag> flags;
  };

  static void set(const Flag& flag, const std::string& name, std::string_view value);
  void add(std::string names, std::string placeholder, std::string help, std::function<void(std::string_view)> set);
  [[nodiscard]] const Flag& find(std::string_view name) const;

  std::string program_;
  std::string summary_;
  std::string epilog_;
  std::vector<Group> groups_;
};

}  // namespace args
