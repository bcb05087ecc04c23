/* One of three translation units that include the header. */
#include <string.h>

#include <kvahead.h>

const char *version_in_c(void);
const char *version_in_cpp(void);

int main(void) {
  return strcmp(kva_version(), KVA_VERSION) || strcmp(version_in_c(), KVA_VERSION) || strcmp(version_in_cpp(), KVA_VERSION);
}
