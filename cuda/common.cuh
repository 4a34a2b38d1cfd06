/* What the kernels share: the few words that differ between a GPU and the emulation in tests/cuda, float conversions, reductions, and the
 * place of a thread in a tile. Needs no header of CUDA's, so that NVRTC compiles it wherever it is. */
#ifndef CLIPFT_CUDA_COMMON_CUH
#define CLIPFT_CUDA_COMMON_CUH

#ifdef __CUDACC__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define DEVICE static __device__ __forceinline__
#define SHARED(type, name, count) __shared__ type name[count]
#define NO_VALUE (-__int_as_float(0x7f800000)) /* -Inf */
#endif

#include "args.h"

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

DEVICE bool has_data(const clipft_cuda_matrix &m) { return m.data32 || m.data16; }

/* 1 / (1 + e) or e / (1 + e) with e = exp(-|z|), which cannot overflow. */
DEVICE float sigmoid(float z)
{
    const float e = expf(-fabsf(z));
    return (z < 0.0f ? e : 1.0f) / (1.0f + e);
}

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
    int row, col; /* of its first element; the others lie 1 row and 32 columns apart */
    int lane, warp;
    int pair; /* column of the first row's pair, maybe outside of the tile; that of the next row is one to the right */
};

DEVICE Place place_in(const clipft_cuda_tile &tile)
{
    Place place;
    place.lane = threadIdx.x % 32;
    place.warp = threadIdx.x / 32;
    place.row = blockIdx.y * CLIPFT_CUDA_BLOCK_ROWS + place.warp * CLIPFT_CUDA_WARP_ROWS;
    place.col = blockIdx.x * CLIPFT_CUDA_BLOCK_COLS + place.lane;
    const long long pair = tile.row_offset + tile.row0 + place.row - tile.col0; /* clamped where it is far outside */
    place.pair = (int)(pair < -(1 << 20) ? -(1 << 20) : pair > (1 << 20) ? (1 << 20) : pair);
    return place;
}

typedef float Elements[CLIPFT_CUDA_WARP_ROWS][CLIPFT_CUDA_LANE_COLS];

/* All of them before anything is stored, so that the loads overlap; zero outside. */
DEVICE void load_elements(const clipft_cuda_tile &tile, const Place &at, Elements &x)
{
#pragma unroll
    for (int r = 0; r < CLIPFT_CUDA_WARP_ROWS; ++r)
#pragma unroll
        for (int k = 0; k < CLIPFT_CUDA_LANE_COLS; ++k) {
            const bool inside = at.row + r < tile.rows && at.col + 32 * k < tile.cols;
            x[r][k] = inside ? tile.x[(at.row + r) * tile.stride + at.col + 32 * k] : 0.0f;
        }
}

/* Adds to the block's own sum, which launches on a stream take turns with. */
template <class Shared> DEVICE void add_block_sum(CLIPFT_GLOBAL(double) sums, double value, bool first, Shared &warps)
{
    const double sum = block_sum(value, warps, CLIPFT_CUDA_THREADS);
    const int block = blockIdx.y * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) sums[block] = first ? sum : sums[block] + sum;
}

#endif
