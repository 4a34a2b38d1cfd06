/* The contrastive loss's kernels around torch's matrix products: see csrc/kernels/loss/contrastive.c for the mathematics,
 * csrc/ops/loss_cuda.c for the walk over the tiles.
 *
 * Forward: contrastive_tile leaves of each block of a tile the maximum and the sum of exponentials of its rows and columns,
 * contrastive_merge takes them into the running ones, contrastive_lse makes logsumexps of these. Backward: contrastive_grad turns a tile
 * into coefficients. The pair's own logit stays out of the float32 sums and of the (maybe 16-bit) coefficients: near convergence 1 - p is
 * the gradient. Two exponentials an element in each pass, each relative to its own row or column, so that no row and no column is ever lost
 * to a range.
 *
 * What the two passes over the elements cost is instructions, so that they have no branches but at the tile's edges and the pairs, shuffle
 * little, and convert no float64 an element. */
#include "common.cuh"

/* ---- targets ---- */

KERNEL(CLIPFT_CUDA_THREADS) contrastive_class_weights(clipft_cuda_class_weights_args a)
{
    SHARED(long long, labels, CLIPFT_CUDA_THREADS);
    const long long own = (long long)blockIdx.x * CLIPFT_CUDA_THREADS + threadIdx.x;
    const long long label = own < a.cols ? label_of(a.labels, own) : 0;
    int count = 0;
    for (long long begin = 0; begin < a.cols; begin += CLIPFT_CUDA_THREADS) {
        const long long rest = a.cols - begin;
        const int n = rest < CLIPFT_CUDA_THREADS ? (int)rest : (int)CLIPFT_CUDA_THREADS;
        if ((int)threadIdx.x < n) labels[threadIdx.x] = label_of(a.labels, begin + threadIdx.x);
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
    if (t.labels.data) {
        row.label = label_of(t.labels, pair);
        row.share *= t.weight[pair];
    }
    return row;
}

/* The target probability of the thread's k-th column. */
DEVICE float target_of(const clipft_cuda_targets &t, const RowTarget &row, const ColumnLabels &labels, int k, bool pair)
{
    return row.all + ((t.labels.data ? labels.of[k] == row.label : pair) ? row.share : 0.0f);
}

/* ---- forward ---- */

/* The sum over the thread's elements of target probability * product, where there are more targets than the pairs. */
DEVICE double target_products(const clipft_cuda_contrastive_tile_args &a, const Place &at, const Elements &x)
{
    const clipft_cuda_tile &tile = a.tile;
    const ColumnLabels labels = column_labels(a.targets.labels, tile, at);
    double target = 0.0;
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) {
        if (at.row + r >= tile.rows) break;
        const RowTarget want = row_target(a.targets, tile.row_offset + tile.row0 + at.row + r);
        float products = 0.0f;
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k)
            if (at.col + k < tile.cols) products += x[r][k] * target_of(a.targets, want, labels, k, at.col + k == at.pair + r);
        target += (double)products;
    }
    return target;
}

struct Larger {
    DEVICE float of(float a, float b) { return fmaxf(a, b); }
};
struct Sum {
    DEVICE float of(float a, float b) { return a + b; }
};

/* Lane l gets the value of row l / 4 over the whole warp: every step leaves each lane half of the rows, 9 shuffles instead of 40. */
template <class Op> DEVICE float over_warp(const float (&rows)[CLIPFT_CUDA_WARP_ROWS], int lane)
{
    static_assert(CLIPFT_CUDA_WARP_ROWS == 8, "three steps leave a row");
    float kept[CLIPFT_CUDA_WARP_ROWS];
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) kept[r] = rows[r];
#pragma unroll
    for (int count = CLIPFT_CUDA_WARP_ROWS / 2, step = 16; count > 0; count /= 2, step /= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int r = 0; r < count; ++r) {
            const float other = __shfl_xor_sync(0xffffffffu, upper ? kept[r] : kept[r + count], step);
            kept[r] = Op::of(upper ? kept[r + count] : kept[r], other);
        }
    }
    kept[0] = Op::of(kept[0], __shfl_xor_sync(0xffffffffu, kept[0], 2));
    return Op::of(kept[0], __shfl_xor_sync(0xffffffffu, kept[0], 1));
}

/* Of a scale that is not negative and of the largest product, which has the largest logit: -Inf where there is none. */
DEVICE float largest_logit(float scale, float x) { return x == NO_VALUE ? NO_VALUE : scale * x; }

