/* The contract of gemm.h's micro-kernel. */
#ifndef CLIPFT_GEMM_KERNELS_H
#define CLIPFT_GEMM_KERNELS_H

#include "matrix.h"

#include <stdbool.h>

/* Operands of `multiply`: see gemm.h. The block of b is packed; a and c are whole. */
enum { CLIPFT_GEMM_PANEL = 16, CLIPFT_GEMM_DEPTH = 256 };

typedef struct clipft_gemm_block {
    clipft_matrix c; /* [rows, cols], col_stride 1 */
    clipft_matrix a; /* [rows, depth], depth <= CLIPFT_GEMM_DEPTH */
    const float *b;  /* [cols / 16 rounded up, depth, 16] */
    bool accumulate;
} clipft_gemm_block;

typedef struct clipft_gemm_kernels {
    /* c[i] = or += a[i] b for rows i of begin .. end - 1. */
    void (*multiply)(const clipft_gemm_block *block, int64_t begin, int64_t end);
} clipft_gemm_kernels;

#endif
