/* The steps with registers of 16 numbers; by hand only what a compiler does not find. */
#define STEPS tarsia_merge_avx512
#define LANES 16
#define FUSED(a, b, c) _mm512_fmadd_ps(a, b, c)
#define TIMES(a, b) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
#define HAS_BETWEEN

#include <immintrin.h>
#include <stdint.h>

static int64_t between(const float *x, int64_t n, uint32_t low, uint32_t span, uint32_t *places) {
    const __m512i mask = _mm512_set1_epi32(0x7fffffff), from = _mm512_set1_epi32((int)low);
    const __m512i most = _mm512_set1_epi32((int)span), step = _mm512_set1_epi32(16);
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += 16, at = _mm512_add_epi32(at, step)) {
        __mmask16 there = n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : (__mmask16)0xffff;
        __m512i bits = _mm512_and_si512(_mm512_maskz_loadu_epi32(there, x + i), mask);
        __mmask16 in = _mm512_mask_cmple_epu32_mask(there, _mm512_sub_epi32(bits, from), most);
        _mm512_mask_compressstoreu_epi32(places + found, in, at);
        found += __builtin_popcount(in);
    }
    return found;
}

#include "body.h"
