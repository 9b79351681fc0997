#define STEPS tarsia_serve_portable
#define LANES 4
#define FUSED(a, b, c) ((a) * (b) + (c))

#include "body.h"
