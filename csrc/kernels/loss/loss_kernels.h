/* Declarations of the losses' micro-kernels: one of each slot per ISA. */
#ifndef CLIPFT_LOSS_KERNELS_H
#define CLIPFT_LOSS_KERNELS_H

#include "../kernels.h"

#define CLIPFT_DECLARE_LOSS_KERNELS(isa)                                                                                                   \
    float clipft_row_max_##isa(const float *x, int64_t cols, float scale);                                                                 \
    float clipft_row_exp_sum_##isa(const float *x, int64_t cols, float scale, float max, float weight, float *col_sum);                    \
    void clipft_block_col_lse_##isa(const float *x, int64_t rows, int64_t cols, int64_t stride, float scale, int64_t pair_row,             \
                                    float *col_max, float *col_sum);                                                                       \
    void clipft_row_softmax_grad_##isa(const float *x, float *out, int64_t cols, const clipft_softmax_row *row, const float *col_factor);  \
    void clipft_row_softmax_grad_wide_##isa(const float *x, float *out, int64_t cols, const clipft_softmax_row *row,                       \
                                            const clipft_softmax_cols *col);                                                               \
    float clipft_row_match_sum_##isa(const float *x, int64_t cols, const int32_t *ids, int32_t id, float *all);                            \
    void clipft_row_match_add_##isa(float *x, int64_t cols, const int32_t *ids, int32_t id, float value);                                  \
    float clipft_row_softplus_sum_##isa(const float *x, int64_t cols, float scale, float bias);                                            \
    float clipft_row_sigmoid_grad_##isa(const float *x, float *out, int64_t cols, float scale, float bias, float gain);

CLIPFT_DECLARE_LOSS_KERNELS(ref)
#if defined(__aarch64__)
CLIPFT_DECLARE_LOSS_KERNELS(neon)
#elif defined(__x86_64__)
CLIPFT_DECLARE_LOSS_KERNELS(avx2)
CLIPFT_DECLARE_LOSS_KERNELS(avx512)
#endif

#endif
