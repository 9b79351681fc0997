/* A change, tile by tile: as it lies in memory, or made of its factors. */
#ifndef TARSIA_MERGE_TILES_H
#define TARSIA_MERGE_TILES_H

#include "steps.h"

typedef struct {
    const tarsia_merge_steps *steps;
    int64_t rows, columns;
} grid;

typedef struct {
    int64_t row, rows, column, width;
} tile;

/* Bands of TILE_ROWS rows: what is spread over threads. */
static inline int64_t bands_of(const grid *all) { return (all->rows + TILE_ROWS - 1) / TILE_ROWS; }

static inline int64_t tiles_of(const grid *all) { return (all->columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }

static inline tile tile_at(const grid *all, int64_t band, int64_t number) {
    tile at = {band * TILE_ROWS, TILE_ROWS, number * TILE_COLUMNS, TILE_COLUMNS};
    if (at.row + at.rows > all->rows) at.rows = all->rows - at.row;
    if (at.column + at.width > all->columns) at.width = all->columns - at.column;
    return at;
}

static inline int64_t place_of(const grid *all, const tile *at, int64_t row) {
    return (at->row + row) * all->columns + at->column;
}

/* The first number of the tile; *stride from row to row. `room`: TILE_ROWS * TILE_COLUMNS numbers. */
static inline const float *numbers_of(const grid *all, const tarsia_merge_delta *delta, const tile *at, float *room,
                                      int64_t *stride) {
    if (delta->dense) {
        *stride = all->columns;
        return delta->dense + place_of(all, at, 0);
    }
    *stride = TILE_COLUMNS;
    all->steps->product(delta->up + at->row * delta->rank, delta->down + at->column, delta->rank, all->columns,
                        at->rows, at->width, room);
    return room;
}

/* About how many numbers a band of this change touches, for the team. */
static inline int64_t cost_of(const grid *all, const tarsia_merge_delta *delta) {
    return TILE_ROWS * all->columns * (delta->dense ? 1 : 1 + delta->rank / 4);
}

/* The steps of an instruction set that is compiled in, or NULL. */
const tarsia_merge_steps *tarsia_merge_steps_of(int isa);

int tarsia_merge_sound(const tarsia_merge_delta *deltas, int64_t count, int64_t rows, int64_t columns);

#endif
