#include "trace.hpp"

#include <array>
#include <cstring>
#include <stdexcept>

#include "files.hpp"

namespace trace {
namespace {

constexpr char magic[] = "KVATRACE";
constexpr std::size_t magic_length = sizeof magic - 1;
constexpr std::uint32_t version = 2;

class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path), file_(std::fopen(path.c_str(), "rb")) {
    if (!file_) files::fail(path, "open it");
  }

  [[nodiscard]] bool at_end() {
    const int next = std::fgetc(file_.get());
    if (next == EOF) return true;
    std::ungetc(next, file_.get());
    return false;
  }

  void bytes(unsigned char* to, std::size_t count) {
    if (std::fread(to, 1, count, file_.get()) != count) {
      if (std::ferror(file_.get()) != 0) files::fail(path_, "read it");
      fail("it ends in the middle of a record");
    }
    at_ += count;
  }

  std::uint32_t u32() {
    std::array<unsigned char, 4> b{};
    bytes(b.data(), b.size());
    return std::uint32_t{b[0]} | std::uint32_t{b[1]} << 8 | std::uint32_t{b[2]} << 16 | std::uint32_t{b[3]} << 24;
  }

  std::uint16_t u16() {
    std::array<unsigned char, 2> b{};
    bytes(b.data(), b.size());
    return static_cast<std::uint16_t>(b[0] | b[1] << 8);
  }

  /// Ascending numbers below `bound`. They are read one by one: a count that lies costs no memory.
  void rows(std::vector<std::uint32_t>& to, std::uint32_t count, std::uint32_t bound) {
    to.clear();
    for (std::uint32_t i = 0; i < count; ++i) {
      const std::uint32_t row = u32();
      if (row >= bound || (!to.empty() && row <= to.back())) {
        fail("row " + std::to_string(row) + " is not above the one before it and below " + std::to_string(bound));
      }
      to.push_back(row);
    }
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(path_ + ": at byte " + std::to_string(at_) + ": " + what);
  }

 private:
  std::string path_;
  files::File file_;
  std::uint64_t at_ = 0;
};

}  // namespace

Header read(const std::string& path, const std::function<void(const Header&, const Record&)>& take) {
  Reader reader(path);
  std::array<unsigned char, magic_length> start{};
  reader.bytes(start.data(), start.size());
  if (std::memcmp(start.data(), magic, magic_length) != 0) reader.fail("this is no trace: it does not begin with KVATRACE");
  if (const std::uint32_t found = reader.u32(); found != version) {
    reader.fail("version " + std::to_string(found) + " of the trace format is not known: 2 is");
  }
  Header header;
  header.layers = reader.u32();
  header.kv_heads = reader.u32();
  reader.u32();  // reserved
  constexpr std::uint32_t most = 65536;  // what the records' 16 bits can name
  if (header.layers > most || header.kv_heads > most) reader.fail("more layers or KV heads than a record can name");

  Record record;
  while (!reader.at_end()) {
    record.step = reader.u32();
    record.layer = reader.u16();
    record.kv_head = reader.u16();
    if (record.layer >= header.layers || record.kv_head >= header.kv_heads) {
      reader.fail("layer " + std::to_string(record.layer) + ", KV head " + std::to_string(record.kv_head) +
                  " of a model with " + std::to_string(header.layers) + " and " + std::to_string(header.kv_heads));
    }
    record.candidates = reader.u32();
    const std::uint32_t selected = reader.u32();
    record.hits = reader.u32();
    const std::uint32_t missed = reader.u32();
    const std::uint32_t corrected = reader.u32();
    if (std::uint64_t{record.hits} + missed != selected || selected > record.candidates) {
      reader.fail(std::to_string(selected) + " selected of " + std::to_string(record.candidates) + " are not " +
                  std::to_string(record.hits) + " hits and " + std::to_string(missed) + " misses");
    }
    reader.rows(record.selected, selected, record.step);
    reader.rows(record.missed, missed, record.step);
    reader.rows(record.corrected, corrected, record.step);
    take(header, record);
  }
  return header;
}

}  // namespace trace
