#define STEPS tarsia_serve_avx2
#define LANES 8
#define FUSED(a, b, c) _mm256_fmadd_ps(a, b, c)

#include <immintrin.h>

#include "body.h"
