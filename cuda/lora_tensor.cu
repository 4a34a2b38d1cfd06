/* The rank products of lora.cu on tensor cores, for bfloat16 matrices of aligned quads (sm_80 and later).
 *
 * mma of 16 x 8 x 16, whose fragments the PTX manual lays out: lane 4 g + t holds of the left factor rows g and g + 8 at depths 2t, 2t + 1
 * and 2t + 8, 2t + 9, of the right one column g at the same depths, of the sum rows g and g + 8 at columns 2t, 2t + 1. A depth may be any
 * that both factors agree on, and a column any that the sum's owner knows: both are dealt so that what a lane holds lies side by side in
 * memory, and x, dy and y never go through shared memory.
 *
 * x and dy are bfloat16 as they come. What is float32, v, the adapters and quick_gelu's results, becomes two bfloat16 whose sum is off by
 * 2^-17 of it at most; the product of two lower halves is left out. An infinity may come out as NaN. */
#include "lora.cuh"

constexpr int DEPTH = 16;
constexpr int TILES = DOWN_ROWS / 16;   /* of rows, in lora_tensor_down */
constexpr int HALF = COLS / 2;          /* columns of a warp of lora_tensor_up */
constexpr int UP_STEP = WARPS / 2 * 16; /* its rows at a time */
constexpr int OUTER_STEP = OUTER_WARPS * 16;
constexpr int GROUPS = COLS / 32; /* of four fragments' columns, in lora_tensor_outer */

/* Two bfloat16 a word, the first in the lower half. */
typedef unsigned Left[4];
typedef unsigned Right[2];

#ifdef __CUDACC__
/* All lanes of a warp at once: those that parted meet before it. Below sm_80 there is no such instruction, and nothing that launches it. */
DEVICE void mma(float (&sum)[4], const Left &a, const Right &b)
{
#if !defined __CUDA_ARCH__ || __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
#endif

/* Two floats as upper and lower halves. */
struct Halves {
    unsigned high, low;
};

DEVICE Halves halves(float first, float second)
{
    const unsigned high = bfloat16_pair(first, second);
    return {high, bfloat16_pair(first - __uint_as_float(high << 16), second - __uint_as_float(high & 0xffff0000u))};
}

/* Two right factors at once: of the upper halves and of the lower ones. */
struct RightHalves {
    Right high, low;
};

DEVICE RightHalves right_halves(const Floats &v)
{
    const Halves first = halves(v[0], v[1]), second = halves(v[2], v[3]);
    return {{first.high, second.high}, {first.low, second.low}};
}

struct LeftHalves {
    Left high, low;
};

/* Of rows g and g + 8. */
DEVICE LeftHalves left_halves(const Floats &upper, const Floats &lower)
{
    const RightHalves u = right_halves(upper), l = right_halves(lower);
    return {{u.high[0], l.high[0], u.high[1], l.high[1]}, {u.low[0], l.low[0], u.low[1], l.low[1]}};
}

DEVICE int group() { return threadIdx.x % 32 / 4; }
DEVICE int place() { return threadIdx.x % 4; }

/* ---- v = branch panel^T ---- */

/* A lane's quads of DOWN_ROWS rows at four depths side by side. */
typedef Quad DownQuads[TILES][2];

/* From element `at` of the lane's first row on, of which `inside` columns are there; so are `rows` rows. */
DEVICE void fetch_down(const clipft_cuda_matrix &x, long long at, int rows, int inside, DownQuads &quads)
{
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            quads[m][h] = fetch<CLIPFT_CUDA_BFLOAT16>(x, at, 16 * m + 8 * h < rows ? inside : 0);
            at += 8 * x.row_stride;
        }
}

/* The right factors at the lane's depths: from element `at` on, of which `inside` columns are there, and 8 ranks on; so are `ranks`. */
DEVICE void panel_at(const clipft_cuda_matrix &panel, long long at, int ranks, int inside, RightHalves (&factors)[2])
{
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        Floats v;
        load_apart(panel, at + j * 8 * panel.row_stride, panel.col_stride, 8 * j < ranks ? inside : 0, v);
        factors[j] = right_halves(v);
    }
}

