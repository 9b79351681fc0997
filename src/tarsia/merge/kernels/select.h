/* Which of many magnitudes is the k-th largest. */
#ifndef TARSIA_MERGE_SELECT_H
#define TARSIA_MERGE_SELECT_H

#include <stdint.h>

/* Digits of the 31 bits of a magnitude, from the top: how far down each lies, and how wide it is. */
enum { DIGITS = 3, DIGIT = 11, DIGIT_VALUES = 1 << DIGIT };
static const int DIGIT_AT[DIGITS] = {20, 10, 0};

typedef struct {
    uint32_t bits;   /* the value, or what is known of it so far */
    int64_t rank;    /* 1: the largest of those that share these bits */
    int64_t sharing; /* how many share them */
} selection;

/* Narrow `found` by the histogram of the next digit. */
static inline void narrow(selection *found, const int64_t *histogram, int digit) {
    int value = DIGIT_VALUES - 1;
    for (; value > 0 && found->rank > histogram[value]; value--) found->rank -= histogram[value];
    found->bits |= (uint32_t)value << DIGIT_AT[digit];
    found->sharing = histogram[value];
}

static inline int digit_of(uint32_t bits, int digit) {
    return (int)(bits >> DIGIT_AT[digit]) & (digit ? (DIGIT_VALUES >> 1) - 1 : DIGIT_VALUES - 1);
}

/* Whether `bits` agrees with what is known before this digit. */
static inline int in_play(uint32_t bits, const selection *found, int digit) {
    return !digit || bits >> DIGIT_AT[digit - 1] == found->bits >> DIGIT_AT[digit - 1];
}

/* The rank-th largest of n, 1 <= rank <= n; its `rank` is then the place among its equals. */
selection tarsia_merge_select(const uint32_t *bits, int64_t n, int64_t rank);

#endif
