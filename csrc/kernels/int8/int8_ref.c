/* The micro-kernels of int8 linear layers in plain C: the contract of int8_kernels.h to the letter, and what every CPU can run. */
#include "../table.h"

#include <math.h>
#include <string.h>

void clipft_int8_row_norm_ref(const float *x, int64_t n, const float *weight, const float *bias, float eps, float *out)
{
    double sum = 0.0, squares = 0.0;
    for (int64_t j = 0; j < n; ++j) sum += (double)x[j];
    const double mean = sum / (double)n;
    for (int64_t j = 0; j < n; ++j) squares += ((double)x[j] - mean) * ((double)x[j] - mean);
    const double inverse = 1.0 / sqrt(squares / (double)n + (double)eps);
    for (int64_t j = 0; j < n; ++j) out[j] = (float)(((double)x[j] - mean) * inverse) * weight[j] + bias[j];
}

void clipft_int8_row_scale_ref(const float *x, int64_t n, const float *factor, float *out)
{
    for (int64_t j = 0; j < n; ++j) out[j] = x[j] * factor[j];
}

void clipft_int8_row_range_ref(const float *x, int64_t n, clipft_range *range)
{
    clipft_range r = *range;
    for (int64_t j = 0; j < n; ++j) {
        r.low = x[j] < r.low ? x[j] : r.low;
        r.high = x[j] > r.high ? x[j] : r.high;
        r.bad += x[j] * 0.0F;
    }
    *range = r;
}

void clipft_int8_row_quantize_ref(const float *x, int64_t n, float inverse, int32_t zero, uint8_t *q)
{
    for (int64_t j = 0; j < n; ++j) {
        const int32_t level = (int32_t)nearbyintf(x[j] * inverse) + zero;
        q[j] = (uint8_t)(level < 0 ? 0 : level > 127 ? 127 : level);
    }
}

void clipft_int8_row_codes_ref(const float *x, int64_t n, float scale, int8_t *q)
{
    for (int64_t j = 0; j < n; ++j) q[j] = (int8_t)nearbyintf(x[j] / scale);
}

static void clipft_int8_multiply_ref(const clipft_int8_tile *tile, int32_t *sums)
{
    const clipft_int8_tile t = *tile;
    for (int64_t i = 0; i < t.rows; ++i)
        for (int64_t p = 0; p < t.panels; ++p) {
            int32_t sum[CLIPFT_INT8_PANEL] = {0};
            const uint8_t *x = t.x + i * t.x_stride;
            const int8_t *w = t.w + p * t.w_stride;
            for (int64_t k = 0; k < t.depth; k += 4, w += 4 * CLIPFT_INT8_PANEL)
                for (int c = 0; c < CLIPFT_INT8_PANEL; ++c)
                    for (int d = 0; d < 4; ++d) sum[c] += x[k + d] * w[4 * c + d];
            memcpy(sums + i * CLIPFT_INT8_COLS + p * CLIPFT_INT8_PANEL, sum, sizeof sum);
        }
}

const clipft_int8_dot clipft_int8_dot_ref = {.layout = CLIPFT_INT8_QUADS,
                                             .depth = 4,
                                             .rows = CLIPFT_INT8_DOT_ROWS,
                                             .pack = clipft_int8_pack_quads,
                                             .unpack = clipft_int8_unpack_quads,
                                             .multiply = clipft_int8_multiply_ref};

static float activate(float v, clipft_activation activation)
{
    if (activation == CLIPFT_QUICK_GELU) return v < -52.0F ? 0.0F : v / (1.0F + expf(-1.702F * v));
    if (activation == CLIPFT_GELU) return v < -14.0F ? 0.0F : 0.5F * v * erfcf(v * -0.70710678118654752F);
    if (activation == CLIPFT_GELU_TANH) return v < -10.5F ? 0.0F : v / (1.0F + expf(v * (v * v * -0.0713548163F - 1.59576912F)));
    return v;
}

void clipft_int8_finish_ref(const clipft_int8_finish *finish, const int32_t *sums)
{
    const clipft_int8_finish f = *finish;
    for (int64_t i = 0; i < f.rows; ++i)
        for (int64_t j = 0; j < f.cols; ++j) {
            /* Either term may wrap; their difference is a sum that fits. */
            const uint32_t sum = (uint32_t)sums[i * CLIPFT_INT8_COLS + j] - (uint32_t)f.row_zero[i] * (uint32_t)f.col_sum[j];
            const float v = (float)(int32_t)sum * f.col_scale[j] * f.row_scale[i] + f.bias[j];
            f.out[i * f.out_stride + j] = activate(v, f.activation) + (f.residual ? f.residual[i * f.residual_stride + j] : 0.0F);
        }
}
