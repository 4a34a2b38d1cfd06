/* The products of a LoRA branch that have the rank on one side, and what is done element by element: see csrc/kernels/lora.h for the
 * mathematics, csrc/ops/cuda_lora.c for the order around torch's large products.
 *
 * All is float32 whatever the matrices' dtypes. A block brings a piece of x or dy into shared memory, through activation and dropout, and
 * multiplies it from registers; the mask is hashed wherever it is needed. Sums over rows run in parts that depend on the shape only. */
#include "common.cuh"

enum {
    ROWS = CLIPFT_CUDA_LORA_ROWS,
    COLS = CLIPFT_CUDA_LORA_COLS,
    RANK = CLIPFT_CUDA_LORA_RANK,
    UP_COLS = CLIPFT_CUDA_LORA_UP_COLS,
    WARPS = CLIPFT_CUDA_WARPS,
    THREADS = CLIPFT_CUDA_THREADS,
    /* Between rows in shared memory: odd, so that a column lies in as many banks. */
    STRIDE = COLS + 1,
    RANK_STRIDE = RANK + 1
};

/* ---- dropout: csrc/kernels/lora.c and lora_ref.c, bit for bit ---- */

DEVICE unsigned long long mix(unsigned long long z)
{
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

DEVICE unsigned long long row_key(const clipft_cuda_dropout &d, long long row)
{
    return mix(mix((unsigned long long)d.seed[0]) + (unsigned long long)(d.first + row) * 0x9e3779b97f4a7c15ull);
}

DEVICE bool is_kept(const clipft_cuda_dropout &d, unsigned long long key, long long col)
{
    unsigned h = (unsigned)col * 0x9e3779b9u + (unsigned)key;
    h = (h ^ h >> 16) * 0x21f0aaadu;
    h = ((h ^ h >> 15) + (unsigned)(key >> 32)) * 0xd35a2d97u;
    h ^= h >> 15;
    return (int)h >= d.threshold;
}

/* The keys of ROWS rows, which the block may read after its next barrier. */
template <class Keys> DEVICE void make_keys(const clipft_cuda_dropout &d, long long row0, Keys &keys)
{
    if (d.seed && threadIdx.x < ROWS) keys[threadIdx.x] = row_key(d, row0 + threadIdx.x);
}

/* ---- quick_gelu ---- */

DEVICE float quick_gelu(float x) { return x * sigmoid(1.702f * x); }

DEVICE float quick_gelu_slope(float x)
{
    const float z = 1.702f * x, e = expf(-fabsf(z));
    const float near = 1.0f / (1.0f + e), far = e * near; /* sigmoid(|z|) and 1 - sigmoid(|z|) */
    return (z < 0.0f ? far : near) + z * (near * far);
}

/* Rows of a matrix that a grid of fewer rows takes turns with. */
KERNEL(CLIPFT_CUDA_THREADS) lora_quick_gelu(clipft_cuda_quick_gelu_args a)
{
    const long long col = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (col >= a.cols) return;
    for (long long row = blockIdx.y; row < a.rows; row += gridDim.y) {
        const float x = load(a.x, row, col);
        store(a.out, row * a.cols + col, has_data(a.grad) ? load(a.grad, row, col) * quick_gelu_slope(x) : quick_gelu(x));
    }
}

KERNEL(CLIPFT_CUDA_THREADS) lora_dropout_mask(clipft_cuda_dropout_mask_args a)
{
    const long long col = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (col >= a.cols) return;
    for (long long row = blockIdx.y; row < a.rows; row += gridDim.y)
        a.mask[row * a.cols + col] = !a.dropout.seed || is_kept(a.dropout, row_key(a.dropout, row), col) ? 1.0f : 0.0f;
}

/* ---- products ---- */

/* ROWS x COLS of the branch from (row0, col0), zeros from row `rows` on. */
template <class Tile, class Keys> DEVICE void load_branch(const clipft_cuda_branch &b, int row0, int rows, int col0, Keys &keys, Tile &tile)
{
    for (int at = threadIdx.x; at < ROWS * COLS; at += THREADS) {
        const int r = at / COLS, row = row0 + r, col = col0 + at % COLS;
        float value = 0.0f;
        if (row < rows && col < b.cols && (!b.dropout.seed || is_kept(b.dropout, keys[r], col))) {
            value = load(b.x, row, col);
            if (b.quick_gelu) value = quick_gelu(value);
        }
        tile[r * STRIDE + at % COLS] = value;
    }
}

/* A lane's 4 x 4 of ROWS x RANK; each warp its own columns of a tile, and the warps' sums are added in the end. */
KERNEL(CLIPFT_CUDA_THREADS) lora_down(clipft_cuda_lora_down_args a)
{
    SHARED(float, x, ROWS *STRIDE);
    SHARED(float, panel, RANK *STRIDE);
    SHARED(float, sums, WARPS *ROWS *RANK);
    SHARED(unsigned long long, keys, ROWS);
    const int row0 = blockIdx.x * ROWS, rank0 = blockIdx.y * RANK, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own_row = lane / 4 * 4, own_rank = lane % 4 * 4;
    float sum[4][4] = {};
    make_keys(a.branch.dropout, row0, keys);
    for (int col0 = 0; col0 < a.branch.cols; col0 += COLS) {
        __syncthreads();
        load_branch(a.branch, row0, a.branch.rows, col0, keys, x);
        for (int at = threadIdx.x; at < RANK * COLS; at += THREADS) {
            const int k = at / COLS, j = at % COLS;
            const bool inside = rank0 + k < a.rank && col0 + j < a.branch.cols;
            panel[k * STRIDE + j] = inside ? load(a.panel, col0 + j, rank0 + k) : 0.0f;
        }
        __syncthreads();
        for (int j = warp * (COLS / WARPS); j < (warp + 1) * (COLS / WARPS); ++j) {
            float left[4], right[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) left[k] = x[(own_row + k) * STRIDE + j], right[k] = panel[(own_rank + k) * STRIDE + j];
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int k = 0; k < 4; ++k) sum[r][k] = fmaf(left[r], right[k], sum[r][k]);
        }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[(warp * ROWS + own_row + r) * RANK + own_rank + k] = sum[r][k];
    __syncthreads();
    for (int at = threadIdx.x; at < ROWS * RANK; at += THREADS) {
        const int row = row0 + at / RANK, k = rank0 + at % RANK;
        float total = 0.0f;
        for (int w = 0; w < WARPS; ++w) total += sums[w * ROWS * RANK + at];
        if (row < a.branch.rows) a.v[(long long)row * a.padded + k] = k < a.rank ? a.scale * total : 0.0f;
    }
}

/* A warp's 4 rows, a lane's 4 columns of them. */
KERNEL(CLIPFT_CUDA_THREADS) lora_up(clipft_cuda_lora_up_args a)
{
    SHARED(float, v, ROWS *RANK_STRIDE);
    SHARED(float, panel, RANK *UP_COLS);
    SHARED(unsigned long long, keys, ROWS);
    const int row0 = blockIdx.x * ROWS, col0 = blockIdx.y * UP_COLS, own_row = threadIdx.x / 32 * 4, lane = threadIdx.x % 32;
    float sum[4][4] = {};
    make_keys(a.dropout, row0, keys);
    for (int rank0 = 0; rank0 < a.rank; rank0 += RANK) {
        __syncthreads();
        for (int at = threadIdx.x; at < ROWS * RANK; at += THREADS) {
            const int r = at / RANK, k = at % RANK;
            v[r * RANK_STRIDE + k] = row0 + r < a.rows ? a.v[(long long)(row0 + r) * a.padded + rank0 + k] : 0.0f;
        }
        for (int at = threadIdx.x; at < RANK * UP_COLS; at += THREADS) {
            const int k = at / UP_COLS, col = col0 + at % UP_COLS;
            panel[at] = rank0 + k < a.rank && col < a.cols ? load(a.panel, rank0 + k, col) : 0.0f;
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < RANK; ++k) {
            float left[4], right[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) left[c] = v[(own_row + c) * RANK_STRIDE + k], right[c] = panel[k * UP_COLS + lane + 32 * c];
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int c = 0; c < 4; ++c) sum[r][c] = fmaf(left[r], right[c], sum[r][c]);
        }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int row = row0 + own_row + r;
        if (row >= a.rows) break;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int col = col0 + lane + 32 * c;
            if (col >= a.cols) break;
            float value = load(a.base, row, col);
            if (!a.dropout.seed || is_kept(a.dropout, keys[own_row + r], col)) value = fmaf(a.scale, sum[r][c], value);
            if (has_data(a.x)) value *= quick_gelu_slope(load(a.x, row, col));
            store(a.out, (long long)row * a.cols + col, value);
        }
    }
}

