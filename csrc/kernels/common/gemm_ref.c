#include "../table.h"

void clipft_gemm_multiply_ref(const clipft_gemm_block *block, int64_t begin, int64_t end)
{
    const clipft_matrix a = block->a, c = block->c;
    for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < c.cols; ++j) {
            const float *b = block->b + j / CLIPFT_GEMM_PANEL * CLIPFT_GEMM_PANEL * a.cols + j % CLIPFT_GEMM_PANEL;
            float *out = c.data + i * c.row_stride + j, sum = 0.0F;
            for (int64_t k = 0; k < a.cols; ++k) sum += a.data[i * a.row_stride + k * a.col_stride] * b[k * CLIPFT_GEMM_PANEL];
            *out = block->accumulate ? *out + sum : sum;
        }
}
