#include "kvahead.hpp"

kva::Result<kva::Model> load_elsewhere(const char* path);

int main() {
  const auto model = load_elsewhere("/nowhere");
  return !model && model.error().code() == kva::ErrorCode::not_found && !kva::version().empty() ? 0 : 1;
}
