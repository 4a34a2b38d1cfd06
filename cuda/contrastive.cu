/* The contrastive loss's kernels around torch's matrix products: see csrc/kernels/contrastive.c for the mathematics, csrc/ops/cuda_loss.c
 * for the walk over the tiles.
 *
 * Forward: contrastive_tile leaves of each block of a tile the maximum and the sum of exponentials of its rows and columns,
 * contrastive_merge takes them into the running ones, contrastive_lse makes logsumexps of these. Backward: contrastive_grad turns a tile
 * into coefficients. The pair's own logit stays out of the float32 sums and of the (maybe 16-bit) coefficients: near convergence 1 - p is
 * the gradient. Two exponentials an element in each pass, each relative to its own row or column, so that no row and no column is ever lost
 * to a range. */
#include "common.cuh"

/* ---- targets ---- */

KERNEL(CLIPFT_CUDA_THREADS) contrastive_class_weights(clipft_cuda_class_weights_args a)
{
    SHARED(long long, labels, CLIPFT_CUDA_THREADS);
    const long long own = (long long)blockIdx.x * CLIPFT_CUDA_THREADS + threadIdx.x;
    const long long label = own < a.cols ? a.labels[own * a.label_stride] : 0;
    int count = 0;
    for (long long begin = 0; begin < a.cols; begin += CLIPFT_CUDA_THREADS) {
        const long long rest = a.cols - begin;
        const int n = rest < CLIPFT_CUDA_THREADS ? (int)rest : (int)CLIPFT_CUDA_THREADS;
        if ((int)threadIdx.x < n) labels[threadIdx.x] = a.labels[(begin + threadIdx.x) * a.label_stride];
        __syncthreads();
        for (int k = 0; k < n; ++k) count += labels[k] == label;
        __syncthreads();
    }
    if (own < a.cols) a.weight[own] = 1.0f / (float)count;
}

/* A row's targets: its label's share, and what smoothing gives every column. */
struct RowTarget {
    long long label;
    float share, all;
};

DEVICE RowTarget row_target(const clipft_cuda_targets &t, long long pair)
{
    RowTarget row = {0, 1.0f - t.smoothing, t.smoothing / (float)t.cols};
    if (t.labels) {
        row.label = t.labels[pair * t.label_stride];
        row.share *= t.weight[pair];
    }
    return row;
}

DEVICE bool is_positive(const clipft_cuda_targets &t, const RowTarget &row, long long col, bool pair)
{
    return t.labels ? t.labels[col * t.label_stride] == row.label : pair;
}

/* ---- forward ---- */

KERNEL(CLIPFT_CUDA_THREADS) contrastive_tile(clipft_cuda_contrastive_tile_args a)
{
    SHARED(float, warp_cols, CLIPFT_CUDA_WARPS *CLIPFT_CUDA_BLOCK_COLS);
    SHARED(double, warp_sums, CLIPFT_CUDA_WARPS);
    const clipft_cuda_tile &tile = a.tile;
    const Place at = place_in(tile);
    const float scale = a.scale[0];
    const bool spread = a.targets.labels || a.targets.smoothing > 0.0f; /* more targets than the pair */
    unsigned counted = 0;                                               /* bit of every element but pairs and what lies outside */
    double target = 0.0;
    Elements x;
    load_elements(tile, at, x);
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) {
        const int row = at.row + r;
        if (row >= tile.rows) break;
        RowTarget want = {0, 0.0f, 0.0f};
        if (spread) want = row_target(a.targets, tile.row_offset + tile.row0 + row);
        float products = 0.0f;
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
            const int col = at.col + 32 * k;
            if (col >= tile.cols) break;
            const bool pair = col == at.pair + r;
            if (pair) a.pair[tile.row0 + row] = x[r][k];
            counted |= (unsigned)!pair << (r * CLIPFT_CUDA_LANE_COLS + k);
            if (spread)
                products += x[r][k] * (want.all + (is_positive(a.targets, want, tile.col0 + col, pair) ? want.share : 0.0f));
            else if (pair)
                products = x[r][k];
        }
        target += (double)products;
    }
    add_block_sum(a.target, target, a.first, warp_sums);

    /* Rows lie in one warp. */
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) {
        float max = NO_VALUE, sum = 0.0f;
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k)
            if (counted >> (r * CLIPFT_CUDA_LANE_COLS + k) & 1u) max = fmaxf(max, scale * x[r][k]);
        max = warp_max(max);
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k)
            if (counted >> (r * CLIPFT_CUDA_LANE_COLS + k) & 1u) sum += expf(fmaf(scale, x[r][k], -max));
        sum = warp_sum(sum);
        if (at.lane == 0 && at.row + r < tile.rows) {
            a.row.part_max[blockIdx.x * tile.rows + at.row + r] = max;
            a.row.part_sum[blockIdx.x * tile.rows + at.row + r] = sum;
        }
    }

    /* Columns go through all warps. */
    float col_max[CLIPFT_CUDA_LANE_COLS];
#pragma unroll
    for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
        float max = NO_VALUE;
#pragma unroll
        for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r)
            if (counted >> (r * CLIPFT_CUDA_LANE_COLS + k) & 1u) max = fmaxf(max, scale * x[r][k]);
        warp_cols[at.warp * CLIPFT_CUDA_BLOCK_COLS + at.lane + 32 * k] = max;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
        col_max[k] = NO_VALUE;
        for (int warp = 0; warp < CLIPFT_CUDA_WARPS; ++warp)
            col_max[k] = fmaxf(col_max[k], warp_cols[warp * CLIPFT_CUDA_BLOCK_COLS + at.lane + 32 * k]);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r)
            if (counted >> (r * CLIPFT_CUDA_LANE_COLS + k) & 1u) sum += expf(fmaf(scale, x[r][k], -col_max[k]));
        warp_cols[at.warp * CLIPFT_CUDA_BLOCK_COLS + at.lane + 32 * k] = sum;
    }
    __syncthreads();
    if (at.warp != 0) return;
