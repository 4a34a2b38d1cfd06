/* An ISA's slot `dot` on vectors of any width. The file that includes this has included simd.h and defines
 *   INT8_ROWS, INT8_PANELS  the tile of sums kept in registers, chosen so that operands fit beside it
 *   int8_dot4(sum, x, w)    adds to each 32-bit lane the four products of its unsigned bytes of x and signed bytes of w; x <= 127. */
#include "../table.h"

#include <stddef.h>

_Static_assert(CLIPFT_INT8_DOT_ROWS % INT8_ROWS == 0, "a tile at best holds whole tiles of registers");

enum { PANEL_VECS = CLIPFT_INT8_PANEL / CLIPFT_LANES, BLOCK = 4 * CLIPFT_INT8_PANEL };

/* Four bytes of a row to every lane. */
SIMD i32v spread(const uint8_t *x)
{
    int32_t four;
    memcpy(&four, x, sizeof four);
    return (i32v){0} + four;
}

/* `n` rows and `panels` panels; `ahead`: a panel to ask for meanwhile, or NULL. */
SIMD void dot_tile(const int n, const int panels, const clipft_int8_tile *t, const uint8_t *x, const int8_t *w, int32_t *sums,
                   const int8_t *ahead)
{
    const int vecs = panels * PANEL_VECS;
    const int64_t x_stride = t->x_stride, w_stride = t->w_stride;
    i32v acc[INT8_ROWS][INT8_PANELS * PANEL_VECS];
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int c = 0; c < vecs; ++c) acc[i][c] = (i32v){0};
    for (int64_t k = 0; k < t->depth; k += 4, w += BLOCK) {
        i32v p[INT8_PANELS * PANEL_VECS];
        if (ahead) __builtin_prefetch(ahead + k * CLIPFT_INT8_PANEL, 0, 2);
        UNROLL for (int c = 0; c < vecs; ++c)
            memcpy(&p[c], w + c / PANEL_VECS * w_stride + c % PANEL_VECS * (int64_t)sizeof p[c], sizeof p[c]);
        UNROLL for (int i = 0; i < n; ++i)
        {
            const i32v four = spread(x + i * x_stride + k);
            UNROLL for (int c = 0; c < vecs; ++c) acc[i][c] = int8_dot4(acc[i][c], four, p[c]);
        }
    }
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int c = 0; c < vecs; ++c)
        memcpy(sums + i * CLIPFT_INT8_COLS + c * CLIPFT_LANES, &acc[i][c], sizeof acc[i][c]);
}

/* `panels` panels from panel `p` on, all rows. */
SIMD void dot_panels(const int panels, const clipft_int8_tile *t, int64_t p, int32_t *sums)
{
    const int8_t *w = t->w + p * t->w_stride;
    const uint8_t *x = t->x;
    int64_t left = t->rows;
    sums += p * CLIPFT_INT8_PANEL;
    int64_t tile = 0;
    for (; left >= INT8_ROWS; left -= INT8_ROWS, x += INT8_ROWS * t->x_stride, sums += INT8_ROWS * CLIPFT_INT8_COLS, ++tile)
        if (tile < t->ahead_panels)
            dot_tile(INT8_ROWS, panels, t, x, w, sums, t->ahead + tile * t->w_stride);
        else
            dot_tile(INT8_ROWS, panels, t, x, w, sums, NULL);
    switch (left) {
#if INT8_ROWS > 5
    case 5:
        dot_tile(5, panels, t, x, w, sums, NULL);
        break;
#endif
#if INT8_ROWS > 4
    case 4:
        dot_tile(4, panels, t, x, w, sums, NULL);
        break;
#endif
    case 3:
        dot_tile(3, panels, t, x, w, sums, NULL);
        break;
    case 2:
        dot_tile(2, panels, t, x, w, sums, NULL);
        break;
    case 1:
        dot_tile(1, panels, t, x, w, sums, NULL);
        break;
    default:
        break;
    }
}

static CLIPFT_TARGET void KERNEL(int8_multiply)(const clipft_int8_tile *tile, int32_t *sums)
{
    const clipft_int8_tile t = *tile;
    int64_t p = 0;
    for (; p + INT8_PANELS <= t.panels; p += INT8_PANELS) dot_panels(INT8_PANELS, &t, p, sums);
#if INT8_PANELS == 4
    if (t.panels - p == 3) dot_panels(3, &t, p, sums);
    if (t.panels - p == 2) dot_panels(2, &t, p, sums);
    if (t.panels - p == 1) dot_panels(1, &t, p, sums);
#elif INT8_PANELS != 1
#error "what is left of the panels needs a tile"
#endif
}

const clipft_int8_dot KERNEL(int8_dot) = {.layout = CLIPFT_INT8_QUADS,
                                          .depth = 4,
                                          .rows = CLIPFT_INT8_DOT_ROWS,
                                          .pack = clipft_int8_pack_quads,
                                          .unpack = clipft_int8_unpack_quads,
                                          .multiply = KERNEL(int8_multiply)};
