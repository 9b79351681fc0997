/* Any processor, any even block, any range: what the vector kernels fall to at the edges of their whole blocks. */
#include "kernel.h"

/* A block holds 16 different numbers at most: they are scaled and rounded once, then looked up. */
static void decode_run(const uint8_t *codes, int64_t first, int64_t n, const float *levels, float scale, void *out,
                       int dtype) {
    float wide[16];
    uint16_t half[16];
    for (int k = 0; k < 16; k++) wide[k] = levels[k] * scale;
    if (dtype == TARSIA4_FLOAT32) {
        for (int64_t i = 0; i < n; i++) {
            int64_t at = first + i;
            ((float *)out)[i] = wide[codes[at >> 1] >> (at & 1 ? 0 : 4) & 15];
        }
        return;
    }
    for (int k = 0; k < 16; k++) half[k] = to_half(wide[k], dtype);
    for (int64_t i = 0; i < n; i++) {
        int64_t at = first + i;
        ((uint16_t *)out)[i] = half[codes[at >> 1] >> (at & 1 ? 0 : 4) & 15];
    }
}

void tarsia4_decode_span(const tarsia4_weight *weight, int64_t first, int64_t last, void *out, int dtype) {
    char *to = out;
    while (first < last) {
        int64_t block = first / weight->block, end = (block + 1) * weight->block;
        if (end > last) end = last;
        decode_run(weight->codes, first, end - first, weight->levels, block_scale(weight, block), to, dtype);
        to += (end - first) * number_size(dtype);
        first = end;
    }
}

static void decode(const uint8_t *codes, const float *scales, int64_t blocks, const float *levels, void *out,
                   int dtype) {
    char *to = out;
    for (int64_t b = 0; b < blocks; b++, codes += VECTOR_BLOCK / 2, to += VECTOR_BLOCK * number_size(dtype))
        decode_run(codes, 0, VECTOR_BLOCK, levels, scales[b], to, dtype);
}

/* Codes of n numbers at most VECTOR_BLOCK: bounds below each, counted bound by bound, which compilers do many at a time
 * and processors without guessing. */
static void nearest(const float *values, int64_t n, const tarsia4_grid *grid, uint8_t *places) {
    int32_t below[VECTOR_BLOCK] = {0};
    for (int k = 0; k < 15; k++)
        for (int64_t i = 0; i < VECTOR_BLOCK; i++) below[i] += grid->bounds[k] < values[i];
    for (int64_t i = 0; i < n; i++) places[i] = grid->order[below[i]];
}

int tarsia4_encode_block(const void *w, int dtype, int64_t first, int64_t n, int whole, const tarsia4_grid *grid,
                         uint8_t *codes, float *absmax) {
    /* Magnitudes compare as integers, and there a NaN is larger than everything: one pass finds both. */
    float values[VECTOR_BLOCK];
    uint32_t top = 0;
    for (int64_t at = 0, some; at < n; at += some) {
        some = n - at < VECTOR_BLOCK ? n - at : VECTOR_BLOCK;
        widen(w, dtype, first + at, some, values);
        for (int64_t i = 0; i < some; i++) {
            uint32_t magnitude = float_bits(values[i]) & 0x7fffffffu;
            top = magnitude > top ? magnitude : top;
        }
    }
    if (top >= 0x7f800000u) return TARSIA4_NOT_FINITE;
    float largest = bits_float(top), floored = largest < 1e-38f ? 1e-38f : largest, inverse = 1.0f / floored;
    *absmax = whole ? largest : floored;
    for (int64_t at = 0; at < n; at += VECTOR_BLOCK) {
        int64_t some = n - at < VECTOR_BLOCK ? n - at : VECTOR_BLOCK, even = some + some % 2;
        uint8_t places[VECTOR_BLOCK];
        if (some < VECTOR_BLOCK) memset(values, 0, sizeof values); /* a zero fills up an odd end */
        widen(w, dtype, first + at, some, values);
        for (int64_t i = 0; i < some; i++) values[i] = whole ? values[i] * inverse : values[i] / floored;
        nearest(values, even, grid, places);
        for (int64_t i = 0; i < even; i += 2) codes[(at + i) / 2] = (uint8_t)(places[i] << 4 | places[i + 1]);
    }
    return TARSIA4_OK;
}

static int encode(const void *w, int dtype, int64_t blocks, const tarsia4_grid *grid, uint8_t *codes, float *absmax) {
    int result = TARSIA4_OK;
    for (int64_t b = 0; b < blocks && result == TARSIA4_OK; b++, codes += VECTOR_BLOCK / 2)
        result = tarsia4_encode_block(w, dtype, b * VECTOR_BLOCK, VECTOR_BLOCK, 1, grid, codes, absmax + b);
    return result;
}

static void dot(const float *w, const float *x, int64_t stride, int64_t n, int64_t m, float *sums) {
    for (int64_t i = 0; i < m; i++, x += stride) {
        /* Eight sums side by side: vectors without leave to reorder an addition. */
        float part[8] = {0};
        int64_t k = 0;
        for (; k + 8 <= n; k += 8)
            for (int j = 0; j < 8; j++) part[j] += w[k + j] * x[k + j];
        for (; k < n; k++) part[k & 7] += w[k] * x[k];
        sums[i] += ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
    }
}

const tarsia4_kernel tarsia4_kernel_portable = {.decode = decode, .encode = encode, .dot = dot};