#pragma unroll
    for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
        const int col = at.col + 32 * k;
        float sum = 0.0f;
        for (int warp = 0; warp < CLIPFT_CUDA_WARPS; ++warp) sum += warp_cols[warp * CLIPFT_CUDA_BLOCK_COLS + at.lane + 32 * k];
        if (col < tile.cols) {
            a.col.part_max[blockIdx.y * tile.cols + col] = col_max[k];
            a.col.part_sum[blockIdx.y * tile.cols + col] = sum;
        }
    }
}

/* Sums of nothing have the maximum -Inf, and add nothing. */
DEVICE double rescaled(double sum, float max, float to) { return sum == 0.0 ? 0.0 : sum * (double)expf(max - to); }

DEVICE void merge_line(const clipft_cuda_lines &lines, int line)
{
    float max = lines.first ? NO_VALUE : lines.max[line];
    double sum = lines.first ? 0.0 : lines.sum[line];
    float top = max;
    for (int k = 0; k < lines.blocks; ++k) top = fmaxf(top, lines.part_max[k * lines.lines + line]);
    sum = rescaled(sum, max, top);
    for (int k = 0; k < lines.blocks; ++k)
        sum += rescaled((double)lines.part_sum[k * lines.lines + line], lines.part_max[k * lines.lines + line], top);
    lines.max[line] = top;
    lines.sum[line] = sum;
}

/* A thread a line: rows, then columns. */
KERNEL(CLIPFT_CUDA_THREADS) contrastive_merge(clipft_cuda_contrastive_merge_args a)
{
    const int line = blockIdx.x * CLIPFT_CUDA_THREADS + threadIdx.x;
    if (line < a.row.lines)
        merge_line(a.row, line);
    else if (line < a.row.lines + a.col.lines)
        merge_line(a.col, line - a.row.lines);
}

/* log(sum exp(max) + exp(pair)); the pair's logit as the exact product of two floats. */
DEVICE double with_pair(double sum, float max, double pair)
{
    const double top = pair > (double)max ? pair : (double)max;
    const double rest = sum == 0.0 ? 0.0 : sum * exp((double)max - top);
    return top + log(rest + exp(pair - top));
}

/* A thread a line: rows, then columns. */
KERNEL(CLIPFT_CUDA_THREADS) contrastive_lse(clipft_cuda_contrastive_lse_args a)
{
    const long long line = (long long)blockIdx.x * CLIPFT_CUDA_THREADS + threadIdx.x;
    if (line < a.rows) {
        a.row[line] = with_pair(a.row[line], a.row_max[line], (double)a.scale[0] * (double)a.pair[line]);
    } else if (line < a.rows + a.cols) {
        const long long col = line - a.rows, pair = col - a.row_offset;
        if (a.rows == 0)
            a.col[col] = (double)NO_VALUE;
        else if (pair >= 0 && pair < a.rows)
            a.col[col] = with_pair(a.col[col], a.col_max[col], (double)a.scale[0] * (double)a.pair[pair]);
        else
            a.col[col] = (double)a.col_max[col] + log(a.col[col]);
    }
}

/* ---- backward ---- */

/* exp(logit - lse) of a lse in float64, in two floats. */
struct Lse {
    float high, low;
};

DEVICE Lse split(double lse)
{
    const float high = (float)lse;
    return {high, (float)(lse - (double)high)};
}

DEVICE float probability(float scale, float x, const Lse &lse) { return expf(fmaf(scale, x, -lse.high) - lse.low); }

KERNEL(CLIPFT_CUDA_THREADS) contrastive_grad(clipft_cuda_contrastive_grad_args a)
{
    const clipft_cuda_tile &tile = a.tile;
    const Place at = place_in(tile);
    const float scale = a.scale[0];
    const bool spread = a.targets.labels || a.targets.smoothing > 0.0f;
    Lse col_lse[CLIPFT_CUDA_LANE_COLS];
    Elements x;
    load_elements(tile, at, x);
#pragma unroll
    for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
        const int col = at.col + 32 * k;
        col_lse[k] = split(col < tile.cols ? a.col_lse[tile.col0 + col] : 0.0);
    }
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) {
        const int row = at.row + r;
        if (row >= tile.rows) break;
        const long long own = tile.row_offset + tile.row0 + row;
        const double lse = a.row_lse[tile.row0 + row];
        const Lse row_lse = split(lse);
        RowTarget want = {0, 1.0f, 0.0f};
        if (spread) want = row_target(a.targets, own);
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
            const int col = at.col + 32 * k;
            if (col >= tile.cols) break;
            const bool pair = col == at.pair + r;
            float coefficient = 0.0f;
            if (pair) {
                const double logit = (double)scale * (double)x[r][k];
                const double left = expm1(logit - lse) + expm1(logit - a.col_lse[own]) + 2.0 * (1.0 - (double)want.share);
                a.pair[tile.row0 + row] = (float)(left - 2.0 * (double)want.all);
            } else {
                coefficient = probability(scale, x[r][k], row_lse) + probability(scale, x[r][k], col_lse[k]);
                if (spread) coefficient -= 2.0f * (want.all + (is_positive(a.targets, want, tile.col0 + col, false) ? want.share : 0.0f));
            }
            store(a.out, row * tile.stride + col, coefficient * a.unit);
        }
    }
}
