#include <kvahead.h>
#include <kvahead.h> /* twice: the include guard */

const char *version_in_c(void);

const char *version_in_c(void) { return kva_version(); }
