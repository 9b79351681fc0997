/* The steps in plain C, for a compiler to do many numbers at a time with the flags of the including source, which has
 * defined STEPS, the name of its table, LANES, how many numbers a register has, and FUSED, a * b + c. What it defines
 * besides it does by hand: SUM of a register's numbers, SOME first bytes (fewer than a register's) and TWO half registers. */
#include "steps.h"

#include <math.h>

#define INLINE static inline __attribute__((always_inline))

/* As many numbers as a register has, and the bits of each. */
typedef float numbers __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t words __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t marks __attribute__((vector_size(LANES * sizeof(float))));

enum { HALF = LANES / 2, AHEAD = 1 << 12 };

INLINE numbers load(const float *x) {
    numbers all;
    memcpy(&all, x, sizeof all);
    return all;
}

INLINE void put(float *x, numbers all) { memcpy(x, &all, sizeof all); }

INLINE numbers all_of(float x) { return x - (numbers){0}; }

INLINE words bits_at(const void *x) {
    words all;
    memcpy(&all, x, sizeof all);
    return all;
}

#if !defined(SUM)
INLINE float SUM(numbers all) {
    float of[LANES];
    memcpy(of, &all, sizeof of);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) of[i] += of[i + n];
    return of[0];
}
#endif

#if !defined(SOME)
INLINE words SOME(const void *x, int64_t bytes) {
    words all = {0};
    memcpy(&all, x, (size_t)bytes);
    return all;
}
#endif

#if !defined(TWO)
INLINE words TWO(const void *p, const void *q) {
    words all;
    memcpy(&all, p, sizeof all / 2);
    memcpy((char *)&all + sizeof all / 2, q, sizeof all / 2);
    return all;
}
#endif

/* Two numbers of bfloat16 stand in 32 bits: the first in the lower half. */
INLINE numbers evens(words pairs) { return (numbers)(pairs << 16); }
INLINE numbers odds(words pairs) { return (numbers)(pairs & 0xffff0000u); }

#include "turn.h"

#include "products.h"

#include "attention.h"

const tarsia_serve_steps STEPS = {arrange, down, up, attend};
