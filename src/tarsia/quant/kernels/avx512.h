/* Shared by the two AVX-512 sources. */
#ifndef TARSIA4_AVX512_H
#define TARSIA4_AVX512_H

#include "kernel.h"

/* Of `kernel`, what does not multiply: the bits are fixed, so the BF16 instructions have no part in it. */
void tarsia4_avx512_decode(const uint8_t *codes, const float *scales, int64_t blocks, const float *levels, void *out,
                           int dtype);
void tarsia4_avx512_decode_past(const uint8_t *codes, const float *scales, int64_t blocks, const float *levels,
                                void *out, int dtype);
int tarsia4_avx512_encode(const void *w, int dtype, int64_t blocks, const tarsia4_grid *grid, uint8_t *codes,
                          float *absmax);
void tarsia4_avx512_expand(const uint8_t *codes, int64_t count, const float *levels, float scale, float offset,
                           float *room);
void tarsia4_avx512_dot(const float *w, const float *x, int64_t stride, int64_t n, int64_t m, float *sums);

#endif
