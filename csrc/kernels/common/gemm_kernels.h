/* Declarations of the micro-kernels of gemm.h. */
#ifndef CLIPFT_GEMM_KERNELS_H
#define CLIPFT_GEMM_KERNELS_H

#include "../kernels.h"

#define CLIPFT_DECLARE_GEMM_KERNELS(isa) void clipft_gemm_rows_##isa(const clipft_gemm_block *block, int64_t begin, int64_t end);

CLIPFT_DECLARE_GEMM_KERNELS(ref)
#if defined(__aarch64__)
CLIPFT_DECLARE_GEMM_KERNELS(neon)
#elif defined(__x86_64__)
CLIPFT_DECLARE_GEMM_KERNELS(avx2)
CLIPFT_DECLARE_GEMM_KERNELS(avx512)
#endif

#endif
