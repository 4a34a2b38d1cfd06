/* The inner loops of gemm.h, written once for every width. The file that includes this has included its tier's isa_<isa>.h and
 * defines GEMM_ROWS, GEMM_PANELS, the tile of sums kept in registers, chosen so that operands fit beside it. */
#include "../table.h"
#include "gemm.h"
#include "simd.h"

#include <stdbool.h>

enum { PANEL_VECS = CLIPFT_GEMM_PANEL / CLIPFT_LANES };

/* c[rows, cols] = or += a^T b over `depth`: a [depth, GEMM_ROWS], b `panels` panels of [depth, CLIPFT_GEMM_PANEL]. */
SIMD void multiply_tile(const int panels, const float *a, const float *b, int64_t depth, clipft_matrix c, bool accumulate)
{
    const int vecs = panels * PANEL_VECS;
    f32v acc[GEMM_ROWS][GEMM_PANELS * PANEL_VECS];
    UNROLL for (int i = 0; i < GEMM_ROWS; ++i) UNROLL for (int v = 0; v < vecs; ++v) acc[i][v] = f32v_set(0.0F);
    for (int64_t k = 0; k < depth; ++k) {
        f32v row[GEMM_PANELS * PANEL_VECS];
        UNROLL for (int v = 0; v < vecs; ++v) row[v] =
            f32v_load(b + v / PANEL_VECS * depth * CLIPFT_GEMM_PANEL + k * CLIPFT_GEMM_PANEL + v % PANEL_VECS * CLIPFT_LANES);
        UNROLL for (int i = 0; i < GEMM_ROWS; ++i)
        {
            const f32v one = f32v_set(a[k * GEMM_ROWS + i]);
            UNROLL for (int v = 0; v < vecs; ++v) acc[i][v] += one * row[v];
        }
    }
    UNROLL for (int i = 0; i < GEMM_ROWS; ++i)
    {
        if (i >= c.rows) return;
        UNROLL for (int v = 0; v < vecs; ++v)
        {
            float *out = c.data + i * c.row_stride + v * CLIPFT_LANES;
            const int64_t left = c.cols - v * CLIPFT_LANES;
            if (left >= CLIPFT_LANES)
                f32v_store(out, accumulate ? acc[i][v] + f32v_load(out) : acc[i][v]);
            else if (left > 0)
                store_part(out, left, accumulate ? acc[i][v] + load_part(out, left, 0.0F) : acc[i][v]);
        }
    }
}

CLIPFT_TARGET void KERNEL(gemm_multiply)(const clipft_gemm_block *block, int64_t begin, int64_t end)
{
    float a[CLIPFT_GEMM_DEPTH * GEMM_ROWS] __attribute__((aligned(64)));
    const int64_t depth = block->a.cols;
    for (int64_t i = begin; i < end; i += GEMM_ROWS) {
        const int64_t i1 = i + GEMM_ROWS < end ? i + GEMM_ROWS : end;
        clipft_matrix c = clipft_rows(block->c, i, i1);
        const float *b = block->b;
        clipft_gemm_pack(GEMM_ROWS, clipft_rows(block->a, i, i1), a);
        while (c.cols > 0) {
            int64_t cols = GEMM_PANELS * CLIPFT_GEMM_PANEL;
#if GEMM_PANELS > 1
            if (c.cols <= cols - CLIPFT_GEMM_PANEL) {
                cols = CLIPFT_GEMM_PANEL;
                multiply_tile(1, a, b, depth, c, block->accumulate);
            } else
#endif
                multiply_tile(GEMM_PANELS, a, b, depth, c, block->accumulate);
            c.data += cols;
            c.cols -= cols;
            b += cols * depth;
        }
    }
}