template <class Keys>
DEVICE void multiply_down(const clipft_cuda_branch &b, const DownQuads &quads, int col, const RightHalves (&panel)[2], Keys &keys,
                          float (&sum)[TILES][2][4])
{
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
        LeftHalves x = {{quads[m][0].word[0], quads[m][1].word[0], quads[m][0].word[1], quads[m][1].word[1]}, {}};
        if (b.quick_gelu || b.dropout.seed) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const unsigned long long key = b.dropout.seed ? (unsigned long long)keys[16 * m + 8 * h + group()] : 0ull;
                Floats v;
                unpack_branch<CLIPFT_CUDA_BFLOAT16>(b, quads[m][h], key, col, v);
                const RightHalves own = right_halves(v);
                x.high[h] = own.high[0], x.high[h + 2] = own.high[1], x.low[h] = own.low[0], x.low[h + 2] = own.low[1];
            }
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            mma(sum[m][j], x.high, panel[j].high);
            mma(sum[m][j], x.high, panel[j].low);
            if (b.quick_gelu) mma(sum[m][j], x.low, panel[j].high);
        }
    }
}

/* Each warp every WARPS'th run of DEPTH columns; the warps' sums are added in the end. */
KERNEL(CLIPFT_CUDA_THREADS, 2) lora_tensor_down(clipft_cuda_lora_down_args a)
{
    SHARED(float, sums, WARPS *DOWN_ROWS *RANK);
    SHARED(unsigned long long, keys, DOWN_ROWS);
    const int ranks = a.padded / RANK, part = (int)blockIdx.y / ranks, rank0 = (int)blockIdx.y % ranks * RANK,
              row0 = blockIdx.x * DOWN_ROWS, warp = threadIdx.x / 32;
    const long long steps = ((long long)a.branch.cols + COLS - 1) / COLS, stop = steps * (part + 1) / a.parts * COLS;
    const int end = stop < a.branch.cols ? (int)stop : a.branch.cols;
    float sum[TILES][2][4] = {};
    if (a.branch.dropout.seed && threadIdx.x < DOWN_ROWS) keys[threadIdx.x] = row_key(a.branch.dropout, row0 + (int)threadIdx.x);
    __syncthreads();
    const int row = row0 + group(), rank = rank0 + group();
    /* Places are computed anew each time: carried along they would take registers that sm_100 has not. */
    for (int col = (int)(steps * part / a.parts) * COLS + warp * DEPTH + 4 * place(); col - 4 * place() < end; col += WARPS * DEPTH) {
        DownQuads quads;
        RightHalves panel[2];
        fetch_down(a.branch.x, row * a.branch.x.row_stride + col, a.branch.rows - row, end - col, quads);
        panel_at(a.panel, element_at(a.panel, rank, col), a.rank - rank, end - col, panel);
        multiply_down(a.branch, quads, col, panel, keys, sum);
    }
#pragma unroll
    for (int m = 0; m < TILES; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sums[(warp * DOWN_ROWS + 16 * m + 8 * (i / 2) + group()) * RANK + 8 * j + 2 * place() + i % 2] = sum[m][j][i];
    __syncthreads();
    add_warps(a, row0, rank0, part, sums);
}

/* ---- out = base + v panel ---- */

/* A lane's quad of v: of a row, four depths side by side. */
DEVICE void v_at(const clipft_cuda_lora_v &v, int row, int end, int rank0, Floats &out)
{
    if (row < end) {
        read_floats(v.data, (long long)row * v.padded + rank0 + 4 * place(), out);
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) out[k] = 0.0f;
    }
}

/* Column of fragment j that lane group `g` has in the right factor: a lane's columns of two fragments are side by side in the sum. */
DEVICE int up_column(int j, int g) { return j / 2 * 16 + g / 2 * 4 + j % 2 * 2 + g % 2; }

constexpr int UP_FRAGMENTS = HALF / 8, PANEL_WORDS = 2 * UP_FRAGMENTS * 32 * 4;

