/* What the two losses share: sums of partial gradients, the gradients as the caller gets them, and scalars. The upstream gradient and the
 * scale are read here, on the device: the host never waits for them. */
#include "common.cuh"

KERNEL(CLIPFT_CUDA_THREADS) gradient_add(clipft_cuda_gradient_add_args a)
{
    const long long step = (long long)gridDim.x * CLIPFT_CUDA_THREADS;
    for (long long k = (long long)blockIdx.x * CLIPFT_CUDA_THREADS + threadIdx.x; k < a.count; k += step) a.sum[k] += a.part[k];
}

/* A warp a row. */
KERNEL(CLIPFT_CUDA_THREADS) gradient_finish(clipft_cuda_gradient_finish_args a)
{
    const int lane = threadIdx.x % 32;
    const long long row = (long long)blockIdx.x * CLIPFT_CUDA_WARPS + threadIdx.x / 32, pair = row - a.pair_first;
    if (row >= a.rows) return;
    const bool has_pair = pair >= 0 && pair < a.pairs;
    const float coefficient = has_pair ? a.pair[pair] : 0.0f, inverse = 1.0f / a.unit;
    const float factor = (float)(a.factor * (double)a.grad[0] * (double)a.scale[0]);
    float dot = 0.0f;
    for (long long k = lane; k < a.dim; k += 32) {
        float sum = a.sum ? a.sum[row * a.dim + k] * inverse : 0.0f;
        if (has_pair) sum = fmaf(coefficient, load(a.other, pair + a.other_first, k), sum);
        dot = fmaf(sum, load(a.value, row, k), dot);
        store(a.out, row * a.dim + k, sum * factor);
    }
    const double total = warp_sum((double)dot);
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
