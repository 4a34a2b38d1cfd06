/* The products of a LoRA branch that have the rank on one side, and what is done element by element: see csrc/kernels/lora/lora.h for the
 * mathematics, csrc/ops/lora_cuda.c for the order around torch's large products.
 *
 * All is float32 whatever the matrices' dtypes. Quads of x, dy or y are fetched one step ahead and wait in registers as they lie in memory;
 * on their way to the products they go through activation and dropout, whose mask is hashed wherever it is needed. A lane's products come
 * from as few reads of shared memory as its registers allow. Sums run in parts that depend on the shape only. */
#include "lora.cuh"

constexpr int WARP_ROWS = 8; /* that a warp of lora_up or lora_outer takes at a time */
constexpr int STEP_ROWS = WARPS * WARP_ROWS, OUTER_ROWS = OUTER_WARPS * WARP_ROWS;
/* Between rows in shared memory: of quads, so that those of one column in eight rows lie in all banks. */
constexpr int STRIDE = COLS + 4, RANK_STRIDE = RANK + 4;

/* ---- element by element ---- */

/* GELU_ROWS x GELU_COLS at a time, rows that a grid of fewer takes turns with. */
KERNEL(CLIPFT_CUDA_THREADS) lora_quick_gelu(clipft_cuda_quick_gelu_args a)
{
    const int quads = CLIPFT_CUDA_GELU_COLS / 4;
    const long long col = ((long long)blockIdx.x * quads + threadIdx.x % quads) * 4, inside = a.cols - col;
    if (inside <= 0) return;
    const long long first = (long long)blockIdx.y * CLIPFT_CUDA_GELU_ROWS + threadIdx.x / quads;
    for (long long row = first; row < a.rows; row += (long long)gridDim.y * CLIPFT_CUDA_GELU_ROWS) {
        Floats x, grad;
        load_quad(a.x, element_at(a.x, row, col), inside, x);
        if (has_data(a.grad)) load_quad(a.grad, element_at(a.grad, row, col), inside, grad);
#pragma unroll
        for (int k = 0; k < 4; ++k) x[k] = has_data(a.grad) ? grad[k] * quick_gelu_slope(x[k]) : quick_gelu(x[k]);
        store_quad(a.out, row * a.cols + col, inside, x);
    }
}

/* Rows of a matrix that a grid of fewer takes turns with. */
KERNEL(CLIPFT_CUDA_THREADS) lora_dropout_mask(clipft_cuda_dropout_mask_args a)
{
    const long long col = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (col >= a.cols) return;
    for (long long row = blockIdx.y; row < a.rows; row += gridDim.y)
        a.mask[row * a.cols + col] = !a.dropout.seed || is_kept(a.dropout, row_key(a.dropout, row), col) ? 1.0f : 0.0f;
}

/* ---- products ---- */

/* Quads of one column that a warp goes through, WARP_ROWS and then those after the other warps', some of them always on their way: `Bytes`
 * of them. Zeros from row `end` on. */
template <int Path, int Bytes, int Warps> struct Rows {
    enum { AHEAD = Path == CLIPFT_CUDA_ANY_LAYOUT ? 2 : Path == CLIPFT_CUDA_FLOAT32 ? Bytes / 16 : Bytes / 8 };
    Quad quads[AHEAD];
    long long at;
    int row, end, inside;
};

template <int Path, int Bytes, int Warps>
DEVICE void fetch_next(const clipft_cuda_matrix &m, Rows<Path, Bytes, Warps> &rows, int r, int slot)
{
    rows.quads[slot] = fetch<Path>(m, rows.at, rows.row < rows.end ? rows.inside : 0);
    const int by = r % WARP_ROWS == WARP_ROWS - 1 ? (Warps - 1) * WARP_ROWS + 1 : 1;
    rows.row += by, rows.at += by * m.row_stride;
}

template <int Path, int Bytes, int Warps>
DEVICE void start_rows(const clipft_cuda_matrix &m, int row, int end, int col, int cols, Rows<Path, Bytes, Warps> &rows)
{
    rows.at = element_at(m, row, col), rows.row = row, rows.end = end, rows.inside = cols - col;
#pragma unroll
    for (int r = 0; r < Rows<Path, Bytes, Warps>::AHEAD; ++r) fetch_next(m, rows, r, r);
}

