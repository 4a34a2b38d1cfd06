/* What the kernels share: the few words that differ between a GPU and the emulation in tests/cuda, float conversions, reductions, and the
 * place of a thread in a tile. Needs no header of CUDA's, so that NVRTC compiles it wherever it is. */
#ifndef CLIPFT_CUDA_COMMON_CUH
#define CLIPFT_CUDA_COMMON_CUH

#ifdef __CUDACC__
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__) /* threads, and blocks an SM holds at least */
#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define NO_VALUE (-__int_as_float(0x7f800000)) /* -Inf */
#endif

#include "args.h"

/* ---- fast exponentials ---- */

#ifdef __CUDACC__
/* One instruction each, of an error of 2 ulp; what is below 2^-126 is zero. */
DEVICE float exp2_fast(float x)
{
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

DEVICE float reciprocal(float x)
{
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}
#endif

#define LOG2_E 1.44269504f

/* Of a relative error of |x| / 10^7: for terms of sums, the smaller ones of which count for less. */
DEVICE float exp_fast(float x) { return exp2_fast(x * LOG2_E); }

/* ---- 16-bit floats ---- */

#ifdef __CUDACC__
DEVICE float float16_to_float(unsigned short bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

DEVICE unsigned short float_to_float16(float value)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

/* To nearest even; NaN stays NaN. (The instruction begins with sm_80.) */
DEVICE unsigned short float_to_bfloat16(float value)
{
    const unsigned bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

DEVICE float load(const clipft_cuda_matrix &m, long long row, long long col)
{
    const long long at = row * m.row_stride + col * m.col_stride;
    if (m.kind == CLIPFT_CUDA_FLOAT32) return m.data32[at];
    const unsigned short bits = m.data16[at];
    return m.kind == CLIPFT_CUDA_FLOAT16 ? float16_to_float(bits) : __uint_as_float((unsigned)bits << 16);
}

DEVICE void store(const clipft_cuda_target &m, long long at, float value)
{
    if (m.kind == CLIPFT_CUDA_FLOAT32)
        m.data32[at] = value;
    else
        m.data16[at] = m.kind == CLIPFT_CUDA_FLOAT16 ? float_to_float16(value) : float_to_bfloat16(value);
}

/* Two to a word, the first in the lower half. */
DEVICE unsigned bfloat16_pair(float first, float second)
{
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return float_to_bfloat16(first) | (unsigned)float_to_bfloat16(second) << 16;
#endif
}

/* ---- quads: four elements of a row in one access ---- */

#ifdef __CUDACC__
/* As they lie in memory: two words of 16-bit floats, or four. */
struct Quad {
    unsigned word[4];
};

template <class T> DEVICE Quad read_quad(const T *from, long long at)
{
    if constexpr (sizeof(T) == 2) {
        const uint2 q = *reinterpret_cast<const uint2 *>(from + at);
        return {q.x, q.y, 0u, 0u};
    } else {
        const uint4 q = *reinterpret_cast<const uint4 *>(from + at);
        return {q.x, q.y, q.z, q.w};
    }
}

template <class T> DEVICE void write_quad(T *to, long long at, const Quad &q)
{
    if constexpr (sizeof(T) == 2)
        *reinterpret_cast<uint2 *>(to + at) = make_uint2(q.word[0], q.word[1]);
    else
        *reinterpret_cast<uint4 *>(to + at) = make_uint4(q.word[0], q.word[1], q.word[2], q.word[3]);
}
#endif

typedef float Floats[4];

template <class From> DEVICE void read_floats(From &from, long long at, Floats &v)
{
    const Quad q = read_quad(from, at);
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = __uint_as_float(q.word[k]);
}

template <class To> DEVICE void write_floats(To &to, long long at, const Floats &v)
{
    write_quad(to, at, {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])});
}

/* The first `inside` of four elements that lie `step` apart, then zeros; all are asked for before one is used. */
DEVICE void load_apart(const clipft_cuda_matrix &m, long long at, long long step, long long inside, Floats &v)
{
    if (m.kind == CLIPFT_CUDA_FLOAT32) {
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = k < inside ? m.data32[at + k * step] : 0.0f;
        return;
    }
    unsigned short bits[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) bits[k] = k < inside ? m.data16[at + k * step] : (unsigned short)0;
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = m.kind == CLIPFT_CUDA_FLOAT16 ? float16_to_float(bits[k]) : __uint_as_float((unsigned)bits[k] << 16);
}

DEVICE long long element_at(const clipft_cuda_matrix &m, long long row, long long col) { return row * m.row_stride + col * m.col_stride; }

/* Four elements of a row from element `at` on, of which `inside` are there (0 or less: none), the others zeros. A block takes one path: the
 * matrix's own, or CLIPFT_CUDA_ANY_LAYOUT, which fits all. What is fetched waits in few registers until it is unpacked. */
template <int Path> DEVICE Quad fetch(const clipft_cuda_matrix &m, long long at, long long inside)
{
    if constexpr (Path == CLIPFT_CUDA_ANY_LAYOUT) {
        Floats v;
        load_apart(m, at, m.col_stride, inside, v);
        return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
    } else {
        if (inside <= 0) return {0u, 0u, 0u, 0u};
        if constexpr (Path == CLIPFT_CUDA_FLOAT32)
            return read_quad(m.data32, at);
        else
            return read_quad(m.data16, at);
    }
}

template <int Path> DEVICE void unpack(const Quad &q, Floats &v)
{
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const unsigned pair = q.word[k / 2];
        if constexpr (Path == CLIPFT_CUDA_BFLOAT16)
            v[k] = __uint_as_float(k % 2 ? pair & 0xffff0000u : pair << 16);
        else if constexpr (Path == CLIPFT_CUDA_FLOAT16)
            v[k] = float16_to_float((unsigned short)(k % 2 ? pair >> 16 : pair));
        else
            v[k] = __uint_as_float(q.word[k]);
    }
}

