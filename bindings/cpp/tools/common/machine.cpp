#include "machine.hpp"

#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

namespace machine {
namespace {

/// What follows "`key`:" in a file of such lines.
std::string field(const char* file, const std::string& key) {
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos || line.compare(0, key.size(), key) != 0) continue;
    const std::size_t start = line.find_first_not_of(" \t", colon + 1);
    return start == std::string::npos ? "" : line.substr(start);
  }
  return "";
}

/// Processor seconds since boot that were not idle, over all processors.
double busy_seconds() {
  std::ifstream file("/proc/stat");
  std::string label;
  file >> label;
  double busy = 0;
  for (int i = 0; i < 8; ++i) {
    double ticks = 0;
    file >> ticks;
    const bool idle = i == 3 || i == 4;  // user nice system IDLE IOWAIT irq softirq steal
    if (!idle) busy += ticks;
  }
  return busy / static_cast<double>(sysconf(_SC_CLK_TCK));
}

double own_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace

std::uint64_t peak_memory_bytes() {
  const std::string kibibytes = field("/proc/self/status", "VmHWM");
  return std::strtoull(kibibytes.c_str(), nullptr, 10) * 1024;
}

bool reset_peak_memory() {
  std::ofstream file("/proc/self/clear_refs");
  file << "5" << std::flush;
  return file.good();
}

nlohmann::json describe() {
  utsname system{};
  uname(&system);
  std::array<double, 3> load{};
  getloadavg(load.data(), static_cast<int>(load.size()));
  return {{"cpu", field("/proc/cpuinfo", "model name")},
          {"processors", std::thread::hardware_concurrency()},
          {"kernel", std::string(system.sysname) + " " + system.release},
          {"load", load}};
}

Contention::Contention() : busy_(busy_seconds()), own_(own_seconds()), began_(std::chrono::steady_clock::now()) {}

Contention::Reading Contention::read() const {
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count();
  const double busy = busy_seconds() - busy_;
  const double own = own_seconds() - own_;
  const double all = seconds * std::max(1u, std::thread::hardware_concurrency());
  return {seconds, all > 0 ? std::clamp((busy - own) / all, 0.0, 1.0) : 0};  // ticks may say more than all
}

}  // namespace machine
