/* Calls one function of the kernel library on what a file holds, and writes its result to another: for a processor that is
 * emulated. `driver IN OUT IN OUT ...`; IN: 14 int64 numbers (below), one float (offset), then array after array. */
#include "tarsia4.h"

#include <stdio.h>
#include <stdlib.h>

enum { OP, ISA, DTYPE, ROWS, COLUMNS, BLOCK, NESTED, M, BIAS, ROW0, ROW1, COL0, COL1, STRIDE, NUMBERS };

static void *taken(FILE *file, int64_t bytes) {
    void *room = malloc((size_t)bytes + 1);
    if (!room || fread(room, 1, (size_t)bytes, file) != (size_t)bytes) exit(2);
    return room;
}

static void given(FILE *file, const void *from, int64_t bytes) {
    if (fwrite(from, 1, (size_t)bytes, file) != (size_t)bytes) exit(3);
}

static int run(FILE *in, FILE *out) {
    const int64_t *n = taken(in, NUMBERS * 8);
    float offset = *(float *)taken(in, 4);
    int64_t size = n[DTYPE] == TARSIA4_FLOAT32 ? 4 : 2, numbers = n[ROWS] * n[COLUMNS];
    int64_t blocks = (numbers + n[BLOCK] - 1) / n[BLOCK], bytes = (numbers + 1) / 2;
    int isa = (int)n[ISA], dtype = (int)n[DTYPE];
    const float *levels = taken(in, 16 * 4);
    int64_t result = tarsia4_supported(isa) ? 0 : TARSIA4_BAD_ISA;
    if (n[OP] == 0) {
        const void *w = taken(in, numbers * size);
        uint8_t *codes = calloc(1, (size_t)bytes);
        float *absmax = calloc((size_t)blocks, 4);
        if (!result) result = tarsia4_quantise(isa, w, dtype, numbers, n[BLOCK], levels, codes, absmax, NULL);
        given(out, &result, 8), given(out, codes, bytes), given(out, absmax, blocks * 4);
        return fclose(out) ? 4 : 0;
    }
    tarsia4_weight weight = {.codes = taken(in, bytes), .levels = levels, .offset = offset};
    weight.rows = n[ROWS], weight.columns = n[COLUMNS], weight.block = n[BLOCK];
    if (n[NESTED]) {
        weight.scale_codes = taken(in, blocks);
        weight.scale_levels = taken(in, 256 * 4);
        weight.scale_absmax = taken(in, (blocks + 255) / 256 * 4);
    } else {
        weight.absmax = taken(in, blocks * 4);
    }
    int64_t room = n[OP] == 1 ? (n[ROW1] - n[ROW0]) * n[STRIDE] * size : n[M] * n[ROWS] * size;
    char *to = calloc(1, (size_t)room);
    if (n[OP] == 1 && !result)
        result = tarsia4_dequantise(isa, &weight, n[ROW0], n[ROW1], n[COL0], n[COL1], to, dtype, n[STRIDE], NULL);
    if (n[OP] == 2 && !result) {
        const void *x = taken(in, n[M] * n[COLUMNS] * size), *bias = n[BIAS] ? taken(in, n[ROWS] * size) : NULL;
        result = tarsia4_rows(isa, &weight, x, dtype, n[M], bias, to, NULL);
    }
    given(out, &result, 8), given(out, to, room);
    return fclose(out) ? 4 : 0;
}

int main(int count, char **names) {
    for (int k = 1; k + 1 < count; k += 2) {
        FILE *in = fopen(names[k], "rb"), *out = fopen(names[k + 1], "wb");
        int failed = in && out ? run(in, out) : 1;
        if (failed) return failed;
        fclose(in);
    }
    return 0;
}
