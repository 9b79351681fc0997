/* A square of registers turned: number i of register j becomes number j of register i. By halves: in round s numbers
 * whose places differ in the bit s change with registers whose places do. `count` registers, a power of two; where it
 * is HALF each half of the registers is turned by itself. All is unrolled: the places are constants. */
#if LANES == 4
#define PLACES(of) {of(0), of(1), of(2), of(3)}
#elif LANES == 8
#define PLACES(of) {of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)}
#else
#define PLACES(of)                                                                                                     \
    {of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10), of(11), of(12), of(13), of(14), of(15)}
#endif

#define ROUND(s, count)                                                                                                \
    do {                                                                                                               \
        const words lower = PLACES(LOWER_##s), upper = PLACES(UPPER_##s);                                              \
        _Pragma("GCC unroll 16") for (int j = 0; j < (count); j++) if (!(j & s)) {                                     \
            words a = v[j], b = v[j + s];                                                                              \
            v[j] = __builtin_shuffle(a, b, lower);                                                                     \
            v[j + s] = __builtin_shuffle(a, b, upper);                                                                 \
        }                                                                                                              \
    } while (0)
#define LOWER(i, s) ((i) & (s) ? LANES + (i) - (s) : (i))
#define UPPER(i, s) ((i) & (s) ? LANES + (i) : (i) + (s))
#define LOWER_1(i) LOWER(i, 1)
#define LOWER_2(i) LOWER(i, 2)
#define LOWER_4(i) LOWER(i, 4)
#define LOWER_8(i) LOWER(i, 8)
#define UPPER_1(i) UPPER(i, 1)
#define UPPER_2(i) UPPER(i, 2)
#define UPPER_4(i) UPPER(i, 4)
#define UPPER_8(i) UPPER(i, 8)

INLINE void turn(words *v, int count) {
    if (count > 1) ROUND(1, count);
    if (count > 2) ROUND(2, count);
#if LANES > 4
    if (count > 4) ROUND(4, count);
#endif
#if LANES > 8
    if (count > 8) ROUND(8, count);
#endif
}
