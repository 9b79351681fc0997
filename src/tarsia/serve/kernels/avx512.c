/* The steps with registers of 16 numbers; by hand only what a compiler does not find. */
#define STEPS tarsia_serve_avx512
#define LANES 16
#define FUSED(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM(a) _mm512_reduce_add_ps(a)
#define SOME(p, bytes) ((words)_mm512_maskz_loadu_epi8((__mmask64)((1ull << (bytes)) - 1), p))
#define TWO(p, q)                                                                                                      \
    ((words)_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(p))),                       \
                               _mm256_loadu_si256((const __m256i *)(q)), 1))

#include <immintrin.h>

#include "body.h"