/* Rows lie in one warp. */
template <bool Whole>
DEVICE void row_parts(const clipft_cuda_contrastive_tile_args &a, const Place &at, const Elements &x, float scale, unsigned counted)
{
    float rows[CLIPFT_CUDA_WARP_ROWS];
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) {
        rows[r] = NO_VALUE;
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k)
            if (is_counted<Whole>(counted, r, k)) rows[r] = fmaxf(rows[r], x[r][k]);
    }
    const float max = largest_logit(scale, over_warp<Larger>(rows, at.lane));
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) {
        const float row_max = __shfl_sync(0xffffffffu, max, 4 * r);
        rows[r] = 0.0f;
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k)
            if (is_counted<Whole>(counted, r, k)) rows[r] += exp_fast(fmaf(scale, x[r][k], -row_max));
    }
    const float sum = over_warp<Sum>(rows, at.lane);
    const int row = at.row + at.lane / 4;
    if (at.lane % 4 == 0 && row < a.tile.rows) {
        a.row.part_max[blockIdx.x * a.tile.rows + row] = max;
        a.row.part_sum[blockIdx.x * a.tile.rows + row] = sum;
    }
}

/* Where column `col` of a block lies in a warp's share of shared memory: neither a warp's lanes, which hold neighbours, nor the threads
 * that merge meet in a bank. */
enum {
    COLUMN_STEP = 40,
    WARP_COLUMNS = CLIPFT_CUDA_LANE_COLS * COLUMN_STEP,
    BLOCK_COLUMNS = CLIPFT_CUDA_WARPS * WARP_COLUMNS,
    BLOCK_LINES = CLIPFT_CUDA_BLOCK_ROWS + WARP_COLUMNS /* the block's rows and a warp's columns */
};

DEVICE int column_place(int warp, int col)
{
    return warp * WARP_COLUMNS + col % CLIPFT_CUDA_LANE_COLS * COLUMN_STEP + col / CLIPFT_CUDA_LANE_COLS;
}

/* Sums of nothing have the maximum -Inf, and add nothing. */
DEVICE float rescaled(float sum, float max, float to) { return sum == 0.0f ? 0.0f : sum * exp_fast(max - to); }

/* A thread's share of its columns, relative to its own maximum: no warp waits for another before it has summed up. */
template <bool Whole, class Shared>
DEVICE void column_shares(const Place &at, const Elements &x, float scale, unsigned counted, Shared &maxima, Shared &sums)
{
#pragma unroll
    for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
        float max = NO_VALUE, sum = 0.0f;
#pragma unroll
        for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r)
            if (is_counted<Whole>(counted, r, k)) max = fmaxf(max, x[r][k]);
        max = largest_logit(scale, max);
#pragma unroll
        for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r)
            if (is_counted<Whole>(counted, r, k)) sum += exp_fast(fmaf(scale, x[r][k], -max));
        const int place = column_place(at.warp, at.lane * CLIPFT_CUDA_LANE_COLS + k);
        maxima[place] = max;
        sums[place] = sum;
    }
}

/* A thread a column: what the warps found of it. */
template <class Shared> DEVICE void column_part(const clipft_cuda_contrastive_tile_args &a, Shared &maxima, Shared &sums)
{
    const int col = blockIdx.x * CLIPFT_CUDA_BLOCK_COLS + threadIdx.x;
    if (threadIdx.x >= CLIPFT_CUDA_BLOCK_COLS || col >= a.tile.cols) return;
    float max = NO_VALUE, sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < CLIPFT_CUDA_WARPS; ++warp) max = fmaxf(max, maxima[column_place(warp, threadIdx.x)]);
#pragma unroll
    for (int warp = 0; warp < CLIPFT_CUDA_WARPS; ++warp) {
        const int place = column_place(warp, threadIdx.x);
        sum += rescaled(sums[place], maxima[place], max);
    }
    a.col.part_max[blockIdx.y * a.tile.cols + col] = max;
    a.col.part_sum[blockIdx.y * a.tile.cols + col] = sum;
}

