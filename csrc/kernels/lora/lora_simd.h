/* The micro-kernels of LoRA and quick_gelu on vectors of any width; lora_<isa>.c includes this once with its width, target and name (see
 * simd.h).
 *
 * The three rank products keep a tile of their result in registers: rows x vectors below, chosen so that the accumulators hide the latency
 * of an FMA and leave registers for the operands. A row count that is no multiple of the tile's goes through tiles of 4 and of 1. */
#include "../common/simd.h"
#include "../table.h"

/* Vectors in CLIPFT_RANK_PAD floats. */
enum { DOWN_VECS = 16 / CLIPFT_LANES };
#if CLIPFT_LANES == 16
enum { DOWN_ROWS = 12, UP_ROWS = 6, UP_VECS = 4, OUTER_RANK = 8, OUTER_VECS = 2 }; /* 32 registers */
#elif CLIPFT_LANES == 8
enum { DOWN_ROWS = 6, UP_ROWS = 6, UP_VECS = 2, OUTER_RANK = 4, OUTER_VECS = 2 }; /* 16 registers */
#else
enum { DOWN_ROWS = 6, UP_ROWS = 6, UP_VECS = 4, OUTER_RANK = 4, OUTER_VECS = 4 }; /* 32 registers */
#endif

/* Floats in a line of the cache. */
enum { LINE = 16 };

static inline __attribute__((always_inline)) clipft_ahead ahead_from(clipft_ahead ahead, int64_t row)
{
    return (clipft_ahead){ahead.data ? ahead.data + row * ahead.stride : NULL, ahead.stride};
}

/* CLIPFT_RANK_PAD columns of v for `n` rows. */
SIMD void down_tile(const int n, const float *x, int64_t stride, int64_t cols, const float *panel, int64_t padded, float *v,
                    clipft_ahead ahead)
{
    f32v acc[DOWN_ROWS][DOWN_VECS];
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int c = 0; c < DOWN_VECS; ++c) acc[i][c] = f32v_load(v + i * padded + c * CLIPFT_LANES);
    for (int64_t j = 0; j < cols; ++j) {
        if (ahead.data && j % LINE == 0)
            for (int i = 0; i < n; ++i) __builtin_prefetch(ahead.data + i * ahead.stride + j, 0, 2);
        f32v p[DOWN_VECS];
        UNROLL for (int c = 0; c < DOWN_VECS; ++c) p[c] = f32v_load(panel + j * padded + c * CLIPFT_LANES);
        UNROLL for (int i = 0; i < n; ++i) UNROLL for (int c = 0; c < DOWN_VECS; ++c) acc[i][c] += p[c] * x[i * stride + j];
    }
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int c = 0; c < DOWN_VECS; ++c) f32v_store(v + i * padded + c * CLIPFT_LANES, acc[i][c]);
}

CLIPFT_TARGET void KERNEL(lora_rank_down)(const float *x, int64_t stride, int64_t rows, int64_t cols, const float *panel, int64_t padded,
                                          float *v, clipft_ahead ahead)
{
    for (int64_t k = 0; k < padded; k += CLIPFT_RANK_PAD, ahead.data = NULL) {
        int64_t i = 0;
        for (; i + DOWN_ROWS <= rows; i += DOWN_ROWS)
            down_tile(DOWN_ROWS, x + i * stride, stride, cols, panel + k, padded, v + i * padded + k, ahead_from(ahead, i));
        for (; i + 4 <= rows; i += 4)
            down_tile(4, x + i * stride, stride, cols, panel + k, padded, v + i * padded + k, ahead_from(ahead, i));
        for (; i < rows; ++i) down_tile(1, x + i * stride, stride, cols, panel + k, padded, v + i * padded + k, ahead_from(ahead, i));
    }
}

