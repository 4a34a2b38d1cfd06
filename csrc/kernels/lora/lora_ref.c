/* The micro-kernels of LoRA and quick_gelu in plain C: the contract of lora_kernels.h to the letter, and what every CPU can run. */
#include "../table.h"

#include <math.h>
#include <stddef.h>

/* Rows of the panel or of acc in the outer loop, so that the inner one runs along memory and a baseline compiler vectorises it. */
void clipft_lora_rank_down_ref(const float *x, int64_t stride, int64_t rows, int64_t cols, const float *panel, int64_t padded, float *v,
                               clipft_ahead ahead)
{
    (void)ahead;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j)
            for (int64_t k = 0; k < padded; ++k) v[i * padded + k] += x[i * stride + j] * panel[j * padded + k];
}

void clipft_lora_rank_up_ref(const clipft_rank_tile *tile)
{
    enum { PIECE = 64 };
    const clipft_rank_tile t = *tile;
    for (int64_t i = 0; i < t.rows; ++i)
        for (int64_t first = 0; first < t.cols; first += PIECE) {
            const int64_t n = t.cols - first < PIECE ? t.cols - first : PIECE;
            const float *init = t.init + i * t.init_stride + first;
            const int32_t *mask = t.mask ? t.mask + i * t.mask_stride + first : NULL;
            float *out = t.out + i * t.out_stride + first, sum[PIECE] = {0};
            for (int64_t k = 0; k < t.rank; ++k)
                for (int64_t j = 0; j < n; ++j) sum[j] += t.v[i * t.padded + k] * t.panel[k * t.panel_stride + first + j];
            for (int64_t j = 0; j < n; ++j) out[j] = init[j] + (mask && !mask[j] ? 0.0F : sum[j]);
        }
}

void clipft_lora_rank_outer_ref(const float *v, int64_t padded, int64_t rows, int64_t rank, const float *x, int64_t stride, int64_t cols,
                                float *acc, int64_t acc_stride, clipft_ahead ahead)
{
    (void)ahead;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < rank; ++k)
            for (int64_t j = 0; j < cols; ++j) acc[k * acc_stride + j] += v[i * padded + k] * x[i * stride + j];
}

void clipft_lora_row_dropout_ref(const clipft_dropout_row *row, const float *x, float *out, int32_t *mask, int64_t n)
{
    for (int64_t j = 0; j < n; ++j) {
        uint32_t h = (row->col + (uint32_t)j) * CLIPFT_HASH_STEP + row->low;
        h = (h ^ h >> 16) * CLIPFT_HASH_MUL1;
        h = ((h ^ h >> 15) + row->high) * CLIPFT_HASH_MUL2;
        h ^= h >> 15;
        mask[j] = (int32_t)h >= row->threshold ? -1 : 0;
        out[j] = mask[j] ? x[j] : 0.0F;
    }
}

void clipft_lora_row_quick_gelu_ref(const float *x, float *out, int64_t n)
{
    for (int64_t j = 0; j < n; ++j) out[j] = x[j] / (1.0F + expf(-1.702F * x[j]));
}

void clipft_lora_row_quick_gelu_grad_ref(const float *x, const float *grad, float *out, int64_t n)
{
    for (int64_t j = 0; j < n; ++j) {
        const float z = 1.702F * x[j], e = expf(-fabsf(z));
        const float near = 1.0F / (1.0F + e), far = e * near; /* sigmoid(|z|) and 1 - sigmoid(|z|) */
        out[j] = grad[j] * ((z < 0.0F ? far : near) + z * (near * far));
    }
}
