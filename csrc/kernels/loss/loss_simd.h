/* The losses' micro-kernels on vectors of any width; loss_<isa>.c includes this once with its width, target and name (see simd.h).
 *
 * A row's last, partial vector goes through a padded copy, so that no lane reads or writes beyond the row. */
#include "../common/simd.h"
#include "../table.h"

SIMD i32v load_ids_part(const int32_t *p, int64_t n)
{
    int32_t lane[CLIPFT_LANES] = {0};
    memcpy(lane, p, (size_t)n * sizeof *p);
    return i32v_load(lane);
}

/* -1 in the first n lanes. */
SIMD i32v first_lanes(int64_t n)
{
    int32_t lane[CLIPFT_LANES];
    for (int k = 0; k < CLIPFT_LANES; ++k) lane[k] = k < n ? -1 : 0;
    return i32v_load(lane);
}

CLIPFT_TARGET float KERNEL(loss_row_max)(const float *x, int64_t cols, float scale)
{
    f32v max0 = f32v_set(-INFINITY), max1 = max0;
    int64_t j = 0;
    for (; j + 2 * CLIPFT_LANES <= cols; j += 2 * CLIPFT_LANES) {
        max0 = f32v_max(f32v_load(x + j) * scale, max0);
        max1 = f32v_max(f32v_load(x + j + CLIPFT_LANES) * scale, max1);
    }
    float max = f32v_max_lane(f32v_max(max0, max1));
    for (; j < cols; ++j) max = fmaxf(max, scale * x[j]);
    return max;
}

CLIPFT_TARGET float KERNEL(loss_row_exp_sum)(const float *x, int64_t cols, float scale, float max, float weight, float *col_sum)
{
    f32v sum = f32v_set(0.0F);
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= cols; j += CLIPFT_LANES) {
        const f32v e = f32v_exp(f32v_load(x + j) * scale - max);
        sum += e;
        f32v_store(col_sum + j, f32v_load(col_sum + j) + e * weight);
    }
    if (j < cols) {
        const f32v e = f32v_zero_where(~first_lanes(cols - j), f32v_exp(load_part(x + j, cols - j, 0.0F) * scale - max));
        sum += e;
        store_part(col_sum + j, cols - j, load_part(col_sum + j, cols - j, 0.0F) + e * weight);
    }
    return f32v_sum(sum);
}

/* One vector of columns, `n` of them in use. */
SIMD void col_lse_step(const float *x, int64_t rows, int64_t n, int64_t stride, float scale, int64_t pair_row, float *col_max,
                       float *col_sum)
{
    f32v max = f32v_set(-INFINITY), sum = f32v_set(0.0F);
    i32v pair = i32v_iota() + (int32_t)(pair_row < -CLIPFT_LANES ? -CLIPFT_LANES : pair_row > rows ? rows : pair_row);
    for (int64_t i = 0; i < rows; ++i) {
        const f32v y = load_part(x + i * stride, n, 0.0F) * scale;
        max = f32v_select(pair == (int32_t)i, max, f32v_max(y, max));
    }
    for (int64_t i = 0; i < rows; ++i)
        sum += f32v_zero_where(pair == (int32_t)i, f32v_exp(load_part(x + i * stride, n, 0.0F) * scale - max));
    store_part(col_max, n, max);
    store_part(col_sum, n, sum);
}

CLIPFT_TARGET void KERNEL(loss_block_col_lse)(const float *x, int64_t rows, int64_t cols, int64_t stride, float scale, int64_t pair_row,
                                              float *col_max, float *col_sum)
{
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= cols; j += CLIPFT_LANES)
        col_lse_step(x + j, rows, CLIPFT_LANES, stride, scale, pair_row + j, col_max + j, col_sum + j);
    if (j < cols) col_lse_step(x + j, rows, cols - j, stride, scale, pair_row + j, col_max + j, col_sum + j);
}

/* Probabilities below this become zero: times a gain they could be denormal, which a GEMM pays for. */
SIMD f32v flush_probability(f32v p) { return f32v_zero_where(p < 1e-30F, p); }

SIMD f32v softmax_grad_step(f32v x, f32v col_factor, const clipft_softmax_row *row)
{
    const f32v e = f32v_exp(x * row->scale - row->lse);
    const f32v p = flush_probability(e * (col_factor * row->cross + row->own));
    return p * row->gain - row->shift;
}

CLIPFT_TARGET void KERNEL(loss_row_softmax_grad)(const float *x, float *out, int64_t cols, const clipft_softmax_row *row,
                                                 const float *col_factor)
{
    const clipft_softmax_row r = *row;
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= cols; j += CLIPFT_LANES)
        f32v_store(out + j, softmax_grad_step(f32v_load(x + j), f32v_load(col_factor + j), &r));
    if (j < cols)
        store_part(out + j, cols - j, softmax_grad_step(load_part(x + j, cols - j, 0.0F), load_part(col_factor + j, cols - j, 0.0F), &r));
}

SIMD f32v softmax_grad_wide_step(f32v x, f32v col_lse, f32v col_own, const clipft_softmax_row *row)
{
    const f32v p = f32v_exp(x * row->scale - row->lse) * row->own;
    const f32v q = f32v_exp(x * row->scale - col_lse) * col_own;
    return flush_probability(p + q) * row->gain - row->shift;
}

