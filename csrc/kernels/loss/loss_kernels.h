/* The contracts of the losses' micro-kernels, which work on a row of a tile of raw products x = <image_i, text_j>. Every ISA keeps them,
 * with float rounding its own. */
#ifndef CLIPFT_LOSS_KERNELS_H
#define CLIPFT_LOSS_KERNELS_H

#include <stdint.h>

/* How a row of a tile becomes a row of d loss / d logits; see row_softmax_grad. */
typedef struct clipft_softmax_row {
    float scale; /* logits are scale * x */
    float lse;   /* the row's logsumexp, rounded to float32 */
    float own;   /* exp(lse - exact logsumexp): what rounding took away */
    float cross; /* factor that turns exp(logit - lse) * cross * col_factor[j] into exp(logit - column j's logsumexp) */
    float gain;  /* factor of the probabilities */
    float shift; /* subtracted from every element */
} clipft_softmax_row;

/* A column's logsumexp, split like the row's. */
typedef struct clipft_softmax_cols {
    const float *lse; /* [cols] */
    const float *own; /* [cols] */
} clipft_softmax_cols;

typedef struct clipft_loss_kernels {
    /* max_j scale * x[j]; NaNs are passed over. */
    float (*row_max)(const float *x, int64_t cols, float scale);

    /* e[j] = exp(scale * x[j] - max), max >= every scale * x[j]; col_sum[j] += weight * e[j]; returns the sum of e. */
    float (*row_exp_sum)(const float *x, int64_t cols, float scale, float max, float weight, float *col_sum);

    /* For each column of a [rows, cols] block whose rows lie `stride` apart: col_max[j] = max_i scale * x, col_sum[j] = sum_i exp(scale *
     * x - col_max[j]), over all rows but the column's pair, row pair_row + j. Of no rows: -Inf and 0. */
    void (*block_col_lse)(const float *x, int64_t rows, int64_t cols, int64_t stride, float scale, int64_t pair_row, float *col_max,
                          float *col_sum);

    /* out[j] = gain * (exp(logit - row's lse) + exp(logit - column's lse)) - shift with one exponential an element, as
     * gain * exp(scale * x - lse) * (own + cross * col_factor[j]) - shift. The caller sees to it that no factor overflows. out may be x. */
    void (*row_softmax_grad)(const float *x, float *out, int64_t cols, const clipft_softmax_row *row, const float *col_factor);

    /* The same with two exponentials an element, for tiles whose rows' and columns' logsumexps lie too far apart. */
    void (*row_softmax_grad_wide)(const float *x, float *out, int64_t cols, const clipft_softmax_row *row, const clipft_softmax_cols *col);

    /* Returns the sum of x[j] where ids[j] == id, and adds the sum of all x[j] to *all. */
    float (*row_match_sum)(const float *x, int64_t cols, const int32_t *ids, int32_t id, float *all);

    /* x[j] += value where ids[j] == id. */
    void (*row_match_add)(float *x, int64_t cols, const int32_t *ids, int32_t id, float value);

    /* Returns sum_j softplus(z), z = scale * x[j] + bias, or softplus(-z) where ids[j] == id; without ids (NULL) nowhere. */
    float (*row_softplus_sum)(const float *x, int64_t cols, float scale, float bias, const int32_t *ids, int32_t id);

    /* out[j] = gain * sigmoid(z), or -gain * sigmoid(-z), in the same places; returns the sum of out. out may be x. */
    float (*row_sigmoid_grad)(const float *x, float *out, int64_t cols, float scale, float bias, float gain, const int32_t *ids,
                              int32_t id);
} clipft_loss_kernels;

#endif