/* An aligned quad of the matrix's own kind. */
DEVICE void load_aligned(const clipft_cuda_matrix &m, long long at, Floats &v)
{
    if (m.kind == CLIPFT_CUDA_FLOAT32)
        read_floats(m.data32, at, v);
    else if (m.kind == CLIPFT_CUDA_FLOAT16)
        unpack<CLIPFT_CUDA_FLOAT16>(read_quad(m.data16, at), v);
    else
        unpack<CLIPFT_CUDA_BFLOAT16>(read_quad(m.data16, at), v);
}

DEVICE void store_aligned(const clipft_cuda_target &m, long long at, const Floats &v)
{
    if (m.kind == CLIPFT_CUDA_FLOAT32)
        write_floats(m.data32, at, v);
    else if (m.kind == CLIPFT_CUDA_FLOAT16)
        write_quad(m.data16, at,
                   {float_to_float16(v[0]) | (unsigned)float_to_float16(v[1]) << 16,
                    float_to_float16(v[2]) | (unsigned)float_to_float16(v[3]) << 16, 0u, 0u});
    else
        write_quad(m.data16, at, {bfloat16_pair(v[0], v[1]), bfloat16_pair(v[2], v[3]), 0u, 0u});
}

/* The first `inside`, 1 or more, of four elements of a row, then zeros. */
DEVICE void load_quad(const clipft_cuda_matrix &m, long long at, long long inside, Floats &v)
{
    if (m.path != CLIPFT_CUDA_ANY_LAYOUT)
        load_aligned(m, at, v);
    else
        load_apart(m, at, m.col_stride, inside, v);
}

