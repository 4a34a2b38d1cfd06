/* The slot `dot` by AMX: TDPBUSD multiplies 16 rows of 64 unsigned bytes with 16 channels of 64 signed bytes. Sixteen blocks of a panel,
 * one after the other, are such an operand as they lie. Two tiles of rows and two of channels use twice what is loaded once. */
#if defined(__x86_64__)
#include "../table.h"

#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#define TARGET __attribute__((target("amx-tile,amx-int8")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { TILE_ROWS = 16, DEPTH = 64, BLOCK = DEPTH * CLIPFT_INT8_PANEL, SUM_BYTES = CLIPFT_INT8_COLS * sizeof(int32_t) };

/* What LDTILECFG reads. */
typedef struct tile_config {
    uint8_t palette, start_row, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* Sums in registers 0 to 3, rows of x in 4 and 5, both of `rows` rows; panels in 6 and 7. */
INLINE void configure(uint8_t rows)
{
    tile_config config = {.palette = 1};
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = DEPTH, config.rows[i] = i < 6 ? rows : TILE_ROWS;
    __asm__ volatile("" ::"r"(&config) : "memory"); /* gcc 12 takes the next line for a reader of eight bytes alone */
    _tile_loadconfig(&config);
}

static TARGET void enter(void) { configure(TILE_ROWS); }

static TARGET void leave(void) { _tile_release(); }

/* Operands of a step: tiles of rows, x_stride bytes apart, and of panels. */
typedef struct operands {
    const uint8_t *x[2];
    const int8_t *w[2];
    size_t x_stride;
} operands;

INLINE void step(const bool two_rows, const bool two_panels, const operands *o)
{
    _tile_loadd(4, o->x[0], o->x_stride);
    _tile_loadd(6, o->w[0], DEPTH);
    _tile_dpbusd(0, 4, 6);
    if (two_panels) {
        _tile_loadd(7, o->w[1], DEPTH);
        _tile_dpbusd(1, 4, 7);
    }
    if (two_rows) {
        _tile_loadd(5, o->x[1], o->x_stride);
        _tile_dpbusd(2, 5, 6);
        if (two_panels) _tile_dpbusd(3, 5, 7);
    }
}

/* The same with what is left of the depth, `bytes` of a row, beside zeros. */
INLINE void last_step(const bool two_rows, const bool two_panels, const operands *o, int64_t rows, int64_t bytes)
{
    uint8_t x[2][TILE_ROWS * DEPTH] = {{0}};
    int8_t w[2][BLOCK] = {{0}};
    const operands copies = {{x[0], x[1]}, {w[0], w[1]}, DEPTH};
    for (int i = 0; i <= two_rows; ++i)
        for (int64_t r = 0; r < rows; ++r) memcpy(&x[i][r * DEPTH], o->x[i] + r * (int64_t)o->x_stride, (size_t)bytes);
    for (int i = 0; i <= two_panels; ++i) memcpy(w[i], o->w[i], (size_t)(bytes * CLIPFT_INT8_PANEL));
    __asm__ volatile("" ::"r"(x), "r"(w) : "memory"); /* what loads tiles does not say that it reads them */
    step(two_rows, two_panels, &copies);
}

/* One or two tiles of rows, the second at `below`, times one panel or two. */
INLINE void dot_tile(const bool two_rows, const bool two_panels, const clipft_int8_tile *t, const uint8_t *x, const uint8_t *below,
                     const int8_t *w, int32_t *sums, int32_t *sums_below)
{
    operands o = {{x, below}, {w, w + t->w_stride}, (size_t)t->x_stride};
    int64_t k = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; k + DEPTH <= t->depth; k += DEPTH) {
        step(two_rows, two_panels, &o);
        for (int i = 0; i < 2; ++i) o.x[i] += DEPTH, o.w[i] += BLOCK;
    }
    if (k < t->depth) last_step(two_rows, two_panels, &o, t->rows < TILE_ROWS ? t->rows : TILE_ROWS, t->depth - k);
    _tile_stored(0, sums, SUM_BYTES);
    if (two_panels) _tile_stored(1, sums + CLIPFT_INT8_PANEL, SUM_BYTES);
    if (two_rows) _tile_stored(2, sums_below, SUM_BYTES);
    if (two_rows && two_panels) _tile_stored(3, sums_below + CLIPFT_INT8_PANEL, SUM_BYTES);
}

/* The last tile of rows may begin among those of the one before: their sums come out once more. */
INLINE void dot_panels(const bool two_panels, const clipft_int8_tile *t, const int8_t *w, int32_t *sums)
{
    const int64_t last = t->rows > TILE_ROWS ? t->rows - TILE_ROWS : 0;
    for (int64_t i = 0; i < t->rows; i += 2 * TILE_ROWS) {
        const int64_t first = i < last ? i : last, second = i + TILE_ROWS < last ? i + TILE_ROWS : last;
        const uint8_t *x = t->x + first * t->x_stride, *below = t->x + second * t->x_stride;
        int32_t *out = sums + first * CLIPFT_INT8_COLS, *out_below = sums + second * CLIPFT_INT8_COLS;
        if (first < second)
            dot_tile(true, two_panels, t, x, below, w, out, out_below);
        else
            dot_tile(false, two_panels, t, x, below, w, out, out_below);
    }
}

static TARGET void multiply(const clipft_int8_tile *tile, int32_t *sums)
{
    const clipft_int8_tile t = *tile;
    const bool few = t.rows < TILE_ROWS;
    int64_t p = 0;
    if (t.rows == 0) return;
    if (few) configure((uint8_t)t.rows); /* so that nothing behind the rows is read */
    for (; p + 2 <= t.panels; p += 2) dot_panels(true, &t, t.w + p * t.w_stride, sums + p * CLIPFT_INT8_PANEL);
    if (p < t.panels) dot_panels(false, &t, t.w + p * t.w_stride, sums + p * CLIPFT_INT8_PANEL);
    if (few) configure(TILE_ROWS);
}

const clipft_int8_dot clipft_int8_dot_amx = {.layout = CLIPFT_INT8_QUADS,
                                             .depth = 4,
                                             .rows = CLIPFT_INT8_ROWS,
                                             .pack = clipft_int8_pack_quads,
                                             .unpack = clipft_int8_unpack_quads,
                                             .multiply = multiply,
                                             .enter = enter,
                                             .leave = leave};
#else
typedef int clipft_not_x86_64; /* ISO C forbids an empty file */
#endif