/* A lane's 4 x 8 of RANK x COLS; each warp its own rows of a tile, and the warps' sums are added in the end. */
KERNEL(CLIPFT_CUDA_THREADS) lora_outer(clipft_cuda_lora_outer_args a)
{
    SHARED(float, x, ROWS *STRIDE);
    SHARED(float, v, ROWS *RANK_STRIDE);
    SHARED(float, sums, WARPS *RANK *COLS);
    SHARED(unsigned long long, keys, ROWS);
    const int ranks = (a.rank + RANK - 1) / RANK, rank0 = (int)(blockIdx.x % ranks) * RANK, col0 = (int)(blockIdx.x / ranks) * COLS;
    const int begin = (int)((long long)a.branch.rows * blockIdx.y / a.parts),
              end = (int)((long long)a.branch.rows * (blockIdx.y + 1) / a.parts);
    const int warp = threadIdx.x / 32, own_rank = threadIdx.x % 4 * 4, own_col = threadIdx.x % 32 / 4;
    float sum[4][8] = {};
    for (int row0 = begin; row0 < end; row0 += ROWS) {
        make_keys(a.branch.dropout, row0, keys);
        __syncthreads();
        load_branch(a.branch, row0, end, col0, keys, x);
        for (int at = threadIdx.x; at < ROWS * RANK; at += THREADS) {
            const int row = row0 + at / RANK, k = rank0 + at % RANK;
            const bool inside = row < end && k < a.rank;
            v[at / RANK * RANK_STRIDE + at % RANK] = !inside ? 0.0f : a.v ? a.v[(long long)row * a.padded + k] : 1.0f;
        }
        __syncthreads();
        for (int i = warp * (ROWS / WARPS); i < (warp + 1) * (ROWS / WARPS); ++i) {
            float left[4], right[8];
#pragma unroll
            for (int k = 0; k < 4; ++k) left[k] = v[i * RANK_STRIDE + own_rank + k];
#pragma unroll
            for (int c = 0; c < 8; ++c) right[c] = x[i * STRIDE + own_col + 8 * c];
#pragma unroll
            for (int k = 0; k < 4; ++k)
#pragma unroll
                for (int c = 0; c < 8; ++c) sum[k][c] = fmaf(left[k], right[c], sum[k][c]);
        }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[(warp * RANK + own_rank + k) * COLS + own_col + 8 * c] = sum[k][c];
    __syncthreads();
    for (int at = threadIdx.x; at < RANK * COLS; at += THREADS) {
        const int k = rank0 + at / COLS, col = col0 + at % COLS;
        float total = 0.0f;
        for (int w = 0; w < WARPS; ++w) total += sums[w * RANK * COLS + at];
        if (k < a.rank && col < a.branch.cols) a.part[((long long)blockIdx.y * a.rank + k) * a.branch.cols + col] = total;
    }
}

KERNEL(CLIPFT_CUDA_THREADS) lora_sum(clipft_cuda_lora_sum_args a)
{
    const int k = blockIdx.y;
    const long long col = (long long)blockIdx.x * THREADS + threadIdx.x, size = (long long)a.rank * a.cols;
    float total = 0.0f;
    if (col >= a.cols) return;
    for (int part = 0; part < a.parts; ++part) total += a.part[part * size + (long long)k * a.cols + col];
    store(a.out, k * a.rank_stride + col * a.col_stride, a.scale * total);
}
