/* An ISA's slot `dot` on vectors of any width. The file that includes this has included simd.h and defines
 *   INT8_ROWS, INT8_PANELS  the tile of sums kept in registers, chosen so that operands fit beside it
 *   int8_dot4(sum, x, w)    adds to each 32-bit lane the four products of its unsigned bytes of x and signed bytes of w; x <= 127
 * and, where two of these at once are cheaper while their sums of 16 bits hold, INT8_PAIRED and
 *   int8_dot8(sum, x, w)    the same of x[0] and w[0], x[1] and w[1], of which `mark` has said that it may be. */
#include "../common/sizes.h"
#include "../table.h"
#include "int8.h"

#include <stddef.h>

_Static_assert(CLIPFT_INT8_DOT_ROWS % INT8_ROWS == 0, "a tile at best holds whole tiles of registers");

enum { PANEL_VECS = CLIPFT_INT8_PANEL / CLIPFT_LANES, VECS = INT8_PANELS * PANEL_VECS, BLOCK = 4 * CLIPFT_INT8_PANEL };

/* What is multiplied at a time. So much of a panel stays in the L1 cache from one tile of rows to the next; with more panels it does not
 * pay. */
enum { DEPTH = INT8_PANELS == 1 ? 1024 : CLIPFT_INT8_MAX_IN };

/* Four bytes of a row to every lane. */
SIMD i32v spread(const uint8_t *x)
{
    int32_t four;
    memcpy(&four, x, sizeof four);
    return (i32v){0} + four;
}

/* Vector c of a block. */
SIMD i32v weights(const int8_t *w, int c, int64_t w_stride)
{
    i32v v;
    memcpy(&v, w + c / PANEL_VECS * w_stride + c % PANEL_VECS * (int64_t)sizeof v, sizeof v);
    return v;
}

/* A block's products with `n` rows. */
SIMD void add_block(const int n, const int vecs, i32v acc[INT8_ROWS][VECS], const uint8_t *x, int64_t x_stride, const int8_t *w,
                    int64_t w_stride)
{
    i32v p[VECS];
    UNROLL for (int c = 0; c < vecs; ++c) p[c] = weights(w, c, w_stride);
    UNROLL for (int i = 0; i < n; ++i)
    {
        const i32v four = spread(x + i * x_stride);
        UNROLL for (int c = 0; c < vecs; ++c) acc[i][c] = int8_dot4(acc[i][c], four, p[c]);
    }
}

#ifdef INT8_PAIRED
/* Two blocks' at once. */
SIMD void add_pair(const int n, const int vecs, i32v acc[INT8_ROWS][VECS], const uint8_t *x, int64_t x_stride, const int8_t *w,
                   int64_t w_stride)
{
    i32v p[VECS][2];
    UNROLL for (int c = 0; c < vecs; ++c) p[c][0] = weights(w, c, w_stride), p[c][1] = weights(w + BLOCK, c, w_stride);
    UNROLL for (int i = 0; i < n; ++i)
    {
        const i32v q[2] = {spread(x + i * x_stride), spread(x + i * x_stride + 4)};
        UNROLL for (int c = 0; c < vecs; ++c) acc[i][c] = int8_dot8(acc[i][c], q, p[c]);
    }
}

/* Marks of all panels at `at`, with a bit above those of the next `depth`. */
SIMD uint32_t marks_at(const int panels, const clipft_int8_tile *t, const uint8_t *marks, int64_t at, int64_t depth)
{
    uint32_t all = marks[at];
    UNROLL for (int p = 1; p < panels; ++p) all &= marks[at + p * t->marks_stride];
    return depth < 64 ? (all & ((1U << (depth / 8)) - 1)) | 1U << (depth / 8) : all | 256;
}

/* The marks of `panels` panels from panel `p` on; NULL where there are none. */
SIMD const uint8_t *marks_of(const int panels, const clipft_int8_tile *t, int64_t p)
{
    const uint8_t *marks = t->marks + p * t->marks_stride;
    uint32_t any = 0;
    for (int64_t k = 0; k + 8 <= t->depth; k += 64) any |= marks_at(panels, t, marks, k / 64, 64) & 255;
    return any ? marks : NULL;
}

typedef int16_t i16v __attribute__((vector_size(4 * CLIPFT_LANES)));

/* Adds the positive and the negative weights of each two to its lane. */
SIMD void split(i16v two, i16v *positive, i16v *negative)
{
    const i16v even = (two << 8) >> 8, odd = two >> 8;
    *positive += (even & (even > 0)) + (odd & (odd > 0));
    *negative += (even & (even < 0)) + (odd & (odd < 0));
}

/* 127 times the positive weights is the greatest sum that a lane can come to, 127 times the negative ones the least. A panel that allows
 * few pairs gets no marks: branches that go one way and the other would cost more than they spare. */
