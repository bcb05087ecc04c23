#include <kvahead.h>

extern "C" const char *version_in_cpp() { return kva_version(); }