/* Row r of the step, from slot r % AHEAD, where another takes its place. */
template <int Path, int Bytes, int Warps> DEVICE Quad take_row(const clipft_cuda_matrix &m, Rows<Path, Bytes, Warps> &rows, int r, int slot)
{
    const Quad taken = rows.quads[slot];
    fetch_next(m, rows, r + Rows<Path, Bytes, Warps>::AHEAD, slot);
    return taken;
}

/* RANK x COLS of a panel [rank, cols], two quads of ranks a thread: neighbours in a warp are neighbours in memory. */
struct PanelPlace {
    int col, rank;
};

DEVICE PanelPlace place_in_panel(const clipft_cuda_matrix &panel, int which)
{
    const int at = threadIdx.x + which * THREADS;
    if (panel.col_stride == 1) return {at % COLS, at / COLS * 4};
    return {at / (RANK / 4), at % (RANK / 4) * 4};
}

typedef Floats PanelPart[RANK * COLS / 4 / THREADS];

DEVICE void fetch_panel(const clipft_cuda_matrix &panel, int rank0, int rank, int col0, int cols, PanelPart &part)
{
#pragma unroll
    for (int which = 0; which < RANK * COLS / 4 / THREADS; ++which) {
        const PanelPlace p = place_in_panel(panel, which);
        const long long k = rank0 + p.rank, col = col0 + p.col;
        load_apart(panel, k * panel.row_stride + col * panel.col_stride, panel.row_stride, col < cols ? rank - k : 0, part[which]);
    }
}

/* A block's DOWN_ROWS x COLS of x: a warp a row in WARPS, a lane a quad of it. */
typedef Quad DownQuads[DOWN_ROWS / WARPS];

template <int Path> DEVICE void fetch_down(const clipft_cuda_branch &b, int row0, int col0, DownQuads &quads)
{
    int row = row0 + threadIdx.x / 32;
    const int col = col0 + threadIdx.x % 32 * 4;
    long long at = element_at(b.x, row, col);
#pragma unroll
    for (int i = 0; i < DOWN_ROWS / WARPS; ++i, row += WARPS, at += WARPS * b.x.row_stride)
        quads[i] = fetch<Path>(b.x, at, row < b.rows ? b.cols - col : 0);
}

/* A lane has rows lane / 2 + 16 r, and half of the rank; each warp its own columns of the step, and the warps' sums are added in the end.
 */
template <class X, class Panel> DEVICE void multiply_down(X &x, Panel &panel, float (&sum)[4][8])
{
    const int lane = threadIdx.x % 32, own_row = lane / 2, own_rank = lane % 2 * 8, begin = threadIdx.x / 32 * (COLS / WARPS);
#pragma unroll 1
    for (int col = begin; col < begin + COLS / WARPS; col += 4) {
        Floats left[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) read_floats(x, (own_row + 16 * r) * STRIDE + col, left[r]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            Floats right[2];
            read_floats(panel, (col + j) * RANK_STRIDE + own_rank, right[0]);
            read_floats(panel, (col + j) * RANK_STRIDE + own_rank + 4, right[1]);
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int k = 0; k < 8; ++k) sum[r][k] = fmaf(left[r][j], right[k / 4][k % 4], sum[r][k]);
        }
    }
}

/* Each warp's DOWN_ROWS x RANK, which take x's place, into v. */
template <class X>
DEVICE void add_down(const clipft_cuda_lora_down_args &a, int row0, int rank0, int part, X &sums, const float (&sum)[4][8])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int k = 0; k < 8; k += 4)
            write_floats(sums, (warp * DOWN_ROWS + lane / 2 + 16 * r) * RANK + lane % 2 * 8 + k,
                         {sum[r][k], sum[r][k + 1], sum[r][k + 2], sum[r][k + 3]});
    __syncthreads();
    add_warps(a, row0, rank0, part, sums);
}

