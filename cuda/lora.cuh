/* What lora.cu and lora_tensor.cu share: dropout, quick_gelu, what a branch takes of its input, and how a sum ends. */
#ifndef CLIPFT_CUDA_LORA_CUH
#define CLIPFT_CUDA_LORA_CUH

#include "common.cuh"

constexpr int COLS = CLIPFT_CUDA_LORA_COLS; /* a warp's lanes, a quad each */
constexpr int RANK = CLIPFT_CUDA_LORA_RANK, DOWN_ROWS = CLIPFT_CUDA_LORA_DOWN_ROWS, UP_ROWS = CLIPFT_CUDA_LORA_UP_ROWS;
constexpr int THREADS = CLIPFT_CUDA_THREADS, WARPS = CLIPFT_CUDA_WARPS;
constexpr int OUTER_THREADS = CLIPFT_CUDA_LORA_OUTER_THREADS, OUTER_WARPS = OUTER_THREADS / 32;

/* ---- dropout: csrc/kernels/lora/lora.c and lora_ref.c, bit for bit ---- */

DEVICE unsigned long long mix(unsigned long long z)
{
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

DEVICE unsigned long long row_key(const clipft_cuda_dropout &d, long long row)
{
    return mix(mix((unsigned long long)d.seed[0]) + (unsigned long long)row * 0x9e3779b97f4a7c15ull);
}

DEVICE bool is_kept(const clipft_cuda_dropout &d, unsigned long long key, long long col)
{
    unsigned h = (unsigned)col * 0x9e3779b9u + (unsigned)key;
    h = (h ^ h >> 16) * 0x21f0aaadu;
    h = ((h ^ h >> 15) + (unsigned)(key >> 32)) * 0xd35a2d97u;
    h ^= h >> 15;
    return (int)h >= d.threshold;
}

/* ---- quick_gelu ---- */

/* sigmoid(|z|) and 1 - sigmoid(|z|). The denominator lies in 1 .. 2, where a division of 2 ulps needs no slow path: that would be a call,
 * and what the caller has in registers would go to memory. */
struct Sigmoids {
    float near, far;
};

DEVICE Sigmoids sigmoids(float z)
{
    const float e = expf(-fabsf(z)), near = __fdividef(1.0f, 1.0f + e);
    return {near, e * near};
}

DEVICE float quick_gelu(float x)
{
    const float z = 1.702f * x;
    const Sigmoids s = sigmoids(z);
    return x * (z < 0.0f ? s.far : s.near);
}

DEVICE float quick_gelu_slope(float x)
{
    const float z = 1.702f * x;
    const Sigmoids s = sigmoids(z);
    return (z < 0.0f ? s.far : s.near) + z * (s.near * s.far);
}

/* ---- products ---- */

/* What the branch takes of a quad at (row of `key`, col). */
template <int Path, class Key> DEVICE void unpack_branch(const clipft_cuda_branch &b, const Quad &q, const Key &key, int col, Floats &v)
{
    unpack<Path>(q, v);
    if (b.quick_gelu)
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = quick_gelu(v[k]);
    if (b.dropout.seed)
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (!is_kept(b.dropout, key, col + k)) v[k] = 0.0f;
}

/* The warps' sums [WARPS, DOWN_ROWS, RANK] into v. */
template <class Sums> DEVICE void add_warps(const clipft_cuda_lora_down_args &a, int row0, int rank0, int part, Sums &sums)
{
    for (int at = threadIdx.x; at < DOWN_ROWS * RANK; at += THREADS) {
        const int row = row0 + at / RANK, k = rank0 + at % RANK;
        float total = 0.0f;
        for (int w = 0; w < WARPS; ++w) total += sums[w * DOWN_ROWS * RANK + at];
        if (row < a.branch.rows) a.v[((long long)part * a.branch.rows + row) * a.padded + k] = k < a.rank ? a.scale * total : 0.0f;
    }
}

/* A row's quad: base + the branch, times the activation's slope. */
template <int Path>
DEVICE void finish_up(const clipft_cuda_lora_up_args &a, int row, int col, const Quad &base, const float (&sum)[4], unsigned long long key,
                      Floats &v)
{
    unpack<Path>(base, v);
#pragma unroll
    for (int c = 0; c < 4; ++c)
        if (!a.dropout.seed || is_kept(a.dropout, key, col + c)) v[c] = fmaf(a.scale, sum[c], v[c]);
    if (!has_data(a.x)) return;
    Floats x;
    unpack<Path>(fetch<Path>(a.x, element_at(a.x, row, col), row < a.rows ? a.cols - col : 0), x);
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] *= quick_gelu_slope(x[c]);
}

#endif