/* The first `inside` of four elements. */
DEVICE void store_quad(const clipft_cuda_target &m, long long at, long long inside, const Floats &v)
{
    if (m.path != CLIPFT_CUDA_ANY_LAYOUT) {
        if (inside > 0) store_aligned(m, at, v);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
        if (k < inside) store(m, at + k, v[k]);
}

DEVICE bool has_data(const clipft_cuda_matrix &m) { return m.data32 || m.data16; }

/* ---- reductions, in an order that is always the same ---- */

DEVICE float warp_max(float value)
{
    for (int step = 16; step > 0; step >>= 1) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
    return value;
}

template <class T> DEVICE T warp_sum(T value)
{
    for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

/* The block's sum, in thread 0. `warps` has room for a value of each warp. */
template <class Shared> DEVICE double block_sum(double value, Shared &warps, int threads)
{
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x == 0)
        for (int warp = 0; warp < threads / 32; ++warp) sum += warps[warp];
    return sum;
}

/* ---- a thread's place in a tile ---- */

struct Place {
    int row, col; /* of its first element; the others lie in the next rows and columns */
    int lane, warp;
    int pair;          /* column of the first row's pair, maybe outside of the tile; that of the next row is one to the right */
    bool pairs, whole; /* of the block: may hold pairs; lies inside of the tile and holds none. */
};

DEVICE Place place_in(const clipft_cuda_tile &tile)
{
    const int row = blockIdx.y * CLIPFT_CUDA_BLOCK_ROWS, col = blockIdx.x * CLIPFT_CUDA_BLOCK_COLS;
    const long long pair = tile.row_offset + tile.row0 + row - tile.col0; /* of the block's first row */
    Place place;
    place.lane = threadIdx.x % 32;
    place.warp = threadIdx.x / 32;
    place.row = row + place.warp * CLIPFT_CUDA_WARP_ROWS;
    place.col = col + place.lane * CLIPFT_CUDA_LANE_COLS;
    place.pairs = pair > col - CLIPFT_CUDA_BLOCK_ROWS && pair < col + CLIPFT_CUDA_BLOCK_COLS;
    place.whole = !place.pairs && row + CLIPFT_CUDA_BLOCK_ROWS <= tile.rows && col + CLIPFT_CUDA_BLOCK_COLS <= tile.cols;
    place.pair = place.pairs ? (int)pair + place.warp * CLIPFT_CUDA_WARP_ROWS : -CLIPFT_CUDA_BLOCK_ROWS; /* far left of all columns */
    return place;
}

typedef float Elements[CLIPFT_CUDA_WARP_ROWS][CLIPFT_CUDA_LANE_COLS];

/* All of them before anything is stored, so that the loads overlap; of no use outside of the tile. */
DEVICE void load_elements(const clipft_cuda_tile &tile, const Place &at, Elements &x)
{
    const int first = at.row * tile.stride + at.col, rows = at.col < tile.cols ? tile.rows - at.row : 0;
    if (at.whole) {
#pragma unroll
        for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) read_floats(tile.x, first + r * tile.stride, x[r]);
        return;
    }
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r) {
        x[r][0] = x[r][1] = x[r][2] = x[r][3] = 0.0f;
        if (r < rows) read_floats(tile.x, first + r * tile.stride, x[r]);
    }
}

/* The bit of each of a thread's elements that lies in the tile and is no pair. */
DEVICE unsigned counted_elements(const clipft_cuda_tile &tile, const Place &at)
{
    unsigned counted = 0;
    if (at.whole) return ~0u;
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r)
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k)
            if (at.row + r < tile.rows && at.col + k < tile.cols && at.col + k != at.pair + r)
                counted |= 1u << (r * CLIPFT_CUDA_LANE_COLS + k);
    return counted;
}

template <bool Whole> DEVICE bool is_counted(unsigned counted, int r, int k)
{
    return Whole || (counted >> (r * CLIPFT_CUDA_LANE_COLS + k) & 1u);
}

/* A block's pairs: thread t of the first BLOCK_ROWS looks after that of row t. */
struct OwnPair {
    bool here;
    int row;
    float x;
};

DEVICE OwnPair own_pair(const clipft_cuda_tile &tile, const Place &at)
{
    const int t = threadIdx.x, row = blockIdx.y * CLIPFT_CUDA_BLOCK_ROWS + t, begin = blockIdx.x * CLIPFT_CUDA_BLOCK_COLS;
    const int col = at.pair + t - at.warp * CLIPFT_CUDA_WARP_ROWS;
    OwnPair pair = {at.pairs && t < CLIPFT_CUDA_BLOCK_ROWS && row < tile.rows && col >= begin && col < begin + CLIPFT_CUDA_BLOCK_COLS &&
                        col < tile.cols,
                    row, 0.0f};
    if (pair.here) pair.x = tile.x[row * tile.stride + col];
    return pair;
}

DEVICE long long label_of(const clipft_cuda_labels &labels, long long column) { return labels.data[column * labels.stride]; }

/* Labels of a thread's columns, where there are any. */
struct ColumnLabels {
    long long of[CLIPFT_CUDA_LANE_COLS];
};

DEVICE ColumnLabels column_labels(const clipft_cuda_labels &labels, const clipft_cuda_tile &tile, const Place &at)
{
    ColumnLabels columns = {};
#pragma unroll
    for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k)
        if (labels.data && at.col + k < tile.cols) columns.of[k] = label_of(labels, tile.col0 + at.col + k);
    return columns;
}

/* Adds to the block's own sum, which launches on a stream take turns with. */
template <class Shared> DEVICE void add_block_sum(CLIPFT_GLOBAL(double) sums, double value, bool first, Shared &warps)
{
    const double sum = block_sum(value, warps, CLIPFT_CUDA_THREADS);
    const int block = blockIdx.y * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) sums[block] = first ? sum : sums[block] + sum;
}

#endif
