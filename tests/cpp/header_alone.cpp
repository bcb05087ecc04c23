// Nothing before it: the header brings what it needs.
#include "kvahead.hpp"
