/* The sigmoid loss's kernels around torch's matrix products: see csrc/kernels/sigmoid.c for the mathematics, csrc/ops/cuda_loss.c for the
 * walk over the tiles. The pair's own term is float64 and apart from the others: near convergence it would take them out of a float32 sum.
 */
#include "common.cuh"

DEVICE float softplus(float z) { return fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z))) + (z - z); /* fmaxf passes over NaN */ }

/* The sum of term(element, z) over the thread's elements but pairs, and of pair(row, element, z) over these. */
template <class Term, class Pair> DEVICE double over_elements(const clipft_cuda_sigmoid_args &a, Term term, Pair pair)
{
    const clipft_cuda_tile &tile = a.tile;
    const Place at = place_in(tile);
    const float scale = a.scale[0], bias = a.bias[0];
    double total = 0.0;
    Elements x;
    load_elements(tile, at, x);
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) {
        const int row = at.row + r;
        if (row >= tile.rows) break;
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
            const int col = at.col + 32 * k, element = row * tile.stride + col;
            if (col >= tile.cols) break;
            if (col == at.pair + r)
                total += pair(tile.row0 + row, element, (double)scale * (double)x[r][k] + (double)bias);
            else
                sum += term(element, fmaf(scale, x[r][k], bias));
        }
        total += (double)sum;
    }
    return total;
}

KERNEL(CLIPFT_CUDA_THREADS) sigmoid_tile(clipft_cuda_sigmoid_args a)
{
    SHARED(double, warp_sums, CLIPFT_CUDA_WARPS);
    const double total = over_elements(
        a, [](int, float z) { return softplus(z); },
        [](long long, int, double z) { return fmax(-z, 0.0) + log1p(exp(-fabs(z))) + (z - z); });
    add_block_sum(a.sum, total, a.first, warp_sums);
}

KERNEL(CLIPFT_CUDA_THREADS) sigmoid_grad(clipft_cuda_sigmoid_args a)
{
    SHARED(double, warp_sums, CLIPFT_CUDA_WARPS);
    const double total = over_elements(
        a,
        [&a](int element, float z) {
            const float coefficient = sigmoid(z);
            store(a.out, element, coefficient * a.unit);
            return coefficient;
        },
        [&a](long long row, int element, double z) {
            const double coefficient = -1.0 / (1.0 + exp(z)); /* sigmoid(z) - 1 */
            a.pair[row] = (float)coefficient;
            store(a.out, element, 0.0f);
            return coefficient;
        });
    add_block_sum(a.sum, total, a.first, warp_sums);
}