/* `n` rows and `vecs` vectors of out from (i, j) on. */
SIMD void up_tile(const int n, const int vecs, const bool masked, const clipft_rank_tile *t, int64_t i0, int64_t j0)
{
    const float *v = t->v + i0 * t->padded, *init = t->init + i0 * t->init_stride + j0;
    const int64_t padded = t->padded, rank = t->rank;
    f32v acc[UP_ROWS][UP_VECS];
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int c = 0; c < vecs; ++c) acc[i][c] =
        masked ? f32v_set(0.0F) : f32v_load(init + i * t->init_stride + c * CLIPFT_LANES);
    for (int64_t k = 0; k < rank; ++k) {
        f32v p[UP_VECS];
        UNROLL for (int c = 0; c < vecs; ++c) p[c] = f32v_load(t->panel + k * t->panel_stride + j0 + c * CLIPFT_LANES);
        UNROLL for (int i = 0; i < n; ++i) UNROLL for (int c = 0; c < vecs; ++c) acc[i][c] += p[c] * v[i * padded + k];
    }
    UNROLL for (int i = 0; i < n; ++i) UNROLL for (int c = 0; c < vecs; ++c)
    {
        const int64_t j = j0 + c * CLIPFT_LANES;
        if (masked)
            acc[i][c] = f32v_load(init + i * t->init_stride + c * CLIPFT_LANES) +
                        f32v_zero_where(~i32v_load(t->mask + (i0 + i) * t->mask_stride + j), acc[i][c]);
        f32v_store(t->out + (i0 + i) * t->out_stride + j, acc[i][c]);
    }
}

/* The columns from j on, fewer than a vector. */
SIMD void up_rest(const clipft_rank_tile *t, int64_t j)
{
    const int64_t n = t->cols - j;
    for (int64_t i = 0; i < t->rows; ++i) {
        const int32_t *mask = t->mask ? t->mask + i * t->mask_stride + j : NULL;
        f32v acc = f32v_set(0.0F);
        for (int64_t k = 0; k < t->rank; ++k) acc += load_part(t->panel + k * t->panel_stride + j, n, 0.0F) * t->v[i * t->padded + k];
        if (mask) acc = f32v_zero_where(~(i32v)load_part((const float *)mask, n, 0.0F), acc);
        store_part(t->out + i * t->out_stride + j, n, load_part(t->init + i * t->init_stride + j, n, 0.0F) + acc);
    }
}

SIMD void up_columns(const int vecs, const bool masked, const clipft_rank_tile *t, int64_t j)
{
    int64_t i = 0;
    for (; i + UP_ROWS <= t->rows; i += UP_ROWS) up_tile(UP_ROWS, vecs, masked, t, i, j);
    for (; i + 4 <= t->rows; i += 4) up_tile(4, vecs, masked, t, i, j);
    for (; i < t->rows; ++i) up_tile(1, vecs, masked, t, i, j);
}

SIMD void up_all(const bool masked, const clipft_rank_tile *t)
{
    int64_t j = 0;
    for (; j + UP_VECS * CLIPFT_LANES <= t->cols; j += UP_VECS * CLIPFT_LANES) up_columns(UP_VECS, masked, t, j);
    for (; j + CLIPFT_LANES <= t->cols; j += CLIPFT_LANES) up_columns(1, masked, t, j);
    if (j < t->cols) up_rest(t, j);
}

CLIPFT_TARGET void KERNEL(lora_rank_up)(const clipft_rank_tile *tile)
{
    const clipft_rank_tile t = *tile;
    if (t.mask)
        up_all(true, &t);
    else
        up_all(false, &t);
}

SIMD void outer_tile(const int vecs, const float *v, int64_t padded, int64_t rows, const float *x, int64_t stride, float *acc,
                     int64_t acc_stride, clipft_ahead ahead)
{
    f32v sum[OUTER_RANK][OUTER_VECS];
    UNROLL for (int k = 0; k < OUTER_RANK; ++k) UNROLL for (int c = 0; c < vecs; ++c) sum[k][c] =
        f32v_load(acc + k * acc_stride + c * CLIPFT_LANES);
    for (int64_t i = 0; i < rows; ++i) {
        if (ahead.data)
            for (int j = 0; j < vecs * CLIPFT_LANES; j += LINE) __builtin_prefetch(ahead.data + i * ahead.stride + j, 0, 2);
        f32v p[OUTER_VECS];
        UNROLL for (int c = 0; c < vecs; ++c) p[c] = f32v_load(x + i * stride + c * CLIPFT_LANES);
        UNROLL for (int k = 0; k < OUTER_RANK; ++k) UNROLL for (int c = 0; c < vecs; ++c) sum[k][c] += p[c] * v[i * padded + k];
    }
    UNROLL for (int k = 0; k < OUTER_RANK; ++k) UNROLL for (int c = 0; c < vecs; ++c)
        f32v_store(acc + k * acc_stride + c * CLIPFT_LANES, sum[k][c]);
}

