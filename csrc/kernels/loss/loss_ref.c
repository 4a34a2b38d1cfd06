/* The losses' micro-kernels in plain C: the contract of loss_kernels.h to the letter, and what every CPU can run. */
#include "../table.h"

#include <math.h>

float clipft_loss_row_max_ref(const float *x, int64_t cols, float scale)
{
    float max = -INFINITY;
    for (int64_t j = 0; j < cols; ++j) max = fmaxf(max, scale * x[j]);
    return max;
}

float clipft_loss_row_exp_sum_ref(const float *x, int64_t cols, float scale, float max, float weight, float *col_sum)
{
    double sum = 0.0;
    for (int64_t j = 0; j < cols; ++j) {
        const float e = expf(fmaf(scale, x[j], -max));
        sum += (double)e;
        col_sum[j] += weight * e;
    }
    return (float)sum;
}

void clipft_loss_block_col_lse_ref(const float *x, int64_t rows, int64_t cols, int64_t stride, float scale, int64_t pair_row,
                                   float *col_max, float *col_sum)
{
    for (int64_t j = 0; j < cols; ++j) {
        double sum = 0.0;
        col_max[j] = -INFINITY;
        for (int64_t i = 0; i < rows; ++i)
            if (i != pair_row + j) col_max[j] = fmaxf(col_max[j], scale * x[i * stride + j]);
        for (int64_t i = 0; i < rows; ++i)
            if (i != pair_row + j) sum += (double)expf(fmaf(scale, x[i * stride + j], -col_max[j]));
        col_sum[j] = (float)sum;
    }
}

void clipft_loss_row_softmax_grad_ref(const float *x, float *out, int64_t cols, const clipft_softmax_row *row, const float *col_factor)
{
    for (int64_t j = 0; j < cols; ++j) {
        const float e = expf(fmaf(row->scale, x[j], -row->lse));
        const float p = e * fmaf(row->cross, col_factor[j], row->own);
        out[j] = row->gain * p - row->shift;
    }
}

void clipft_loss_row_softmax_grad_wide_ref(const float *x, float *out, int64_t cols, const clipft_softmax_row *row,
                                           const clipft_softmax_cols *col)
{
    for (int64_t j = 0; j < cols; ++j) {
        const float p = row->own * expf(fmaf(row->scale, x[j], -row->lse));
        const float q = col->own[j] * expf(fmaf(row->scale, x[j], -col->lse[j]));
        out[j] = row->gain * (p + q) - row->shift;
    }
}

float clipft_loss_row_match_sum_ref(const float *x, int64_t cols, const int32_t *ids, int32_t id, float *all)
{
    double match = 0.0, total = 0.0;
    for (int64_t j = 0; j < cols; ++j) {
        total += (double)x[j];
        if (ids[j] == id) match += (double)x[j];
    }
    *all += (float)total;
    return (float)match;
}

void clipft_loss_row_match_add_ref(float *x, int64_t cols, const int32_t *ids, int32_t id, float value)
{
    for (int64_t j = 0; j < cols; ++j)
        if (ids[j] == id) x[j] += value;
}

float clipft_loss_row_softplus_sum_ref(const float *x, int64_t cols, float scale, float bias, const int32_t *ids, int32_t id)
{
    double sum = 0.0;
    for (int64_t j = 0; j < cols; ++j) {
        const float sign = ids && ids[j] == id ? -1.0F : 1.0F, z = sign * fmaf(scale, x[j], bias);
        sum += (double)((z < 0.0F ? 0.0F : z) + log1pf(expf(-fabsf(z))));
    }
    return (float)sum;
}

float clipft_loss_row_sigmoid_grad_ref(const float *x, float *out, int64_t cols, float scale, float bias, float gain, const int32_t *ids,
                                       int32_t id)
{
    double sum = 0.0;
    for (int64_t j = 0; j < cols; ++j) {
        const float sign = ids && ids[j] == id ? -1.0F : 1.0F;
        out[j] = sign * gain / (1.0F + expf(-sign * fmaf(scale, x[j], bias)));
        sum += (double)out[j];
    }
    return (float)sum;
}