template <int Path> DEVICE void down(const clipft_cuda_lora_down_args &a)
{
    SHARED(float, x, DOWN_ROWS *STRIDE);
    SHARED(float, panel, COLS *RANK_STRIDE);
    SHARED(unsigned long long, keys, DOWN_ROWS);
    const int ranks = a.padded / RANK, part = (int)blockIdx.y / ranks, rank0 = (int)blockIdx.y % ranks * RANK,
              row0 = blockIdx.x * DOWN_ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, cols = a.branch.cols;
    const long long steps = ((long long)cols + COLS - 1) / COLS;
    const int last = (int)(steps * (part + 1) / a.parts);
    float sum[4][8] = {};
    DownQuads quads;
    PanelPart next;
    int step = (int)(steps * part / a.parts);
    if (a.branch.dropout.seed && threadIdx.x < DOWN_ROWS) keys[threadIdx.x] = row_key(a.branch.dropout, row0 + (int)threadIdx.x);
    fetch_down<Path>(a.branch, row0, step * COLS, quads);
    fetch_panel(a.panel, rank0, a.rank, step * COLS, cols, next);
    for (; step < last; ++step) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < DOWN_ROWS / WARPS; ++i) {
            const int row = warp + WARPS * i;
            Floats v;
            unpack_branch<Path>(a.branch, quads[i], a.branch.dropout.seed ? (unsigned long long)keys[row] : 0ull, step * COLS + lane * 4,
                                v);
            write_floats(x, row * STRIDE + lane * 4, v);
        }
#pragma unroll
        for (int i = 0; i < RANK * COLS / 4 / THREADS; ++i) {
            const PanelPlace p = place_in_panel(a.panel, i);
            write_floats(panel, p.col * RANK_STRIDE + p.rank, next[i]);
        }
        __syncthreads();
        if (step + 1 < last) {
            fetch_down<Path>(a.branch, row0, (step + 1) * COLS, quads);
            fetch_panel(a.panel, rank0, a.rank, (step + 1) * COLS, cols, next);
        }
        multiply_down(x, panel, sum);
    }
    add_down(a, row0, rank0, part, x, sum);
}

KERNEL(CLIPFT_CUDA_THREADS, 2) lora_down_f32(clipft_cuda_lora_down_args a) { down<CLIPFT_CUDA_FLOAT32>(a); }
KERNEL(CLIPFT_CUDA_THREADS, 2) lora_down_bf16(clipft_cuda_lora_down_args a) { down<CLIPFT_CUDA_BFLOAT16>(a); }
KERNEL(CLIPFT_CUDA_THREADS, 2) lora_down_f16(clipft_cuda_lora_down_args a) { down<CLIPFT_CUDA_FLOAT16>(a); }
KERNEL(CLIPFT_CUDA_THREADS, 2) lora_down_any(clipft_cuda_lora_down_args a) { down<CLIPFT_CUDA_ANY_LAYOUT>(a); }

/* ---- */

/* A lane's quad of v: its warp's WARP_ROWS x RANK of it, zeros from row `end` on. */
DEVICE Quad fetch_v(const clipft_cuda_lora_v &v, int row, int end, int rank0)
{
    const int lane = threadIdx.x % 32;
    const long long own = row + lane / (RANK / 4);
    if (own >= end) return {0u, 0u, 0u, 0u};
    if (!v.data) return {0x3f800000u, 0x3f800000u, 0x3f800000u, 0x3f800000u};
    return read_quad(v.data, own * v.padded + rank0 + lane % (RANK / 4) * 4);
}

/* Puts it where the whole warp reads it. */
template <class V> DEVICE void share_v(V &v, const Quad &own)
{
    __syncwarp();
    write_quad(v, (long long)threadIdx.x * 4, own);
    __syncwarp();
}

template <class V, class Panel> DEVICE void multiply_up(V &v, Panel &panel, float (&sum)[WARP_ROWS][4])
{
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * (WARP_ROWS * RANK);
#pragma unroll 1
    for (int k = 0; k < RANK; k += 4) {
        Floats left[WARP_ROWS];
#pragma unroll
        for (int r = 0; r < WARP_ROWS; ++r) read_floats(v, own + r * RANK + k, left[r]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            Floats right;
            read_floats(panel, (k + j) * STRIDE + lane * 4, right);
#pragma unroll
            for (int r = 0; r < WARP_ROWS; ++r)
#pragma unroll
                for (int c = 0; c < 4; ++c) sum[r][c] = fmaf(left[r][j], right[c], sum[r][c]);
        }
    }
}

