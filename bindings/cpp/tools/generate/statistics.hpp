/// What kva-generate says when the text is out.

#pragma once

#include <string>

#include "../common/policy.hpp"
#include "kvahead.hpp"

namespace generate {

[[nodiscard]] std::string describe(kva::Finish finish);

/// Prints speed to standard error, and with `everything` time, memory, what the policy did and the reason of the end.
void report(const kva::Model& model, const kva::Session& session, const policy::Flags& flags, const std::string& ended,
            bool everything);

}  // namespace generate
