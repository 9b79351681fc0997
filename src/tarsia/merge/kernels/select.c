#include "select.h"

#include <string.h>

selection tarsia_merge_select(const uint32_t *bits, int64_t n, int64_t rank) {
    selection found = {0, rank, n};
    int64_t histogram[DIGIT_VALUES];
    for (int digit = 0; digit < DIGITS; digit++) {
        memset(histogram, 0, sizeof histogram);
        for (int64_t i = 0; i < n; i++)
            if (in_play(bits[i], &found, digit)) histogram[digit_of(bits[i], digit)]++;
        narrow(&found, histogram, digit);
    }
    return found;
}