CLIPFT_TARGET void KERNEL(loss_row_softmax_grad_wide)(const float *x, float *out, int64_t cols, const clipft_softmax_row *row,
                                                      const clipft_softmax_cols *col)
{
    const clipft_softmax_row r = *row;
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= cols; j += CLIPFT_LANES)
        f32v_store(out + j, softmax_grad_wide_step(f32v_load(x + j), f32v_load(col->lse + j), f32v_load(col->own + j), &r));
    if (j < cols) {
        const int64_t n = cols - j;
        const f32v lse = load_part(col->lse + j, n, 0.0F), own = load_part(col->own + j, n, 0.0F);
        store_part(out + j, n, softmax_grad_wide_step(load_part(x + j, n, 0.0F), lse, own, &r));
    }
}

CLIPFT_TARGET float KERNEL(loss_row_match_sum)(const float *x, int64_t cols, const int32_t *ids, int32_t id, float *all)
{
    f32v match = f32v_set(0.0F), total = f32v_set(0.0F);
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= cols; j += CLIPFT_LANES) {
        const f32v v = f32v_load(x + j);
        total += v;
        match += f32v_zero_where(i32v_load(ids + j) != id, v);
    }
    if (j < cols) {
        const f32v v = load_part(x + j, cols - j, 0.0F);
        total += v;
        match += f32v_zero_where(load_ids_part(ids + j, cols - j) != id, v);
    }
    *all += f32v_sum(total);
    return f32v_sum(match);
}

CLIPFT_TARGET void KERNEL(loss_row_match_add)(float *x, int64_t cols, const int32_t *ids, int32_t id, float value)
{
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= cols; j += CLIPFT_LANES)
        f32v_store(x + j, f32v_load(x + j) + f32v_zero_where(i32v_load(ids + j) != id, f32v_set(value)));
    for (; j < cols; ++j)
        if (ids[j] == id) x[j] += value;
}

/* The sign bit of the lanes whose id is the row's, which makes z and its sigmoid's factor negative; nothing without ids. */
SIMD i32v match_signs(const bool matching, const int32_t *ids, int64_t j, int64_t n, int32_t id)
{
    if (!matching) return (i32v){0};
    return ((n < CLIPFT_LANES ? load_ids_part(ids + j, n) : i32v_load(ids + j)) == id) & INT32_MIN;
}

SIMD f32v with_signs(f32v v, i32v signs) { return (f32v)((i32v)v ^ signs); }

SIMD f32v softplus_step(f32v x, float scale, float bias, i32v signs)
{
    const f32v z = with_signs(x * scale + bias, signs);
    const f32v positive = f32v_zero_where(z < 0.0F, z);
    return positive + f32v_log1p(f32v_exp(f32v_select(z < 0.0F, z, -z)));
}

SIMD float softplus_sum(const bool matching, const float *x, int64_t cols, float scale, float bias, const int32_t *ids, int32_t id)
{
    f32v sum = f32v_set(0.0F);
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= cols; j += CLIPFT_LANES)
        sum += softplus_step(f32v_load(x + j), scale, bias, match_signs(matching, ids, j, CLIPFT_LANES, id));
    if (j < cols) {
        const i32v signs = match_signs(matching, ids, j, cols - j, id);
        sum += f32v_zero_where(~first_lanes(cols - j), softplus_step(load_part(x + j, cols - j, 0.0F), scale, bias, signs));
    }
    return f32v_sum(sum);
}

CLIPFT_TARGET float KERNEL(loss_row_softplus_sum)(const float *x, int64_t cols, float scale, float bias, const int32_t *ids, int32_t id)
{
    return ids ? softplus_sum(true, x, cols, scale, bias, ids, id) : softplus_sum(false, x, cols, scale, bias, ids, id);
}

/* sigmoid(z) = 1 / (1 + e) or e / (1 + e) with e = exp(-|z|), which cannot overflow. */
SIMD f32v sigmoid_step(f32v x, float scale, float bias, float gain, i32v signs)
{
    const f32v z = with_signs(x * scale + bias, signs);
    const f32v e = f32v_exp(f32v_select(z < 0.0F, z, -z));
    return with_signs(flush_probability(f32v_select(z < 0.0F, e, f32v_set(1.0F)) / (e + 1.0F)) * gain, signs);
}

SIMD float sigmoid_grad(const bool matching, const float *x, float *out, int64_t cols, float scale, float bias, float gain,
                        const int32_t *ids, int32_t id)
{
    f32v sum = f32v_set(0.0F);
    int64_t j = 0;
    for (; j + CLIPFT_LANES <= cols; j += CLIPFT_LANES) {
        const f32v g = sigmoid_step(f32v_load(x + j), scale, bias, gain, match_signs(matching, ids, j, CLIPFT_LANES, id));
        sum += g;
        f32v_store(out + j, g);
    }
    if (j < cols) {
        const i32v signs = match_signs(matching, ids, j, cols - j, id);
        const f32v g = f32v_zero_where(~first_lanes(cols - j), sigmoid_step(load_part(x + j, cols - j, 0.0F), scale, bias, gain, signs));
        sum += g;
        store_part(out + j, cols - j, g);
    }
    return f32v_sum(sum);
}

CLIPFT_TARGET float KERNEL(loss_row_sigmoid_grad)(const float *x, float *out, int64_t cols, float scale, float bias, float gain,
                                                  const int32_t *ids, int32_t id)
{
    return ids ? sigmoid_grad(true, x, out, cols, scale, bias, gain, ids, id)
               : sigmoid_grad(false, x, out, cols, scale, bias, gain, ids, id);
}