template <class Panel> DEVICE void share_panel(const clipft_cuda_lora_up_args &a, int rank0, int col0, Panel &panel)
{
    PanelPart part;
    fetch_panel(a.panel, rank0, a.rank, col0, a.cols, part);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RANK * COLS / 4 / THREADS; ++i) {
        const PanelPlace p = place_in_panel(a.panel, i);
#pragma unroll
        for (int k = 0; k < 4; ++k) panel[(p.rank + k) * STRIDE + p.col] = part[i][k];
    }
    __syncthreads();
}

template <int Path> DEVICE void up(const clipft_cuda_lora_up_args &a)
{
    SHARED(float, v, STEP_ROWS *RANK);
    SHARED(float, panel, RANK *STRIDE);
    SHARED(unsigned long long, keys, UP_ROWS);
    const int row0 = blockIdx.x * UP_ROWS, end = a.rows - row0 < UP_ROWS ? a.rows : row0 + UP_ROWS, warp = threadIdx.x / 32;
    const int col0 = blockIdx.y * COLS, col = col0 + threadIdx.x % 32 * 4, own = row0 + warp * WARP_ROWS;
    Rows<Path, 64, WARPS> base;
    Quad next = fetch_v(a.v, own, end, 0);
    if (a.dropout.seed && threadIdx.x < UP_ROWS) keys[threadIdx.x] = row_key(a.dropout, row0 + (int)threadIdx.x);
    start_rows(a.base, own, end, col, a.cols, base);
    for (int step = 0; row0 + step < end; step += STEP_ROWS) {
        const int row = own + step;
        float sum[WARP_ROWS][4] = {};
        for (int rank0 = 0; rank0 < a.rank; rank0 += RANK) {
            const bool more = rank0 + RANK < a.rank;
            if (step == 0 || a.rank > RANK) share_panel(a, rank0, col0, panel);
            share_v(v, next);
            next = fetch_v(a.v, more ? row : row + STEP_ROWS, end, more ? rank0 + RANK : 0);
            multiply_up(v, panel, sum);
        }
#pragma unroll
        for (int r = 0; r < WARP_ROWS; ++r) {
            const unsigned long long key = a.dropout.seed ? (unsigned long long)keys[row + r - row0] : 0ull;
            Floats v;
            finish_up<Path>(a, row + r, col, take_row(a.base, base, r, r % base.AHEAD), sum[r], key, v);
            if (row + r < a.rows) store_quad(a.out, (long long)(row + r) * a.cols + col, a.cols - col, v);
        }
    }
}

/* A warp's WARP_ROWS at a time, a lane's quad of each. */
KERNEL(CLIPFT_CUDA_THREADS, 2) lora_up_f32(clipft_cuda_lora_up_args a) { up<CLIPFT_CUDA_FLOAT32>(a); }
KERNEL(CLIPFT_CUDA_THREADS, 2) lora_up_bf16(clipft_cuda_lora_up_args a) { up<CLIPFT_CUDA_BFLOAT16>(a); }
KERNEL(CLIPFT_CUDA_THREADS, 2) lora_up_f16(clipft_cuda_lora_up_args a) { up<CLIPFT_CUDA_FLOAT16>(a); }
KERNEL(CLIPFT_CUDA_THREADS, 2) lora_up_any(clipft_cuda_lora_up_args a) { up<CLIPFT_CUDA_ANY_LAYOUT>(a); }

/* The warps' RANK x COLS into the part, four of the rank at a time. */
template <class Sums>
DEVICE void add_outer(const clipft_cuda_lora_outer_args &a, int rank0, int col0, Sums &sums, const float (&sum)[RANK][4])
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int k0 = 0; k0 < RANK; k0 += 4) {
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 4; ++k) write_floats(sums, (warp * 4 + k) * COLS + lane * 4, sum[k0 + k]);
        __syncthreads();
        for (int at = threadIdx.x; at < 4 * COLS; at += OUTER_THREADS) {
            const int k = rank0 + k0 + at / COLS, col = col0 + at % COLS;
            float total = 0.0f;
            for (int w = 0; w < OUTER_WARPS; ++w) total += sums[w * 4 * COLS + at];
            if (k < a.rank && col < a.branch.cols) a.part[((long long)blockIdx.y * a.rank + k) * a.branch.cols + col] = total;
        }
    }
}

