/* The inner loops of attention.h, written once for every width. The file that includes this has included its
 * tier's isa_<isa>.h and defines
 *   ATTEND_ROWS, ATTEND_PANELS  the tile of scores or results kept in registers, rows x panels of 16 columns, chosen so that operands fit
 *                               beside it.
 * A tile takes ATTEND_ROWS queries or, where there are not so many, one; the last tile of a head begins early rather than being smaller. */
#include "../common/simd.h"
#include "../table.h"

enum { COLS = CLIPFT_ATTEND_COLS, PANEL = CLIPFT_ATTEND_PANEL, PANEL_VECS = PANEL / CLIPFT_LANES, TILE_VECS = ATTEND_PANELS * PANEL_VECS };

_Static_assert(ATTEND_ROWS <= CLIPFT_ATTEND_ROWS, "scores have room for a tile's rows");

/* ATTEND_ROWS or fewer queries on their way. */
typedef struct attend_rows {
    const clipft_attend *head;
    int64_t first;              /* query */
    int64_t seen, step;         /* keys that the first sees, and how many more each next */
    int64_t stride;             /* between rows of scores */
    float inverse[ATTEND_ROWS]; /* of the sums of exponentials */
} attend_rows;

/* acc += a b: a [n, depth], whose element (i, k) lies at a[i * a_row + k * a_step], b [depth, vecs], rows b_row apart. */
SIMD void multiply(const int n, const int vecs, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row, int64_t depth,
                   f32v acc[][TILE_VECS])
{
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_row) {
        f32v row[TILE_VECS];
        UNROLL for (int v = 0; v < vecs; ++v) row[v] = f32v_load(b + v * CLIPFT_LANES);
        UNROLL for (int i = 0; i < n; ++i)
        {
            const f32v one = f32v_set(a[i * a_row]);
            UNROLL for (int v = 0; v < vecs; ++v) acc[i][v] += one * row[v];
        }
    }
}

/* Scores against the `panels` panels of keys from panel `p` on. */
SIMD void score_tile(const int n, const int panels, const attend_rows *r, int64_t p)
{
    const clipft_attend *t = r->head;
    const int vecs = panels * PANEL_VECS;
    const int64_t col = p * PANEL;
    float *scores = t->scores + col;
    f32v acc[ATTEND_ROWS][TILE_VECS];
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int v = 0; v < vecs; ++v) acc[i][v] = f32v_set(0.0F);
    multiply(n, vecs, t->q + r->first * t->q_stride, t->q_stride, 1, t->keys + col / COLS * COLS * t->dim + col % COLS, COLS, t->dim, acc);
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int v = 0; v < vecs; ++v)
        f32v_store(scores + i * r->stride + v * CLIPFT_LANES, acc[i][v]);
}

/* exp(scale * (x - max)) in place of the `seen` products of a row, zeros up to the next vector; returns their sum. */
SIMD float softmax_row(float *x, float scale, int64_t seen)
{
    const int64_t whole = seen / CLIPFT_LANES * CLIPFT_LANES;
    const i32v beyond = i32v_iota() >= (int32_t)(seen - whole);
    f32v max = f32v_set(-INFINITY), sum = f32v_set(0.0F);
    for (int64_t j = 0; j < whole; j += CLIPFT_LANES) max = f32v_max(f32v_load(x + j), max);
    if (whole < seen) max = f32v_max(f32v_select(beyond, max, f32v_load(x + whole)), max);
    const float shift = f32v_max_lane(max);
    for (int64_t j = 0; j < whole; j += CLIPFT_LANES) {
        const f32v e = f32v_exp((f32v_load(x + j) - shift) * scale);
        f32v_store(x + j, e);
        sum += e;
    }
    if (whole < seen) {
        const f32v e = f32v_zero_where(beyond, f32v_exp((f32v_load(x + whole) - shift) * scale));
        f32v_store(x + whole, e);
        sum += e;
    }
    return f32v_sum(sum);
}

/* Results in the `panels` panels of columns from panel `p` on. */
SIMD void value_tile(const int n, const int panels, const attend_rows *r, int64_t p)
{
    const clipft_attend *t = r->head;
    const int vecs = panels * PANEL_VECS;
    const int64_t col = p * PANEL;
    const float *values = t->values + col / COLS * COLS * t->length + col % COLS;
    f32v acc[ATTEND_ROWS][TILE_VECS];
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int v = 0; v < vecs; ++v) acc[i][v] = f32v_set(0.0F);
    multiply(n, vecs, t->scores, r->stride, 1, values, COLS, r->seen, acc);
    if (r->step) /* not as weights of zero, which a NaN among the values would not respect */
        for (int i = 1; i < n; ++i)
            multiply(1, vecs, t->scores + i * r->stride + r->seen, r->stride, 1, values + r->seen * COLS, COLS, i, acc + i);
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int v = 0; v < vecs; ++v)
    {
        const int64_t at = col + v * CLIPFT_LANES, left = t->dim - at;
        float *out = t->out + (r->first + i) * t->out_stride + at;
        if (left >= CLIPFT_LANES)
            f32v_store(out, acc[i][v] * r->inverse[i]);
        else if (left > 0)
            store_part(out, left, acc[i][v] * r->inverse[i]);
    }
}

#if ATTEND_PANELS == 4
#define EACH_TILE(tile, n, r, panels)                                                                                                      \
    do {                                                                                                                                   \
        int64_t p = 0;                                                                                                                     \
        for (; p + 4 <= (panels); p += 4) tile(n, 4, r, p);                                                                                \
        if ((panels)-p == 3) tile(n, 3, r, p);                                                                                             \
        if ((panels)-p == 2) tile(n, 2, r, p);                                                                                             \
        if ((panels)-p == 1) tile(n, 1, r, p);                                                                                             \
    } while (0)
#elif ATTEND_PANELS == 1
#define EACH_TILE(tile, n, r, panels)                                                                                                      \
    for (int64_t p = 0; p < (panels); ++p) tile(n, 1, r, p)
#else
#error "what is left of the panels needs a tile"
#endif

SIMD void attend_tile(const int n, const clipft_attend *t, int64_t first)
{
    attend_rows r = {.head = t,
                     .first = first,
                     .seen = t->causal ? first + 1 : t->length,
                     .step = t->causal,
                     .stride = (t->length + COLS - 1) / COLS * COLS};
    EACH_TILE(score_tile, n, &r, (r.seen + r.step * (n - 1) + PANEL - 1) / PANEL);
    for (int i = 0; i < n; ++i) r.inverse[i] = 1.0F / softmax_row(t->scores + i * r.stride, t->scale, r.seen + i * r.step);
    EACH_TILE(value_tile, n, &r, (t->dim + PANEL - 1) / PANEL);
}

CLIPFT_TARGET void KERNEL(attention_attend)(const clipft_attend *head)
{
    const clipft_attend t = *head;
    if (t.rows < ATTEND_ROWS) {
        for (int64_t i = 0; i < t.rows; ++i) attend_tile(1, &t, i);
        return;
    }
    for (int64_t i = 0; i < t.rows; i += ATTEND_ROWS) attend_tile(ATTEND_ROWS, &t, i + ATTEND_ROWS < t.rows ? i : t.rows - ATTEND_ROWS);
}