KERNEL(CLIPFT_CUDA_THREADS) contrastive_tile(clipft_cuda_contrastive_tile_args a)
{
    SHARED(float, maxima, BLOCK_COLUMNS);
    SHARED(float, sums, BLOCK_COLUMNS);
    SHARED(double, warp_sums, CLIPFT_CUDA_WARPS);
    const Place at = place_in(a.tile);
    float scale = a.scale[0];
    const bool spread = a.targets.labels.data || a.targets.smoothing > 0.0f; /* more targets than the pair */
    Elements x;
    load_elements(a.tile, at, x);
    if (spread || at.pairs) {
        const OwnPair pair = own_pair(a.tile, at);
        if (pair.here) a.pair[a.tile.row0 + pair.row] = pair.x;
        add_block_sum(a.target, spread ? target_products(a, at, x) : (double)pair.x, a.first, warp_sums);
    } else if (a.first && threadIdx.x == 0) {
        a.target[blockIdx.y * gridDim.x + blockIdx.x] = 0.0;
    }
    if (scale < 0.0f) {
        scale = -scale;
#pragma unroll
        for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r)
#pragma unroll
            for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) x[r][k] = -x[r][k];
    }
    if (at.whole) { /* nearly all: nothing is left out, nothing is asked */
        row_parts<true>(a, at, x, scale, 0);
        column_shares<true>(at, x, scale, 0, maxima, sums);
    } else {
        const unsigned counted = counted_elements(a.tile, at);
        row_parts<false>(a, at, x, scale, counted);
        column_shares<false>(at, x, scale, counted, maxima, sums);
    }
    __syncthreads();
    column_part(a, maxima, sums);
}

/* The same of what is merged over all of the tiles. */
DEVICE double rescaled(double sum, float max, float to) { return sum == 0.0 ? 0.0 : sum * (double)expf(max - to); }

struct Line {
    float max;
    double sum;
};

DEVICE Line merged(const Line &a, const Line &b)
{
    const float top = fmaxf(a.max, b.max);
    return {top, rescaled(a.sum, a.max, top) + rescaled(b.sum, b.max, top)};
}

/* Every WARPS'th part of a line; what there is so far goes in with the first. */
DEVICE Line merge_parts(const clipft_cuda_lines &lines, int line, int warp)
{
    Line own = {NO_VALUE, 0.0};
    if (line >= lines.lines) return own;
    if (warp == 0 && !lines.first) own = {lines.max[line], lines.sum[line]};
    float top = own.max;
#pragma unroll 4
    for (int k = warp; k < lines.blocks; k += CLIPFT_CUDA_WARPS) top = fmaxf(top, lines.part_max[k * lines.lines + line]);
    own.sum = rescaled(own.sum, own.max, top);
#pragma unroll 4
    for (int k = warp; k < lines.blocks; k += CLIPFT_CUDA_WARPS)
        own.sum += rescaled((double)lines.part_sum[k * lines.lines + line], lines.part_max[k * lines.lines + line], top);
    own.max = top;
    return own;
}

/* A block of lines, a lane a line. */
template <class Maxima, class Sums> DEVICE void merge_lines(const clipft_cuda_lines &lines, int block, Maxima &maxima, Sums &sums)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, line = block * CLIPFT_CUDA_MERGE_LINES + lane;
    Line own = merge_parts(lines, line, warp);
    maxima[threadIdx.x] = own.max;
    sums[threadIdx.x] = own.sum;
    __syncthreads();
    if (warp != 0 || line >= lines.lines) return;
    for (int k = 1; k < CLIPFT_CUDA_WARPS; ++k) own = merged(own, {maxima[32 * k + lane], sums[32 * k + lane]});
    lines.max[line] = own.max;
    lines.sum[line] = own.sum;
}

