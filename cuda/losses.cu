/* What the two losses share: sums of partial gradients, the gradients as the caller gets them, and scalars. The upstream gradient and the
 * scale are read here, on the device: the host never waits for them. */
#include "common.cuh"

/* A thread four elements; both begin aligned. */
KERNEL(CLIPFT_CUDA_THREADS) gradient_add(clipft_cuda_gradient_add_args a)
{
    const long long at = 4 * ((long long)blockIdx.x * CLIPFT_CUDA_THREADS + threadIdx.x);
    Floats sum, part;
    if (at + 4 <= a.count) {
        read_floats(a.sum, at, sum);
        read_floats(a.part, at, part);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[k] += part[k];
        write_floats(a.sum, at, sum);
    } else {
        for (long long k = at; k < a.count; ++k) a.sum[k] += a.part[k];
    }
}

/* What gradient_finish knows of its row. */
struct FinishRow {
    long long row, other;
    float coefficient, inverse, factor;
    bool has_pair;
};

/* The gradient's element before `factor`, and its share of the dot product. */
DEVICE float finish_element(const FinishRow &at, float sum, float other, float value, float &dot)
{
    sum = fmaf(at.coefficient, other, sum * at.inverse);
    dot = fmaf(sum, value, dot);
    return sum;
}

DEVICE float finish_scattered(const clipft_cuda_gradient_finish_args &a, const FinishRow &at, int lane)
{
    float dot = 0.0f;
    for (long long k = lane; k < a.dim; k += 32) {
        const float sum = a.sum ? a.sum[at.row * a.dim + k] : 0.0f, other = at.has_pair ? load(a.other, at.other, k) : 0.0f;
        store(a.out, at.row * a.dim + k, at.factor * finish_element(at, sum, other, load(a.value, at.row, k), dot));
    }
    return dot;
}

DEVICE float finish_quads(const clipft_cuda_gradient_finish_args &a, const FinishRow &at, int lane)
{
    float dot = 0.0f;
#pragma unroll 2
    for (long long k = 4 * lane; k < a.dim; k += 128) {
        Floats sum = {}, other = {}, value;
        if (a.sum) read_floats(a.sum, at.row * a.dim + k, sum);
        if (at.has_pair) load_aligned(a.other, at.other * a.other.row_stride + k, other);
        load_aligned(a.value, at.row * a.value.row_stride + k, value);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = at.factor * finish_element(at, sum[i], other[i], value[i], dot);
        store_aligned(a.out, at.row * a.dim + k, sum);
    }
    return dot;
}

/* A warp a row. */
KERNEL(CLIPFT_CUDA_THREADS) gradient_finish(clipft_cuda_gradient_finish_args a)
{
    const int lane = threadIdx.x % 32;
    const long long row = (long long)blockIdx.x * CLIPFT_CUDA_WARPS + threadIdx.x / 32, pair = row - a.pair_first;
    if (row >= a.rows) return;
    const bool has_pair = pair >= 0 && pair < a.pairs,
               quads = a.value.path != CLIPFT_CUDA_ANY_LAYOUT && a.other.path != CLIPFT_CUDA_ANY_LAYOUT;
    const float factor = (float)(a.factor * (a.grad ? (double)a.grad[0] : 1.0) * (double)a.scale[0]);
    const FinishRow at = {row, pair + a.other_first, has_pair ? a.pair[pair] : 0.0f, 1.0f / a.unit, factor, has_pair};
    const double total = warp_sum((double)(quads ? finish_quads(a, at, lane) : finish_scattered(a, at, lane)));
    if (lane == 0 && a.dot) a.dot[row] = total;
}

/* One block. */
KERNEL(CLIPFT_CUDA_SUM_THREADS) loss_sum(clipft_cuda_sum_args a)
{
    SHARED(double, warps, CLIPFT_CUDA_SUM_THREADS / 32);
    double sum = 0.0;
    for (long long k = threadIdx.x; k < a.a_count; k += CLIPFT_CUDA_SUM_THREADS) sum += a.a[k];
    for (long long k = threadIdx.x; k < a.b_count; k += CLIPFT_CUDA_SUM_THREADS) sum += a.b[k];
    sum = block_sum(sum, warps, CLIPFT_CUDA_SUM_THREADS);
    if (threadIdx.x != 0) return;
    if (a.c) sum += a.c_factor * a.c[0];
    sum *= a.factor;
    if (a.scale) sum *= (double)a.scale[0];
    if (a.grad) sum *= (double)a.grad[0];
    if (a.out32)
        a.out32[0] = (float)sum;
    else
        a.out64[0] = sum;
}
