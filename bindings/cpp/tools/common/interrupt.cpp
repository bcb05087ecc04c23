#include "interrupt.hpp"

#include <atomic>
#include <csignal>

namespace interrupt {
namespace {

std::atomic<int> signal_number{0};
std::atomic<kva_session*> watched{nullptr};
static_assert(std::atomic<int>::is_always_lock_free && std::atomic<kva_session*>::is_always_lock_free,
              "a signal handler may touch lock-free atomics only");

extern "C" void on_signal(int number) {
  signal_number = number;
  kva_session_cancel(watched);  // ignores NULL
}

}  // namespace

void install() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool requested() noexcept { return signal_number != 0; }

Watch::Watch(const kva::Session& session) noexcept {
  watched = session.get();
  if (requested()) session.cancel();  // it came before there was anything to cancel
}

Watch::~Watch() { watched = nullptr; }

int exit_status() noexcept { return 128 + signal_number; }

}  // namespace interrupt
