/* int8 linear layers around torch's integer product: see csrc/kernels/int8.h for the mathematics, csrc/ops/cuda_quantized.c for the order.
 *
 * A row's levels go to the product less its zero point, -127 .. 127, so its sums are exact as they are: no correction, and the weights stay
 * as they are saved. Of two layers in a row the first one's results are never stored: int8_requantize makes them of the sums twice, once
 * for the row's range and once for its levels. */
#include "common.cuh"

DEVICE float activate(float v, int activation)
{
    if (activation == 1) return v < -52.0f ? 0.0f : v / (1.0f + expf(-1.702f * v));
    if (activation == 2) return v < -14.0f ? 0.0f : 0.5f * v * erfcf(v * -0.70710678118654752f);
    return v;
}

DEVICE float result(const clipft_cuda_int8_sums &layer, float row_scale, int row, int col)
{
    const float sum = (float)layer.sums[(long long)row * layer.stride + col];
    const float bias = has_data(layer.bias) ? load(layer.bias, 0, col) : 0.0f;
    return activate(sum * load(layer.col_scale, 0, col) * row_scale + bias, layer.activation);
}

/* A warp a row; value(j) is called twice for each element. */
template <class Value> DEVICE void quantize_row(const clipft_cuda_int8_rows &out, int row, Value value)
{
    const int lane = threadIdx.x % 32;
    float low = 0.0f, high = 0.0f, bad = 0.0f;
    for (int word = lane; word < out.words; word += 32)
        for (int j = 4 * word; j < 4 * word + 4 && j < out.in; ++j) {
            const float v = value(j);
            low = fminf(low, v), high = fmaxf(high, v); /* both pass over NaN */
            if (!(fabsf(v) <= 3.402823466e38f)) bad = 1.0f;
        }
    low = -warp_max(-low), high = warp_max(high), bad = warp_max(bad);
    /* As csrc/kernels/int8.c: each end is divided by itself, for their difference may overflow; the floor keeps the inverse finite. */
    const float scale = fmaxf(high / 127.0f - low / 127.0f, 1.175494351e-38f), inverse = 1.0f / scale;
    const int zero = -(int)rintf(low * inverse);
    for (int word = lane; word < out.words; word += 32) {
        unsigned bits = 0;
        for (int k = 0; k < 4; ++k) {
            const int j = 4 * word + k;
            if (j >= out.in || bad > 0.0f) break;
            const int level = (int)rintf(value(j) * inverse) + zero;
            bits |= ((unsigned)((level < 0 ? 0 : level > 127 ? 127 : level) - zero) & 0xffu) << (8 * k);
        }
        out.q[(long long)row * out.words + word] = bits;
    }
    if (lane == 0) out.scale[row] = bad > 0.0f ? __uint_as_float(0x7fc00000u) : scale;
}

KERNEL(CLIPFT_CUDA_THREADS) int8_quantize(clipft_cuda_int8_quantize_args a)
{
    const int row = blockIdx.x * CLIPFT_CUDA_WARPS + threadIdx.x / 32, in = a.out.in;
    if (row >= a.out.rows) return;
    if (has_data(a.norm_weight)) {
        float sum = 0.0f, squares = 0.0f;
        for (int j = threadIdx.x % 32; j < in; j += 32) sum += load(a.x, row, j);
        const float mean = warp_sum(sum) / (float)in;
        for (int j = threadIdx.x % 32; j < in; j += 32) {
            const float centred = load(a.x, row, j) - mean;
            squares = fmaf(centred, centred, squares);
        }
        const float inverse = 1.0f / sqrtf(warp_sum(squares) / (float)in + a.norm_eps);
        quantize_row(a.out, row, [&a, row, mean, inverse](int j) {
            return (load(a.x, row, j) - mean) * inverse * load(a.norm_weight, 0, j) + load(a.norm_bias, 0, j);
        });
    } else {
        quantize_row(a.out, row, [&a, row](int j) { return load(a.x, row, j); });
    }
}

KERNEL(CLIPFT_CUDA_THREADS) int8_requantize(clipft_cuda_int8_requantize_args a)
{
    const int row = blockIdx.x * CLIPFT_CUDA_WARPS + threadIdx.x / 32;
    if (row >= a.out.rows) return;
    const float row_scale = a.layer.row_scale[row];
    quantize_row(a.out, row, [&a, row, row_scale](int j) { return result(a.layer, row_scale, row, j); });
}

/* A block a piece of a row. */
KERNEL(CLIPFT_CUDA_THREADS) int8_finish(clipft_cuda_int8_finish_args a)
{
    const int row = blockIdx.y, begin = blockIdx.x * CLIPFT_CUDA_INT8_COLS + threadIdx.x;
    const float row_scale = a.layer.row_scale[row];
    for (int col = begin; col < begin + CLIPFT_CUDA_INT8_COLS && col < a.cols; col += CLIPFT_CUDA_THREADS) {
        const float v = result(a.layer, row_scale, row, col);
        store(a.out, (long long)row * a.cols + col, has_data(a.residual) ? v + load(a.residual, row, col) : v);
    }
}
