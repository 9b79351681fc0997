#define STEPS tarsia_merge_avx2
#define LANES 8
#include "body.h"
