#define STEPS tarsia_merge_avx2
#include "body.h"