template <int Path> DEVICE void outer(const clipft_cuda_lora_outer_args &a)
{
    SHARED(float, v, OUTER_ROWS *RANK);
    SHARED(float, sums, OUTER_WARPS * 4 * COLS);
    SHARED(unsigned long long, keys, OUTER_ROWS);
    const int ranks = (a.rank + RANK - 1) / RANK, rank0 = (int)(blockIdx.x % ranks) * RANK;
    const int col0 = (int)(blockIdx.x / ranks) * COLS, cols = a.branch.cols, warp = threadIdx.x / 32, lane = threadIdx.x % 32,
              col = col0 + lane * 4;
    const int end = (int)((long long)a.branch.rows * (blockIdx.y + 1) / a.parts);
    int row = (int)((long long)a.branch.rows * blockIdx.y / a.parts) + warp * WARP_ROWS;
    float sum[RANK][4] = {};
    Rows<Path, 64, OUTER_WARPS> x;
    Quad next = fetch_v(a.v, row, end, rank0);
    start_rows(a.branch.x, row, end, col, cols, x);
    for (; row < end; row += OUTER_ROWS) {
        if (a.branch.dropout.seed) {
            __syncwarp();
            if (lane < WARP_ROWS) keys[warp * WARP_ROWS + lane] = row_key(a.branch.dropout, row + lane);
        }
        share_v(v, next);
        next = fetch_v(a.v, row + OUTER_ROWS, end, rank0);
#pragma unroll 1
        for (int begin = 0; begin < WARP_ROWS; begin += x.AHEAD)
#pragma unroll
            for (int slot = 0; slot < x.AHEAD; ++slot) {
                const int r = begin + slot;
                Floats right;
                const unsigned long long key = a.branch.dropout.seed ? (unsigned long long)keys[warp * WARP_ROWS + r] : 0ull;
                unpack_branch<Path>(a.branch, take_row(a.branch.x, x, r, slot), key, col, right);
#pragma unroll
                for (int k = 0; k < RANK; k += 4) {
                    Floats left;
                    read_floats(v, (warp * WARP_ROWS + r) * RANK + k, left);
#pragma unroll
                    for (int j = 0; j < 4; ++j)
#pragma unroll
                        for (int c = 0; c < 4; ++c) sum[k + j][c] = fmaf(left[j], right[c], sum[k + j][c]);
                }
            }
    }
    add_outer(a, rank0, col0, sums, sum);
}

/* A lane's RANK x 4; each warp its own rows, and the warps' sums are added in the end. */
KERNEL(CLIPFT_CUDA_LORA_OUTER_THREADS) lora_outer_f32(clipft_cuda_lora_outer_args a) { outer<CLIPFT_CUDA_FLOAT32>(a); }
KERNEL(CLIPFT_CUDA_LORA_OUTER_THREADS) lora_outer_bf16(clipft_cuda_lora_outer_args a) { outer<CLIPFT_CUDA_BFLOAT16>(a); }
KERNEL(CLIPFT_CUDA_LORA_OUTER_THREADS) lora_outer_f16(clipft_cuda_lora_outer_args a) { outer<CLIPFT_CUDA_FLOAT16>(a); }
KERNEL(CLIPFT_CUDA_LORA_OUTER_THREADS) lora_outer_any(clipft_cuda_lora_outer_args a) { outer<CLIPFT_CUDA_ANY_LAYOUT>(a); }

/* A lane a column, a warp every eighth part of it. */
KERNEL(CLIPFT_CUDA_THREADS) lora_sum(clipft_cuda_lora_sum_args a)
{
    SHARED(float, sums, THREADS);
    const int k = blockIdx.y, lane = threadIdx.x % 32;
    const long long col = (long long)blockIdx.x * 32 + lane, size = (long long)a.rank * a.cols;
    float total = 0.0f;
    if (col < a.cols)
        for (int part = threadIdx.x / 32; part < a.parts; part += WARPS) total += a.part[part * size + (long long)k * a.cols + col];
    sums[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x >= 32 || col >= a.cols) return;
    for (int warp = 1; warp < WARPS; ++warp) total += sums[warp * 32 + lane];
    store(a.out, k * a.rank_stride + col * a.col_stride, a.scale * total);
}
