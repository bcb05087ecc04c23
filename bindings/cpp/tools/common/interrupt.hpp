/// Ctrl-C: cancels the session that is being watched, so that the program can finish what it has to say.
/// A second Ctrl-C ends the program.

#pragma once

#include "kvahead.hpp"

namespace interrupt {

/// From now on SIGINT and SIGTERM set `requested()`.
void install();

/// Whether a signal came.
[[nodiscard]] bool requested() noexcept;

/// While it lives, a signal also cancels `session`.
class Watch {
 public:
  explicit Watch(const kva::Session& session) noexcept;
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
  ~Watch();
};

/// The exit status of a program that was interrupted, by the shells' convention.
[[nodiscard]] int exit_status() noexcept;

}  // namespace interrupt
