/* The inner loops of attention's gradient, for the files that include attention_simd.h before. All five products of a block are one:
 * c = a b, or c += a b, by tiles of ATTEND_ROWS rows and ATTEND_PANELS panels. */

/* a [rows, depth], whose element (i, k) lies at a[i * a_row + k * a_step]; b [depth, cols] in groups of COLS columns, b_group apart, each
 * with rows b_row apart; c [rows, cols]. cols is a multiple of PANEL; rows of ATTEND_ROWS where c is added to. */
typedef struct product {
    const float *a, *b;
    float *c;
    int64_t a_row, a_step, b_row, b_group, c_row;
    int64_t rows, cols, depth;
    bool add;
} product;

SIMD void product_tile(const int n, const int panels, const product *t, int64_t i, int64_t col)
{
    const int vecs = panels * PANEL_VECS;
    const float *a = t->a + i * t->a_row, *b = t->b + col / COLS * t->b_group + col % COLS;
    float *c = t->c + i * t->c_row + col;
    f32v acc[ATTEND_ROWS][TILE_VECS];
    UNROLL for (int r = 0; r < n; ++r) UNROLL for (int v = 0; v < vecs; ++v) acc[r][v] =
        t->add ? f32v_load(c + r * t->c_row + v * CLIPFT_LANES) : f32v_set(0.0F);
    multiply(n, vecs, a, t->a_row, t->a_step, b, t->b_row, t->depth, acc);
    UNROLL for (int r = 0; r < n; ++r) UNROLL for (int v = 0; v < vecs; ++v) f32v_store(c + r * t->c_row + v * CLIPFT_LANES, acc[r][v]);
}

/* One group of panels down all rows, so that those of b stay in the L1 cache. */
SIMD void product_panels(const int panels, const product *t, int64_t col)
{
    int64_t i = 0;
    for (; i + ATTEND_ROWS <= t->rows; i += ATTEND_ROWS) product_tile(ATTEND_ROWS, panels, t, i, col);
    if (i < t->rows && t->rows >= ATTEND_ROWS)
        product_tile(ATTEND_ROWS, panels, t, t->rows - ATTEND_ROWS, col);
    else
        for (; i < t->rows; ++i) product_tile(1, panels, t, i, col);
}

CLIPFT_TARGET static __attribute__((noinline)) void multiply_all(const product *t)
{
    int64_t col = 0;
    for (; col + ATTEND_PANELS * PANEL <= t->cols; col += ATTEND_PANELS * PANEL) product_panels(ATTEND_PANELS, t, col);
#if ATTEND_PANELS == 4
    const int64_t left = (t->cols - col) / PANEL;
    if (left == 3) product_panels(3, t, col);
    if (left == 2) product_panels(2, t, col);
    if (left == 1) product_panels(1, t, col);
#endif
}

/* x = x * by for the `seen` weights of a row, zeros from there to `end`. */
SIMD void finish_row(float *x, float by, int64_t seen, int64_t end)
{
    for (int64_t j = 0; j < seen; j += CLIPFT_LANES) f32v_store(x + j, f32v_load(x + j) * by); /* zeros up to the next vector stay */
    memset(x + seen, 0, (size_t)(end - seen) * sizeof *x);
}

/* dx = scale * p * (dp - sum of p * dp), in place of the `seen` dp of a row, zeros from there to `end`. p is zero up to the next vector. */
SIMD void softmax_grad_row(const float *p, float *dx, float scale, int64_t seen, int64_t end)
{
    f32v sum = f32v_set(0.0F);
    memset(dx + seen, 0, (size_t)(end - seen) * sizeof *dx);
    for (int64_t j = 0; j < seen; j += CLIPFT_LANES) sum += f32v_load(p + j) * f32v_load(dx + j);
    const float mean = f32v_sum(sum);
    for (int64_t j = 0; j < seen; j += CLIPFT_LANES) f32v_store(dx + j, f32v_load(p + j) * (f32v_load(dx + j) - mean) * scale);
}

/* What queries first .. first + rows - 1 give. */
SIMD void attend_grad_block(const clipft_attend_grad *t, int64_t first, int64_t rows)
{
    const int64_t width = t->width, keys = t->causal ? first + rows : t->length;
    const int64_t cols = (keys + PANEL - 1) / PANEL * PANEL, key_rows = (keys + ATTEND_ROWS - 1) / ATTEND_ROWS * ATTEND_ROWS;
    const int64_t end = cols > key_rows ? cols : key_rows, stride = t->stride;
    const float *q = t->q + first * width, *grad = t->grad + first * width;
    const product scores = {q, t->keys_t, t->p, width, 1, COLS, COLS * t->dim, stride, rows, cols, t->dim, false};
    const product dp = {grad, t->values_t, t->ds, width, 1, COLS, COLS * t->dim, stride, rows, cols, t->dim, false};
    const product dq = {t->ds, t->keys, t->dq + first * width, stride, 1, width, COLS, width, rows, width, keys, false};
    const product dv = {t->p, grad, t->dv, 1, stride, width, COLS, width, key_rows, width, rows, true};
    const product dk = {t->ds, q, t->dk, 1, stride, width, COLS, width, key_rows, width, rows, true};
    multiply_all(&scores);
    multiply_all(&dp);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t seen = t->causal ? first + i + 1 : t->length;
        float *p = t->p + i * stride;
        finish_row(p, 1.0F / softmax_row(p, t->scale, seen), seen, end);
        softmax_grad_row(p, t->ds + i * stride, t->scale, seen, end);
    }
    multiply_all(&dq);
    multiply_all(&dv);
    multiply_all(&dk);
}

CLIPFT_TARGET void KERNEL(attention_attend_grad)(const clipft_attend_grad *head)
{
    const clipft_attend_grad t = *head;
    for (int64_t i = 0; i < t.rows; i += CLIPFT_ATTEND_BLOCK)
        attend_grad_block(&t, i, t.rows - i < CLIPFT_ATTEND_BLOCK ? t.rows - i : CLIPFT_ATTEND_BLOCK);
}
