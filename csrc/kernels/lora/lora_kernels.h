/* Declarations of the micro-kernels of LoRA and quick_gelu: one of each slot per ISA. */
#ifndef CLIPFT_LORA_KERNELS_H
#define CLIPFT_LORA_KERNELS_H

#include "../kernels.h"

#define CLIPFT_DECLARE_LORA_KERNELS(isa)                                                                                                   \
    void clipft_rank_down_##isa(const float *x, int64_t stride, int64_t rows, int64_t cols, const float *panel, int64_t padded, float *v,  \
                                clipft_ahead ahead);                                                                                       \
    void clipft_rank_up_##isa(const clipft_rank_tile *tile);                                                                               \
    void clipft_rank_outer_##isa(const float *v, int64_t padded, int64_t rows, int64_t rank, const float *x, int64_t stride, int64_t cols, \
                                 float *acc, int64_t acc_stride, clipft_ahead ahead);                                                      \
    void clipft_row_dropout_##isa(const clipft_dropout_row *row, float *x, int32_t *mask, int64_t n);                                      \
    void clipft_row_merge_##isa(const float *x, const int32_t *mask, const float *base, float *out, int64_t n);                            \
    void clipft_row_quick_gelu_##isa(const float *x, float *out, int64_t n);                                                               \
    void clipft_row_quick_gelu_grad_##isa(const float *x, const float *grad, float *out, int64_t n);

CLIPFT_DECLARE_LORA_KERNELS(ref)
#if defined(__aarch64__)
CLIPFT_DECLARE_LORA_KERNELS(neon)
#elif defined(__x86_64__)
CLIPFT_DECLARE_LORA_KERNELS(avx2)
CLIPFT_DECLARE_LORA_KERNELS(avx512)
#endif

#endif
