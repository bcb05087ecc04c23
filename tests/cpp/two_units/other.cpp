#include "kvahead.hpp"

kva::Result<kva::Model> load_elsewhere(const char* path);

kva::Result<kva::Model> load_elsewhere(const char* path) { return kva::Model::load(path); }
