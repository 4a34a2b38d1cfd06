/* Declarations of the micro-kernels of int8 linear layers: one of each slot per ISA, and the dot products alone where only they differ. */
#ifndef CLIPFT_INT8_KERNELS_H
#define CLIPFT_INT8_KERNELS_H

#include "../kernels.h"

#define CLIPFT_DECLARE_INT8_DOT(isa) void clipft_int8_dot_##isa(const clipft_int8_tile *tile, int32_t *sums);

#define CLIPFT_DECLARE_INT8_KERNELS(isa)                                                                                                   \
    CLIPFT_DECLARE_INT8_DOT(isa)                                                                                                           \
    void clipft_row_norm_##isa(const float *x, int64_t n, const float *weight, const float *bias, float eps, float *out);                  \
    void clipft_row_range_##isa(const float *x, int64_t n, clipft_range *range);                                                           \
    void clipft_row_quantize_##isa(const float *x, int64_t n, float inverse, int32_t zero, uint8_t *q);                                    \
    void clipft_int8_finish_##isa(const clipft_int8_finish *finish, const int32_t *sums);

CLIPFT_DECLARE_INT8_KERNELS(ref)
#if defined(__aarch64__)
CLIPFT_DECLARE_INT8_KERNELS(neon)
CLIPFT_DECLARE_INT8_DOT(neon_dot)
CLIPFT_DECLARE_INT8_DOT(neon_i8mm)
#elif defined(__x86_64__)
CLIPFT_DECLARE_INT8_KERNELS(avx2)
CLIPFT_DECLARE_INT8_DOT(avx_vnni)
CLIPFT_DECLARE_INT8_KERNELS(avx512)
CLIPFT_DECLARE_INT8_DOT(avx512_vnni)
#endif

#endif
