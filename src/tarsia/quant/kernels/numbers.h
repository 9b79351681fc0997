/* bfloat16 and float16 <-> float32, to the nearest, ties to even, in plain integers: the same bits everywhere. */
#ifndef TARSIA4_NUMBERS_H
#define TARSIA4_NUMBERS_H

#include "tarsia4.h"

#include <string.h>

static inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float from_bfloat16(uint16_t half) { return bits_float((uint32_t)half << 16); }

static inline uint16_t to_bfloat16(float value) {
    uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float from_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest >= 0x0400u) return bits_float(sign | ((rest << 13) + 0x38000000u));
    /* A subnormal is a whole number of 2^-24: exact in float32. */
    return bits_float(sign | float_bits((float)rest * 0x1p-24f));
}

static inline uint16_t to_float16(float value) {
    uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds past 65504 */
    if (rest < 0x38800000u) {
        /* Below 2^-14 the step is 2^-24; adding 0.5 leaves float32 just that step and rounds as asked. */
        return (uint16_t)(sign | (float_bits(bits_float(rest) + 0.5f) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

static inline float load_number(const void *from, int dtype, int64_t i) {
    if (dtype == TARSIA4_FLOAT32) return ((const float *)from)[i];
    uint16_t half = ((const uint16_t *)from)[i];
    return dtype == TARSIA4_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

static inline uint16_t to_half(float value, int dtype) {
    return dtype == TARSIA4_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}

static inline void store_number(void *to, int dtype, int64_t i, float value) {
    if (dtype == TARSIA4_FLOAT32) ((float *)to)[i] = value;
    else ((uint16_t *)to)[i] = to_half(value, dtype);
}

static inline int64_t number_size(int dtype) { return dtype == TARSIA4_FLOAT32 ? 4 : 2; }

/* n numbers from the first on -> float32; a loop for each dtype, or no compiler does many at a time. */
static inline void widen(const void *from, int dtype, int64_t first, int64_t n, float *to) {
    const uint16_t *halves = (const uint16_t *)from + first;
    if (dtype == TARSIA4_FLOAT32) memcpy(to, (const float *)from + first, (size_t)n * sizeof *to);
    else if (dtype == TARSIA4_BFLOAT16)
        for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(halves[i]);
    else
        for (int64_t i = 0; i < n; i++) to[i] = from_float16(halves[i]);
}

/* The address of number i. */
static inline const void *number_at(const void *from, int dtype, int64_t i) {
    return (const char *)from + i * number_size(dtype);
}

#endif
