#include "args.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>

#include "kvahead.hpp"

namespace args {
namespace {

constexpr std::size_t width = 100;
constexpr std::size_t help_column = 32;

template <class T>
void convert_integer(std::string_view text, T& value) {
  const char* end = text.data() + text.size();
  const auto [stop, problem] = std::from_chars(text.data(), end, value);
  if (problem != std::errc{} || stop != end) {
    throw UsageError("must be a whole number from 0 to " + std::to_string(std::numeric_limits<T>::max()));
  }
}

/// `text` in lines that leave `indent` columns free; the first is already indented.
std::string wrapped(const std::string& text, std::size_t indent) {
  std::string lines;
  std::size_t column = indent;
  for (std::size_t start = 0; start < text.size();) {
    const std::size_t end = std::min(text.find(' ', start), text.size());
    const std::size_t length = end - start;
    if (column != indent && column + 1 + length > width) {
      lines += "\n" + std::string(indent, ' ');
      column = indent;
    } else if (column != indent) {
      lines += ' ';
      ++column;
    }
    lines.append(text, start, length);
    column += length;
    start = end + 1;
  }
  return lines;
}

/// Insertions, deletions, replacements and swaps of neighbours from one word to the other.
std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> before;  // the row before the last
  std::vector<std::size_t> last(b.size() + 1);
  std::iota(last.begin(), last.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::vector<std::size_t> row(b.size() + 1, i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min({last[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1), last[j] + 1, row[j - 1] + 1});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) row[j] = std::min(row[j], before[j - 2] + 1);
    }
    before = std::exchange(last, std::move(row));
  }
  return last.back();
}

}  // namespace

void convert(std::string_view text, std::string& value) { value = text; }
void convert(std::string_view text, std::uint32_t& value) { convert_integer(text, value); }
void convert(std::string_view text, std::uint64_t& value) { convert_integer(text, value); }

void convert(std::string_view text, float& value) {
  const std::string terminated(text);
  char* end = nullptr;
  value = std::strtof(terminated.c_str(), &end);
  if (terminated.empty() || *end != '\0' || !std::isfinite(value)) throw UsageError("must be a number");
}

Parser::Parser(std::string program, std::string summary)
    : program_(std::move(program)), summary_(std::move(summary)) {}

void Parser::group(std::string title) { groups_.push_back({std::move(title), {}}); }

void Parser::repeated(std::string names, std::string placeholder, std::string help, std::vector<std::string>& target) {
  add(std::move(names), std::move(placeholder), std::move(help), [&target](std::string_view text) { target.emplace_back(text); });
}

void Parser::flag(std::string names, std::string help, bool& target) {
  add(std::move(names), "", std::move(help), [&target](std::string_view) { target = true; });
}

void Parser::epilog(std::string text) { epilog_ = std::move(text); }

void Parser::add(std::string names, std::string placeholder, std::string help, std::function<void(std::string_view)> set) {
  if (groups_.empty()) group("Options");
  Flag flag{{}, names, std::move(placeholder), std::move(help), std::move(set)};
  for (std::size_t start = 0; start < names.size();) {
    const std::size_t end = std::min(names.find(", ", start), names.size());
    flag.names.push_back(names.substr(start, end - start));
    start = end + 2;
  }
  groups_.back().flags.push_back(std::move(flag));
}

const Parser::Flag& Parser::find(std::string_view name) const {
  const std::string* nearest = nullptr;
  std::size_t least = 3;
  for (const Group& group : groups_) {
    for (const Flag& flag : group.flags) {
      for (const std::string& known : flag.names) {
        if (known == name) return flag;
        const std::size_t far = distance(name, known);
        if (far < least && known.size() > 2) {
          least = far;
          nearest = &known;
        }
      }
    }
  }
  throw UsageError("unknown option " + std::string(name) +
                   (nearest == nullptr ? "" : " (did you mean " + *nearest + "?)"));
}

bool Parser::parse(int argc, char** argv) const {
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (word == "--help" || word == "-h") {
      std::fputs(help().c_str(), stdout);
      return false;
    }
    if (word == "--version") {
      std::printf("%s %s (library %s)\n", program_.c_str(), KVA_VERSION, kva_version());
      return false;
    }
    if (word.size() < 2 || word[0] != '-') {
      throw UsageError("unexpected argument '" + std::string(word) + "': every value belongs to an option");
    }
    const std::size_t equals = word.substr(0, 2) == "--" ? word.find('=') : std::string_view::npos;
    const std::string name(word.substr(0, equals));
    const Flag& flag = find(name);
    std::string_view value;
    if (flag.placeholder.empty()) {
      if (equals != std::string_view::npos) throw UsageError(name + " takes no value");
    } else if (equals != std::string_view::npos) {
      value = word.substr(equals + 1);
    } else if (++i < argc) {
      value = argv[i];
    } else {
      throw UsageError(name + " needs a value: " + name + " " + flag.placeholder);
    }
    set(flag, name, value);
  }
  return true;
}

void Parser::assign(const std::string& name, std::string_view value) const {
  const Flag& flag = find(name);
  if (flag.placeholder.empty() != value.empty()) {
    throw UsageError(name + (value.empty() ? " needs a value: " + name + " " + flag.placeholder : " takes no value"));
  }
  set(flag, name, value);
}

void Parser::set(const Flag& flag, const std::string& name, std::string_view value) {
  try {
    flag.set(value);
  } catch (const UsageError& error) {
    throw UsageError(name + " '" + std::string(value) + "': " + error.what());
  }
}

std::string Parser::help() const {
  std::string text = wrapped(summary_, 0) + "\n\nUsage: " + program_ + " [options]\n";
  for (const Group& group : groups_) {
    text += "\n" + group.title + ":\n";
    for (const Flag& flag : group.flags) {
      std::string line = "  " + flag.label + (flag.placeholder.empty() ? "" : " " + flag.placeholder);
      line.resize(std::max(line.size() + 2, help_column), ' ');
      if (line.size() > help_column) line += "\n" + std::string(help_column, ' ');
      text += line + wrapped(flag.help, help_column) + "\n";
    }
  }
  text += "\nOther:\n  -h, --help                    show this and exit\n  --version                     show the version and exit\n";
  if (!epilog_.empty()) text += "\n" + epilog_;
  return text;
}

}  // namespace args