CLIPFT_TARGET void KERNEL(lora_rank_outer)(const float *v, int64_t padded, int64_t rows, int64_t rank, const float *x, int64_t stride,
                                           int64_t cols, float *acc, int64_t acc_stride, clipft_ahead ahead)
{
    int64_t j = 0;
    for (; j + OUTER_VECS * CLIPFT_LANES <= cols; j += OUTER_VECS * CLIPFT_LANES)
        for (int64_t k = 0; k < rank; k += OUTER_RANK)
            outer_tile(OUTER_VECS, v + k, padded, rows, x + j, stride, acc + k * acc_stride + j, acc_stride,
                       (clipft_ahead){k == 0 && ahead.data ? ahead.data + j : NULL, ahead.stride});
    for (; j < cols; j += CLIPFT_LANES)
        for (int64_t k = 0; k < rank; k += OUTER_RANK)
            outer_tile(1, v + k, padded, rows, x + j, stride, acc + k * acc_stride + j, acc_stride, (clipft_ahead){NULL, 0});
}

SIMD i32v dropout_step(u32v counter, const clipft_dropout_row *row)
{
    u32v h = counter;
    h = (h ^ h >> 16) * CLIPFT_HASH_MUL1;
    h = ((h ^ h >> 15) + row->high) * CLIPFT_HASH_MUL2;
    h ^= h >> 15;
    return (i32v)h >= row->threshold;
}

CLIPFT_TARGET void KERNEL(lora_row_dropout)(const clipft_dropout_row *row, const float *x, float *out, int32_t *mask, int64_t n)
{
    const clipft_dropout_row r = *row;
    u32v counter = ((u32v)i32v_iota() + r.col) * CLIPFT_HASH_STEP + r.low;
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= n; j += CLIPFT_LANES, counter += CLIPFT_HASH_STEP * CLIPFT_LANES) {
        const i32v keep = dropout_step(counter, &r);
        memcpy(mask + j, &keep, sizeof keep);
        f32v_store(out + j, f32v_zero_where(~keep, f32v_load(x + j)));
    }
    if (j < n) {
        const i32v keep = dropout_step(counter, &r);
        memcpy(mask + j, &keep, (size_t)(n - j) * sizeof *mask);
        store_part(out + j, n - j, f32v_zero_where(~keep, load_part(x + j, n - j, 0.0F)));
    }
}

/* A product, for -Inf has to come out NaN. */
SIMD f32v quick_gelu_step(f32v x) { return x * f32v_gated(f32v_set(1.0F), x * CLIPFT_QUICK_GELU_EXPONENT); }

/* s + z s (1 - s) with s = sigmoid(z) = 1 / (1 + e), 1 - s = e s, e = exp(-z); e and s are 0 where they are too small for a z that may be
 * as large as it likes. */
SIMD f32v quick_gelu_grad_step(f32v x, f32v grad)
{
    const f32v t = x * CLIPFT_QUICK_GELU_EXPONENT;
    const f32v e = f32v_zero_where(t < -126.0F, f32v_exp2(f32v_min(f32v_set(126.0F), f32v_max(f32v_set(-126.0F), t))));
    const f32v s = f32v_zero_where(t > 126.0F, 1.0F / (e + 1.0F));
    return grad * (s + x * 1.702F * s * (e * s));
}

CLIPFT_TARGET void KERNEL(lora_row_quick_gelu)(const float *x, float *out, int64_t n)
{
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= n; j += CLIPFT_LANES) f32v_store(out + j, quick_gelu_step(f32v_load(x + j)));
    if (j < n) store_part(out + j, n - j, quick_gelu_step(load_part(x + j, n - j, 0.0F)));
}

CLIPFT_TARGET void KERNEL(lora_row_quick_gelu_grad)(const float *x, const float *grad, float *out, int64_t n)
{
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= n; j += CLIPFT_LANES) f32v_store(out + j, quick_gelu_grad_step(f32v_load(x + j), f32v_load(grad + j)));
    if (j < n) store_part(out + j, n - j, quick_gelu_grad_step(load_part(x + j, n - j, 0.0F), load_part(grad + j, n - j, 0.0F)));
}