static CLIPFT_TARGET void KERNEL(int8_mark)(const int8_t *panel, int64_t depth, uint8_t *marks)
{
    int64_t marked = 0;
    for (int64_t k = 0; k + 8 <= depth; k += 8, panel += 2 * BLOCK) {
        i16v over = {0};
        bool any = false;
        for (int c = 0; c < PANEL_VECS; ++c) {
            i16v positive = {0}, negative = {0};
            split((i16v)weights(panel, c, 0), &positive, &negative);
            split((i16v)weights(panel + BLOCK, c, 0), &positive, &negative);
            over |= (positive > INT16_MAX / 127) | (negative < INT16_MIN / 127);
        }
        for (int i = 0; i < CLIPFT_LANES; ++i) any |= ((i32v)over)[i] != 0;
        marks[k / 64] |= (uint8_t)(!any << (k / 8 % 8));
        marked += !any;
    }
    if (marked < depth / 16) memset(marks, 0, (size_t)clipft_divide_up(depth, 64));
}
#else
SIMD const uint8_t *marks_of(const int panels, const clipft_int8_tile *t, int64_t p) { return (void)panels, (void)t, (void)p, NULL; }
#endif

/* Operands of a tile, of a part of the depth. */
typedef struct slice {
    const uint8_t *x, *marks; /* marks: NULL where there are none */
    const int8_t *w, *ahead;  /* ahead: a panel to ask for meanwhile, or NULL */
    int64_t depth;
    int32_t *sums;
    bool more; /* sums are those of the depth before */
} slice;

/* `n` rows and `panels` panels. */
SIMD void dot_tile(const int n, const int panels, const clipft_int8_tile *t, slice s)
{
    const int vecs = panels * PANEL_VECS;
    const int64_t x_stride = t->x_stride, w_stride = t->w_stride;
    i32v acc[INT8_ROWS][VECS];
    int64_t k = 0;
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int c = 0; c < vecs; ++c) acc[i][c] =
        s.more ? i32v_load(s.sums + i * CLIPFT_INT8_COLS + c * CLIPFT_LANES) : (i32v){0};
#ifdef INT8_PAIRED
    for (int64_t at = 0; s.marks && k + 8 <= s.depth; ++at)
        for (uint32_t m = marks_at(panels, t, s.marks, at, s.depth - k); m > 1; m >>= 1, k += 8, s.x += 8, s.w += 2 * BLOCK) {
            if (s.ahead) {
                __builtin_prefetch(s.ahead + k * CLIPFT_INT8_PANEL, 0, 2);
                __builtin_prefetch(s.ahead + (k + 4) * CLIPFT_INT8_PANEL, 0, 2);
            }
            if (m & 1)
                add_pair(n, vecs, acc, s.x, x_stride, s.w, w_stride);
            else {
                add_block(n, vecs, acc, s.x, x_stride, s.w, w_stride);
                add_block(n, vecs, acc, s.x + 4, x_stride, s.w + BLOCK, w_stride);
            }
        }
#endif
    for (; k < s.depth; k += 4, s.x += 4, s.w += BLOCK) {
        if (s.ahead) __builtin_prefetch(s.ahead + k * CLIPFT_INT8_PANEL, 0, 2);
        add_block(n, vecs, acc, s.x, x_stride, s.w, w_stride);
    }
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int c = 0; c < vecs; ++c)
        memcpy(s.sums + i * CLIPFT_INT8_COLS + c * CLIPFT_LANES, &acc[i][c], sizeof acc[i][c]);
}

/* `panels` panels of a slice, all rows. */
SIMD void dot_slice(const int panels, const clipft_int8_tile *t, slice s)
{
    const int8_t *ahead = s.ahead;
    int64_t left = t->rows, tile = 0;
    for (; left >= INT8_ROWS; left -= INT8_ROWS, s.x += INT8_ROWS * t->x_stride, s.sums += INT8_ROWS * CLIPFT_INT8_COLS, ++tile) {
        s.ahead = tile < t->ahead_panels ? ahead + tile * t->w_stride : NULL;
        dot_tile(INT8_ROWS, panels, t, s);
    }
    s.ahead = NULL;
    switch (left) {
#if INT8_ROWS > 5
    case 5:
        dot_tile(5, panels, t, s);
        break;
#endif
#if INT8_ROWS > 4
    case 4:
        dot_tile(4, panels, t, s);
        break;
#endif
    case 3:
        dot_tile(3, panels, t, s);
        break;
    case 2:
        dot_tile(2, panels, t, s);
        break;
    case 1:
        dot_tile(1, panels, t, s);
        break;
    default:
        break;
    }
}

/* `panels` panels from panel `p` on, all rows. */
SIMD void dot_panels(const int panels, const clipft_int8_tile *t, int64_t p, int32_t *sums)
{
    const uint8_t *marks = marks_of(panels, t, p);
    int64_t k = 0;
    do {
        const slice part = {.x = t->x + k,
                            .marks = marks ? marks + k / 64 : NULL,
                            .w = t->w + p * t->w_stride + k * CLIPFT_INT8_PANEL,
                            .ahead = t->ahead + k * CLIPFT_INT8_PANEL,
                            .depth = clipft_min(DEPTH, t->depth - k),
                            .sums = sums + p * CLIPFT_INT8_PANEL,
                            .more = k > 0};
        dot_slice(panels, t, part);
        k += DEPTH;
    } while (k < t->depth);
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
#ifdef INT8_PAIRED
                                          .mark = KERNEL(int8_mark),
#endif
                                          .multiply = KERNEL(int8_multiply)};