/* RANK x COLS of the panel as both halves' right factors: four words a lane and fragment. */
template <class Panel> DEVICE void share_up_panel(const clipft_cuda_lora_up_args &a, int rank0, int col0, Panel &panel)
{
    __syncthreads();
#pragma unroll
    for (int slot = threadIdx.x; slot < PANEL_WORDS / 4; slot += THREADS) {
        const int fragment = slot / 32, k = rank0 + 4 * place();
        const int col = col0 + fragment / UP_FRAGMENTS * HALF + up_column(fragment % UP_FRAGMENTS, group());
        Floats v;
        load_apart(a.panel, k * a.panel.row_stride + col * a.panel.col_stride, a.panel.row_stride, col < a.cols ? a.rank - k : 0, v);
        const RightHalves r = right_halves(v);
        write_quad(panel, 4 * slot, {r.high[0], r.high[1], r.low[0], r.low[1]});
    }
    __syncthreads();
}

template <class Panel>
DEVICE void multiply_up(const clipft_cuda_lora_up_args &a, int row, int end, int rank0, int half, Panel &panel,
                        float (&sum)[UP_FRAGMENTS][4])
{
    Floats upper, lower;
    v_at(a.v, row, end, rank0, upper);
    v_at(a.v, row + 8, end, rank0, lower);
    const LeftHalves v = left_halves(upper, lower);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < UP_FRAGMENTS; ++j) {
        const Quad q = read_quad(panel, 4 * ((half * UP_FRAGMENTS + j) * 32 + (int)threadIdx.x % 32));
        const Right high = {q.word[0], q.word[1]}, low = {q.word[2], q.word[3]};
        mma(sum[j], v.high, high);
        mma(sum[j], v.high, low);
        mma(sum[j], v.low, high);
    }
}

/* A warp 16 rows of half of the columns at a time. */
KERNEL(CLIPFT_CUDA_THREADS, 2) lora_tensor_up(clipft_cuda_lora_up_args a)
{
    SHARED(unsigned, panel, PANEL_WORDS);
    SHARED(unsigned long long, keys, UP_ROWS);
    const int row0 = blockIdx.x * UP_ROWS, end = a.rows - row0 < UP_ROWS ? a.rows : row0 + UP_ROWS, warp = threadIdx.x / 32;
    const int col0 = blockIdx.y * COLS, half = warp % 2, col = col0 + half * HALF + 4 * place();
    if (a.dropout.seed && threadIdx.x < UP_ROWS) keys[threadIdx.x] = row_key(a.dropout, row0 + (int)threadIdx.x);
    for (int step = 0; row0 + step < end; step += UP_STEP) {
        const int row = row0 + step + warp / 2 * 16 + group();
        float sum[UP_FRAGMENTS][4] = {};
        for (int rank0 = 0; rank0 < a.rank; rank0 += RANK) {
            if (step == 0 || a.rank > RANK) share_up_panel(a, rank0, col0, panel);
            multiply_up(a, row, end, rank0, half, panel, sum);
        }
        Quad base[UP_FRAGMENTS / 2][2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const long long at = (row + 8 * h) * a.base.row_stride + col;
#pragma unroll
            for (int pair = 0; pair < UP_FRAGMENTS / 2; ++pair)
                base[pair][h] = fetch<CLIPFT_CUDA_BFLOAT16>(a.base, at + 16 * pair, row + 8 * h < end ? a.cols - col - 16 * pair : 0);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int own = row + 8 * h;
            const unsigned long long key = a.dropout.seed && own < end ? (unsigned long long)keys[own - row0] : 0ull;
#pragma unroll
            for (int pair = 0; pair < UP_FRAGMENTS / 2; ++pair) {
                const float quad[4] = {sum[2 * pair][2 * h], sum[2 * pair][2 * h + 1], sum[2 * pair + 1][2 * h],
                                       sum[2 * pair + 1][2 * h + 1]};
                Floats v;
                if (own >= end || col + 16 * pair >= a.cols) continue;
                finish_up<CLIPFT_CUDA_BFLOAT16>(a, own, col + 16 * pair, base[pair][h], quad, key, v);
                write_quad(a.out.data16, (long long)own * a.cols + col + 16 * pair,
                           {bfloat16_pair(v[0], v[1]), bfloat16_pair(v[2], v[3]), 0u, 0u});
            }
        }
    }
}

/* ---- part = v^T branch ---- */