/* Blocks of rows, then blocks of columns. */
KERNEL(CLIPFT_CUDA_THREADS) contrastive_merge(clipft_cuda_contrastive_merge_args a)
{
    SHARED(float, maxima, CLIPFT_CUDA_THREADS);
    SHARED(double, sums, CLIPFT_CUDA_THREADS);
    const int row_blocks = (a.row.lines + CLIPFT_CUDA_MERGE_LINES - 1) / CLIPFT_CUDA_MERGE_LINES, block = blockIdx.x;
    if (block < row_blocks)
        merge_lines(a.row, block, maxima, sums);
    else
        merge_lines(a.col, block - row_blocks, maxima, sums);
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

/* exp(logit - lse) of a lse in float64, in two floats: exp2((logit - high) * log2 e + low). */
struct Lse {
    float high, low;
};

DEVICE Lse split(double lse)
{
    const float high = (float)lse;
    return {high, (float)(lse - (double)high) * -LOG2_E};
}

DEVICE float probability(float scale, float x, const Lse &lse) { return exp2_fast(fmaf(fmaf(scale, x, -lse.high), LOG2_E, lse.low)); }

/* The block's logsumexps, rows before columns, split by a thread each. */
template <class Shared> DEVICE void split_lines(const clipft_cuda_contrastive_grad_args &a, Shared &high, Shared &low)
{
    static_assert(CLIPFT_CUDA_BLOCK_ROWS + CLIPFT_CUDA_BLOCK_COLS <= CLIPFT_CUDA_THREADS, "a thread a line");
    const int line = threadIdx.x, col = line - CLIPFT_CUDA_BLOCK_ROWS;
    const bool is_row = col < 0;
    const int place = is_row ? line : CLIPFT_CUDA_BLOCK_ROWS + column_place(0, col);
    const int index = is_row ? blockIdx.y * CLIPFT_CUDA_BLOCK_ROWS + line : blockIdx.x * CLIPFT_CUDA_BLOCK_COLS + col;
    if (col >= CLIPFT_CUDA_BLOCK_COLS) return;
    Lse lse = {0.0f, 0.0f};
    if (is_row && index < a.tile.rows) lse = split(a.row_lse[a.tile.row0 + index]);
    if (!is_row && index < a.tile.cols) lse = split(a.col_lse[a.tile.col0 + index]);
    high[place] = lse.high;
    low[place] = lse.low;
}

/* Zero for the pairs. */
template <bool Whole, class Shared>
DEVICE void make_coefficients(const clipft_cuda_contrastive_grad_args &a, const Place &at, const Elements &x, float scale, Shared &high,
                              Shared &low)
{
    const clipft_cuda_tile &tile = a.tile;
    const bool spread = a.targets.labels.data || a.targets.smoothing > 0.0f;
    ColumnLabels labels = {};
    if (spread) labels = column_labels(a.targets.labels, tile, at);
    Lse col_lse[CLIPFT_CUDA_LANE_COLS];
#pragma unroll
    for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
        const int place = CLIPFT_CUDA_BLOCK_ROWS + column_place(0, at.lane * CLIPFT_CUDA_LANE_COLS + k);
        col_lse[k] = {high[place], low[place]};
    }
    if (!Whole && at.col >= tile.cols) return;
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) {
        const int row = at.row + r, place = at.warp * CLIPFT_CUDA_WARP_ROWS + r;
        if (!Whole && row >= tile.rows) break;
        const Lse row_lse = {high[place], low[place]};
        float coefficients[CLIPFT_CUDA_LANE_COLS];
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k)
            coefficients[k] = probability(scale, x[r][k], row_lse) + probability(scale, x[r][k], col_lse[k]);
        if (spread) {
            const RowTarget want = row_target(a.targets, tile.row_offset + tile.row0 + row);
#pragma unroll
            for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) coefficients[k] -= 2.0f * target_of(a.targets, want, labels, k, false);
        }
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k)
            coefficients[k] = !Whole && at.col + k == at.pair + r ? 0.0f : coefficients[k] * a.unit;
        store_aligned(a.out, row * tile.stride + at.col, coefficients); /* maybe into the room after a row too */
    }
}

DEVICE float pair_coefficient(const clipft_cuda_contrastive_grad_args &a, const OwnPair &pair, float scale)
{
    const clipft_cuda_tile &tile = a.tile;
    const long long own = tile.row_offset + tile.row0 + pair.row;
    RowTarget want = {0, 1.0f, 0.0f};
    if (a.targets.labels.data || a.targets.smoothing > 0.0f) want = row_target(a.targets, own);
    const double logit = (double)scale * (double)pair.x;
    const double left = expm1(logit - a.row_lse[tile.row0 + pair.row]) + expm1(logit - a.col_lse[own]) + 2.0 * (1.0 - (double)want.share);
    return (float)(left - 2.0 * (double)want.all);
}

KERNEL(CLIPFT_CUDA_THREADS) contrastive_grad(clipft_cuda_contrastive_grad_args a)
{
    SHARED(float, high, BLOCK_LINES);
    SHARED(float, low, BLOCK_LINES);
    const Place at = place_in(a.tile);
    const float scale = a.scale[0];
    Elements x;
    load_elements(a.tile, at, x);
    const OwnPair pair = own_pair(a.tile, at); /* before `out`, maybe the tile itself, is written */
    split_lines(a, high, low);
    __syncthreads();
    if (at.whole)
        make_coefficients<true>(a, at, x, scale, high, low);
    else
        make_coefficients<false>(a, at, x, scale, high, low);
    if (pair.here) a.pair[a.tile.row0 + pair.row] = pair_coefficient(a, pair, scale);
}
