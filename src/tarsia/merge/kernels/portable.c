#define STEPS tarsia_merge_portable
#define LANES 4
#include "body.h"
