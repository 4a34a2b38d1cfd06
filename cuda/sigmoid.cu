/* The sigmoid loss's kernels around torch's matrix products: see csrc/kernels/loss/sigmoid.c for the mathematics, csrc/ops/loss_cuda.c for
 * the walk over the tiles. The pair's own term is float64 and apart from the others: near convergence it would take them out of a float32
 * sum.
 */
#include "common.cuh"

/* A thread's part of a row: logits, times sign -1 where labels make a pair positive. */
struct Logits {
    float z[CLIPFT_CUDA_LANE_COLS], sign[CLIPFT_CUDA_LANE_COLS];
};

/* The bit of each of a thread's elements whose row and column have one label: kept in place of the labels, for their registers. */
DEVICE unsigned positive_elements(const clipft_cuda_sigmoid_args &a, const Place &at)
{
    const ColumnLabels columns = column_labels(a.labels, a.tile, at);
    unsigned positive = 0;
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) {
        if (at.row + r >= a.tile.rows) continue;
        const long long label = label_of(a.labels, a.tile.row_offset + a.tile.row0 + at.row + r);
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k)
            if (columns.of[k] == label) positive |= 1u << (r * CLIPFT_CUDA_LANE_COLS + k);
    }
    return positive;
}

/* The sum of a block's elements but pairs, by Terms. */
template <bool Whole, bool Labelled, class Terms>
DEVICE void over_elements(const clipft_cuda_sigmoid_args &a, const Place &at, const Elements &x, unsigned positive, Terms &terms)
{
    const float scale = a.scale[0], bias = a.bias[0];
    const unsigned counted = Whole ? 0 : counted_elements(a.tile, at);
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) {
        if (!Whole && (at.row + r >= a.tile.rows || at.col >= a.tile.cols)) continue;
        Logits row;
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
            row.sign[k] = Labelled && is_counted<false>(positive, r, k) ? -1.0f : 1.0f;
            row.z[k] = row.sign[k] * fmaf(scale, x[r][k], bias);
        }
        terms.template row<Whole>(row, (at.row + r) * a.tile.stride + at.col, counted, r);
    }
}

template <class Terms, class Shared> DEVICE void over_block(const clipft_cuda_sigmoid_args &a, Terms terms, Shared &warp_sums)
{
    const Place at = place_in(a.tile);
    const unsigned positive = a.labels.data ? positive_elements(a, at) : 0;
    Elements x;
    load_elements(a.tile, at, x);
    const OwnPair pair = own_pair(a.tile, at);
    if (at.pairs) __syncthreads(); /* before `out`, maybe the tile itself, is written */
    if (a.labels.data)
        over_elements<false, true>(a, at, x, positive, terms);
    else if (at.whole)
        over_elements<true, false>(a, at, x, positive, terms);
    else
        over_elements<false, false>(a, at, x, positive, terms);
    double total = terms.total();
    if (pair.here) total += terms.pair(a.tile.row0 + pair.row, (double)a.scale[0] * (double)pair.x + (double)a.bias[0]);
    add_block_sum(a.sum, total, a.first, warp_sums);
}

/* softplus(z) = max(z, 0) + log(1 + e), e = exp(-|z|). The factors 1 + e are multiplied, less 1 so that a small e is not lost: a logarithm
 * a thread, of 2^32 at most. */
struct Softplus {
    float linear[CLIPFT_CUDA_LANE_COLS], product[CLIPFT_CUDA_LANE_COLS];

    template <bool Whole> DEVICE_MEMBER void row(const Logits &logits, int, unsigned counted, int r)
    {
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
            if (!is_counted<Whole>(counted, r, k)) continue;
            const float z = logits.z[k], e = exp_fast(-fabsf(z));
            product[k] = fmaf(product[k], e, product[k] + e);
            float &sum = linear[Whole ? k : k & 1];    /* fewer, where labels or an edge want registers too */
            sum = fmaf(0.0f, z, sum + fmaxf(z, 0.0f)); /* Inf makes it NaN */
        }
    }
    DEVICE_MEMBER double total() const
    {
        const float left = fmaf(product[0], product[1], product[0] + product[1]);
        const float right = fmaf(product[2], product[3], product[2] + product[3]);
        return (double)(linear[0] + linear[1] + (linear[2] + linear[3])) + (double)log1pf(fmaf(left, right, left + right));
    }
    DEVICE_MEMBER double pair(long long, double z) const { return fmax(-z, 0.0) + log1p(exp(-fabs(z))) + (z - z); }
};

KERNEL(CLIPFT_CUDA_THREADS, 4) sigmoid_tile(clipft_cuda_sigmoid_args a)
{
    SHARED(double, warp_sums, CLIPFT_CUDA_WARPS);
    over_block(a, Softplus{}, warp_sums);
}

/* The coefficients sigmoid(z), and -sigmoid(-z) of positive pairs. */
struct Coefficients {
    const clipft_cuda_sigmoid_args &a;
    float sum[CLIPFT_CUDA_LANE_COLS];

    template <bool Whole> DEVICE_MEMBER void row(const Logits &logits, int element, unsigned counted, int r)
    {
        float out[CLIPFT_CUDA_LANE_COLS];
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
            const float sigmoid = reciprocal(1.0f + exp_fast(-logits.z[k]));
            const float coefficient = is_counted<Whole>(counted, r, k) ? logits.sign[k] * sigmoid : 0.0f;
            sum[k] += coefficient;
            out[k] = coefficient * a.unit;
        }
        store_aligned(a.out, element, out); /* maybe into the room after a row too */
    }
    DEVICE_MEMBER double total() const { return (double)(sum[0] + sum[1] + (sum[2] + sum[3])); }
    DEVICE_MEMBER double pair(long long row, double z) const
    {
        const double coefficient = -1.0 / (1.0 + exp(z));
        a.pair[row] = (float)coefficient;
        return coefficient;
    }
};

KERNEL(CLIPFT_CUDA_THREADS, 4) sigmoid_grad(clipft_cuda_sigmoid_args a)
{
    SHARED(double, warp_sums, CLIPFT_CUDA_WARPS);
    over_block(a, Coefficients{a, {}}, warp_sums);
}
