/* AVX-512 with BF16: vdpbf16ps multiplies 32 pairs a time. Bits are not its business: decode and encode are AVX-512's. */
#if defined(__x86_64__)

#include "avx512.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

/* 64 bytes are 32 words of 4 codes. Shifted down by 4 j, every word k offers code number 4 k + (j ^ 1) of the 128: x is
 * laid out to match, 4 registers for a pair of blocks. */
static int64_t arranged(int64_t columns) { return pairs_of(columns) * PAIR * (int64_t)sizeof(uint16_t); }

static void arrange(const void *x, int dtype, int64_t columns, void *out) {
    (void)dtype; /* bfloat16: tarsia4_rows sends nothing else here */
    const uint16_t *from = x;
    uint16_t *to = out;
    for (int64_t pair = 0; pair < pairs_of(columns); pair++)
        for (int64_t j = 0; j < 4; j++)
            for (int64_t k = 0; k < 32; k++) {
                int64_t at = pair * PAIR + 4 * k + (j ^ 1);
                *to++ = at < columns ? from[at] : 0;
            }
}

INLINE __m512bh load_x(const char *row, int j) { return (__m512bh)_mm512_load_si512(row + 64 * j); }

INLINE void multiply_pair(__m512i codes, __m512 scale, __m512i levels, const char *x, int64_t stride, int m,
                          __m512 *sums) {
    __m512bh w[4];
    for (int j = 0; j < 4; j++)
        w[j] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * (unsigned)j), levels);
    for (int i = 0; i < m; i++) {
        const char *row = x + i * stride;
        __m512 even = _mm512_dpbf16_ps(_mm512_setzero_ps(), w[0], load_x(row, 0));
        __m512 odd = _mm512_dpbf16_ps(_mm512_setzero_ps(), w[1], load_x(row, 1));
        even = _mm512_dpbf16_ps(even, w[2], load_x(row, 2));
        odd = _mm512_dpbf16_ps(odd, w[3], load_x(row, 3));
        sums[i] = _mm512_fmadd_ps(_mm512_add_ps(even, odd), scale, sums[i]);
    }
}

INLINE void multiply_rows(const uint8_t *codes, const float *scales, int64_t blocks, __m512i levels, const char *x,
                          int64_t stride, int m, float *sums) {
    __m512 part[8];
    for (int i = 0; i < m; i++) part[i] = _mm512_setzero_ps();
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2, codes += PAIR / 2, x += PAIR * sizeof(uint16_t)) {
        __m512 scale = _mm512_mask_broadcastss_ps(_mm512_set1_ps(scales[b]), 0xff00, _mm_load_ss(scales + b + 1));
        multiply_pair(_mm512_loadu_si512(codes), scale, levels, x, stride, m, part);
    }
    if (b < blocks)
        multiply_pair(_mm512_maskz_loadu_epi32(0x00ff, codes), _mm512_maskz_broadcastss_ps(0x00ff, _mm_load_ss(scales + b)),
                      levels, x, stride, m, part);
    for (int i = 0; i < m; i++) sums[i] += _mm512_reduce_add_ps(part[i]);
}

/* A permutation of words reads five bits of an index: with the table twice in the register the fifth means nothing. */
static __m512i table_twice(const float *levels) {
    uint16_t words[32];
    for (int k = 0; k < 32; k++) words[k] = to_bfloat16(levels[k & 15]);
    return _mm512_loadu_si512(words);
}

static void multiply(const uint8_t *codes, const float *scales, int64_t blocks, const float *levels,
                     const void *arranged_x, int64_t stride, int64_t m, float *sums) {
    __m512i table = table_twice(levels);
    const char *x = arranged_x;
    for (; m >= 8; m -= 8, x += 8 * stride, sums += 8) multiply_rows(codes, scales, blocks, table, x, stride, 8, sums);
    for (; m >= 4; m -= 4, x += 4 * stride, sums += 4) multiply_rows(codes, scales, blocks, table, x, stride, 4, sums);
    for (; m >= 2; m -= 2, x += 2 * stride, sums += 2) multiply_rows(codes, scales, blocks, table, x, stride, 2, sums);
    if (m) multiply_rows(codes, scales, blocks, table, x, stride, 1, sums);
}

const tarsia4_kernel tarsia4_kernel_avx512_bf16 = {
    .decode = tarsia4_avx512_decode,
    .encode = tarsia4_avx512_encode,
    .dot = tarsia4_avx512_dot,
    .arranged = arranged,
    .arrange = arrange,
    .multiply = multiply,
};

#endif
