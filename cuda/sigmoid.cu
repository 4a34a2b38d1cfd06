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

/* A block's elements but pairs, by Terms. */
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
    const double z = (double)a.scale[0] * (double)pair.x + (double)a.bias[0];
    const double own = pair.here ? fmax(-z, 0.0) + log1p(exp(-fabs(z))) + (z - z) : 0.0;
    add_block_sum(a.loss, terms.loss() + own, a.first, warp_sums);
    terms.finish(a, pair, z, warp_sums);
}

/* softplus(z) = max(z, 0) + log(1 + e), e = exp(-|z|). The factors 1 + e are multiplied, less 1 so that a small e is not lost: a logarithm
 * a thread, of 2^32 at most. */
struct Softplus {
    float linear[CLIPFT_CUDA_LANE_COLS], product[CLIPFT_CUDA_LANE_COLS];

    template <bool Whole> DEVICE_MEMBER void add(float z, float e, int k)
    {
        product[k] = fmaf(product[k], e, product[k] + e);
        float &sum = linear[Whole ? k : k & 1];    /* fewer, where labels or an edge want registers too */
        sum = fmaf(0.0f, z, sum + fmaxf(z, 0.0f)); /* Inf makes it NaN */
    }
    DEVICE_MEMBER double total() const
    {
        const float left = fmaf(product[0], product[1], product[0] + product[1]);
        const float right = fmaf(product[2], product[3], product[2] + product[3]);
        return (double)(linear[0] + linear[1] + (linear[2] + linear[3])) + (double)log1pf(fmaf(left, right, left + right));
    }
};

struct Losses {
    Softplus sum;

    template <bool Whole> DEVICE_MEMBER void row(const Logits &logits, int, unsigned counted, int r)
    {
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k)
            if (is_counted<Whole>(counted, r, k)) sum.template add<Whole>(logits.z[k], exp_fast(-fabsf(logits.z[k])), k);
    }
    DEVICE_MEMBER double loss() const { return sum.total(); }
    template <class Shared> DEVICE_MEMBER void finish(const clipft_cuda_sigmoid_args &, const OwnPair &, double, Shared &) const {}
};

KERNEL(CLIPFT_CUDA_THREADS, 4) sigmoid_tile(clipft_cuda_sigmoid_args a)
{
    SHARED(double, warp_sums, CLIPFT_CUDA_WARPS);
    over_block(a, Losses{}, warp_sums);
}

/* The losses and their coefficients sigmoid(z), and -sigmoid(-z) of positive pairs: of one exponential. */
struct LossesAndCoefficients {
    const clipft_cuda_sigmoid_args &a;
    Softplus losses;
    float sum[CLIPFT_CUDA_LANE_COLS];

    template <bool Whole> DEVICE_MEMBER void row(const Logits &logits, int element, unsigned counted, int r)
    {
        float out[CLIPFT_CUDA_LANE_COLS];
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
            const float z = logits.z[k], e = exp_fast(-fabsf(z)), upper = reciprocal(1.0f + e);
            const bool counts = is_counted<Whole>(counted, r, k);
            const float coefficient = counts ? logits.sign[k] * (z < 0.0f ? e * upper : upper) : 0.0f;
            if (counts) losses.template add<Whole>(z, e, k);
            sum[k] += coefficient;
            out[k] = coefficient * a.unit;
        }
        store_aligned(a.out, element, out); /* maybe into the room after a row too */
    }
    DEVICE_MEMBER double loss() const { return losses.total(); }
    template <class Shared>
    DEVICE_MEMBER void finish(const clipft_cuda_sigmoid_args &args, const OwnPair &pair, double z, Shared &warp_sums) const
    {
        double total = (double)(sum[0] + sum[1] + (sum[2] + sum[3]));
        if (pair.here) {
            const double coefficient = -1.0 / (1.0 + exp(z));
            args.pair[args.tile.row0 + pair.row] = (float)coefficient;
            total += coefficient;
        }
        __syncthreads(); /* the losses' sum was in warp_sums */
        add_block_sum(args.coefficient, total, args.first, warp_sums);
    }
};

KERNEL(CLIPFT_CUDA_THREADS, 4) sigmoid_grad(clipft_cuda_sigmoid_args a)
{
    SHARED(double, warp_sums, CLIPFT_CUDA_WARPS);
    over_block(a, LossesAndCoefficients{a, {}, {}}, warp_sums);
}