/* The left factor: ranks g and g + 8 at rows `row` .. row + 3, whose depths are the lane's. */
DEVICE LeftHalves v_columns(const clipft_cuda_lora_v &v, int row, int end, int rank0)
{
    Floats upper, lower;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const long long at = (long long)(row + i) * v.padded + rank0 + group();
        const bool here = row + i < end;
        upper[i] = here ? v.data ? v.data[at] : 1.0f : 0.0f;
        lower[i] = here ? v.data ? v.data[at + 8] : 1.0f : 0.0f;
    }
    return left_halves(upper, lower);
}

/* A lane's quads of four rows in each group of 32 columns. */
typedef Quad OuterQuads[GROUPS][4];

DEVICE void fetch_outer(const clipft_cuda_branch &b, int row, int end, int col, OuterQuads &quads)
{
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const long long at = (row + i) * b.x.row_stride + col;
#pragma unroll
        for (int q = 0; q < GROUPS; ++q)
            quads[q][i] = fetch<CLIPFT_CUDA_BFLOAT16>(b.x, at + 32 * q, row + i < end ? b.cols - col - 32 * q : 0);
    }
}

/* Element j of two quads in one word. */
DEVICE unsigned beside(const Quad &first, const Quad &second, int j)
{
    const unsigned a = first.word[j / 2], b = second.word[j / 2];
    return j % 2 ? (a >> 16) | (b & 0xffff0000u) : (a & 0xffffu) | (b << 16);
}

/* The fragments' right factors: column j of the lane's quads, at its rows. */
DEVICE void branch_columns(const clipft_cuda_branch &b, const Quad (&quads)[4], const unsigned long long (&keys)[4], int col,
                           RightHalves (&x)[4])
{
    if (!b.quick_gelu && !b.dropout.seed) {
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = {{beside(quads[0], quads[1], j), beside(quads[2], quads[3], j)}, {}};
        return;
    }
    Floats v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack_branch<CLIPFT_CUDA_BFLOAT16>(b, quads[i], keys[i], col, v[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = right_halves({v[0][j], v[1][j], v[2][j], v[3][j]});
}

/* Each warp 16 rows at a time; the warps' sums are added in the end. */
KERNEL(CLIPFT_CUDA_LORA_OUTER_THREADS) lora_tensor_outer(clipft_cuda_lora_outer_args a)
{
    SHARED(float, sums, OUTER_WARPS *RANK *COLS);
    const int ranks = (a.rank + RANK - 1) / RANK, rank0 = (int)(blockIdx.x % ranks) * RANK, col0 = (int)(blockIdx.x / ranks) * COLS,
              warp = threadIdx.x / 32, col = col0 + 4 * group();
    const int end = (int)((long long)a.branch.rows * (blockIdx.y + 1) / a.parts);
    float sum[GROUPS][4][4] = {};
    for (int row = (int)((long long)a.branch.rows * blockIdx.y / a.parts) + warp * 16 + 4 * place(); row - 4 * place() < end;
         row += OUTER_STEP) {
        OuterQuads quads;
        unsigned long long keys[4] = {};
        fetch_outer(a.branch, row, end, col, quads);
        const LeftHalves v = v_columns(a.v, row, end, rank0);
        if (a.branch.dropout.seed)
#pragma unroll
            for (int i = 0; i < 4; ++i) keys[i] = row_key(a.branch.dropout, row + i);
#pragma unroll
        for (int q = 0; q < GROUPS; ++q) {
            RightHalves x[4];
            branch_columns(a.branch, quads[q], keys, col + 32 * q, x);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                mma(sum[q][j], v.high, x[j].high);
                mma(sum[q][j], v.low, x[j].high);
                if (a.branch.quick_gelu) mma(sum[q][j], v.high, x[j].low);
            }
        }
    }
#pragma unroll
    for (int q = 0; q < GROUPS; ++q)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sums[(warp * RANK + 8 * (i / 2) + group()) * COLS + 32 * q + 4 * (2 * place() + i % 2) + j] = sum[q][j][i];
    __syncthreads();
    for (int at = threadIdx.x; at < RANK * COLS; at += OUTER_THREADS) {
        const int k = rank0 + at / COLS, own = col0 + at % COLS;
        float total = 0.0f;
        for (int w = 0; w < OUTER_WARPS; ++w) total += sums[w * RANK * COLS + at];
        if (k < a.rank && own < a.branch.cols) a.part[((long long)blockIdx.y * a.rank + k) * a.branch.cols + own] = total;
    }
}
