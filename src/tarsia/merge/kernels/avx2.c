#define STEPS tarsia_merge_avx2
#define LANES 8
#define FUSED(a, b, c) _mm256_fmadd_ps(a, b, c)
#define TIMES(a, b) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))

#include <immintrin.h>

#include "body.h"
