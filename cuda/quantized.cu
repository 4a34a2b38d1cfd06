/* int8 linear layers around torch's integer product: see csrc/kernels/int8/int8.h for the mathematics, csrc/ops/quantized_cuda.c for the
 * order.
 *
 * A row's levels go to the product less its zero point, -127 .. 127, so its sums are exact as they are: no correction, and the weights stay
 * as they are saved. Of two layers in a row the first one's results are never stored: int8_requantize makes them of the sums. A row is held
 * in the registers of a team of warps, so that it is read once; what does not fit there is made again for every pass. */
#include "common.cuh"

enum { HELD = CLIPFT_CUDA_INT8_HELD, WARPS = CLIPFT_CUDA_WARPS, FINISH_ROWS = CLIPFT_CUDA_INT8_FINISH_ROWS, FINISH_AT_ONCE = 4 };

/* For a denominator beyond 2^126 __fdividef gives 0, which is as near as 1e-36. */
DEVICE float activate(float v, int activation)
{
    if (activation == 1) return v < -52.0f ? 0.0f : __fdividef(v, 1.0f + expf(-1.702f * v));
    if (activation == 2) return v < -14.0f ? 0.0f : 0.5f * v * erfcf(v * -0.70710678118654752f);
    if (activation == 3) return v < -10.5f ? 0.0f : __fdividef(v, 1.0f + expf(v * (v * v * -0.0713548163f - 1.59576912f)));
    return v;
}

/* Four columns of a matrix of one row; zeros where it has no data or no such columns. */
DEVICE void load_columns(const clipft_cuda_matrix &m, int col, int inside, Floats &v)
{
    if (m.path == CLIPFT_CUDA_FLOAT32)
        unpack<CLIPFT_CUDA_FLOAT32>(fetch<CLIPFT_CUDA_FLOAT32>(m, col, inside), v);
    else
        load_apart(m, col * m.col_stride, m.col_stride, has_data(m) ? inside : 0, v);
}

/* Sums to results. */
DEVICE void finish_sums(const clipft_cuda_int8_sums &layer, const Quad &sums, float row_scale, const Floats &col_scale, const Floats &bias,
                        Floats &v)
{
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = activate((float)(int)sums.word[k] * col_scale[k] * row_scale + bias[k], layer.activation);
}

/* ---- rows to levels ---- */

/* A thread's place among the threads of its row. */
struct Member {
    int row, first, step; /* its words: first, first + step, .. */
    bool there;           /* the row is */
};

DEVICE Member member_of(const clipft_cuda_int8_rows &out)
{
    const int threads = 32 * out.team, row = blockIdx.x * (CLIPFT_CUDA_THREADS / threads) + threadIdx.x / threads;
    return {row, (int)threadIdx.x % threads, threads, row < out.rows};
}

/* Sums or maxima over the row's threads, in all of them. */
template <class Combine, class Shared> DEVICE void combine_team(float (&v)[3], int team, Shared &shared, Combine combine)
{
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int k = 0; k < 3; ++k)
        for (int step = 16; step > 0; step >>= 1) v[k] = combine(v[k], __shfl_xor_sync(0xffffffffu, v[k], step));
    if (team == 1) return;
    __syncthreads();
    if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int k = 0; k < 3; ++k) shared[3 * warp + k] = v[k];
    __syncthreads();
    for (int k = 0; k < 3; ++k) {
        const int first = warp / team * team;
        v[k] = shared[3 * first + k];
        for (int other = first + 1; other < first + team; ++other) v[k] = combine(v[k], (float)shared[3 * other + k]);
    }
}

template <class Shared> DEVICE float team_sum(float value, int team, Shared &shared)
{
    float v[3] = {value, 0.0f, 0.0f};
    combine_team(v, team, shared, [](float a, float b) { return a + b; });
    return v[0];
}

/* visit(word, its four values) for each of the thread's words: those held, then those that `make` makes. */
template <class Make, class Visit>
DEVICE void each_word(const Member &my, int words, Floats (&held)[HELD], const Make &make, const Visit &visit)
{
#pragma unroll
    for (int i = 0; i < HELD; ++i)
        if (my.first + i * my.step < words) visit(my.first + i * my.step, held[i]);
    for (int word = my.first + HELD * my.step; word < words; word += my.step) {
        Floats v;
        make(word, v);
        visit(word, v);
    }
}

/* To nearest even, for |x| < 2^22. The sum must not become one operation with the product that x is. */
DEVICE int round_to_int(float x) { return (int)(__float_as_uint(__fadd_rn(x, 12582912.0f)) - 0x4b400000u); }

template <class Make, class Shared>
DEVICE void quantize_row(const clipft_cuda_int8_rows &out, const Member &my, Floats (&held)[HELD], const Make &make, Shared &shared)
{
    float low = 0.0f, high = 0.0f, bad = 0.0f;
    each_word(my, out.words, held, make, [&](int, const Floats &v) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            low = fminf(low, v[k]), high = fmaxf(high, v[k]); /* both pass over NaN */
            bad = fmaf(v[k], 0.0f, bad);                      /* NaN from the first that is not finite on */
        }
    });
    float range[3] = {-low, high, bad != bad ? 1.0f : 0.0f};
    combine_team(range, out.team, shared, [](float a, float b) { return fmaxf(a, b); });
    low = -range[0], high = range[1];
    /* As csrc/kernels/int8.c: each end is divided by itself, for their difference may overflow; the floor keeps the inverse finite. */
    const float scale = fmaxf(high / 127.0f - low / 127.0f, 1.175494351e-38f), inverse = 1.0f / scale;
    const int zero = -(int)rintf(low * inverse);
    if (!my.there) return;
    each_word(my, out.words, held, make, [&](int word, const Floats &v) {
        unsigned bits = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int level = round_to_int(__fmul_rn(v[k], inverse)) + zero;
            bits |= ((unsigned)((level < 0 ? 0 : level > 127 ? 127 : level) - zero) & 0xffu) << (8 * k);
        }
        out.q[(long long)my.row * out.words + word] = range[2] > 0.0f ? 0u : bits;
    });
    if (my.first == 0) out.scale[my.row] = range[2] > 0.0f ? __uint_as_float(0x7fc00000u) : scale;
}

template <int Path> DEVICE void quantize(const clipft_cuda_int8_quantize_args &a)
{
    SHARED(float, shared, 3 * WARPS);
    const Member my = member_of(a.out);
    const int in = a.out.in, there = my.there ? in : 0;
    const auto fetch_word = [&](int word) { return fetch<Path>(a.x, element_at(a.x, my.row, 4ll * word), there - 4ll * word); };
    const auto load_word = [&](int word, Floats &v) { unpack<Path>(fetch_word(word), v); };
    Quad quads[HELD];
    Floats held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) quads[i] = fetch_word(my.first + i * my.step);
#pragma unroll
    for (int i = 0; i < HELD; ++i) unpack<Path>(quads[i], held[i]);
    if (!has_data(a.norm_weight)) {
        quantize_row(a.out, my, held, load_word, shared);
        return;
    }
    float sum = 0.0f, squares = 0.0f;
    each_word(my, a.out.words, held, load_word, [&](int, const Floats &v) { sum += (v[0] + v[1]) + (v[2] + v[3]); });
    const float mean = team_sum(sum, a.out.team, shared) / (float)in;
    each_word(my, a.out.words, held, load_word, [&](int word, const Floats &v) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float centred = 4 * word + k < in ? v[k] - mean : 0.0f;
            squares = fmaf(centred, centred, squares);
        }
    });
    const float inverse = 1.0f / sqrtf(team_sum(squares, a.out.team, shared) / (float)in + a.norm_eps);
    /* Weight and bias are zeros beyond the row, and so is what comes of them unless the row is bad anyway. */
    const auto normalise = [&](int word, Floats &v) {
        Floats weight, bias;
        load_columns(a.norm_weight, 4 * word, in - 4 * word, weight);
        load_columns(a.norm_bias, 4 * word, in - 4 * word, bias);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = (v[k] - mean) * inverse * weight[k] + bias[k];
    };
#pragma unroll
    for (int i = 0; i < HELD; ++i) normalise(my.first + i * my.step, held[i]);
    quantize_row(
        a.out, my, held,
        [&](int word, Floats &v) {
            load_word(word, v);
            normalise(word, v);
        },
        shared);
}

KERNEL(CLIPFT_CUDA_THREADS) int8_quantize_f32(clipft_cuda_int8_quantize_args a) { quantize<CLIPFT_CUDA_FLOAT32>(a); }
KERNEL(CLIPFT_CUDA_THREADS) int8_quantize_bf16(clipft_cuda_int8_quantize_args a) { quantize<CLIPFT_CUDA_BFLOAT16>(a); }
KERNEL(CLIPFT_CUDA_THREADS) int8_quantize_f16(clipft_cuda_int8_quantize_args a) { quantize<CLIPFT_CUDA_FLOAT16>(a); }
KERNEL(CLIPFT_CUDA_THREADS) int8_quantize_any(clipft_cuda_int8_quantize_args a) { quantize<CLIPFT_CUDA_ANY_LAYOUT>(a); }

KERNEL(CLIPFT_CUDA_THREADS) int8_requantize(clipft_cuda_int8_requantize_args a)
{
    SHARED(float, shared, 3 * WARPS);
    const Member my = member_of(a.out);
    const float row_scale = my.there ? a.layer.row_scale[my.row] : 0.0f;
    const auto make = [&](int word, Floats &v) {
        const int inside = my.there ? a.out.in - 4 * word : 0;
        Floats col_scale, bias;
        const Quad sums = inside > 0 ? read_quad(a.layer.sums, (long long)my.row * a.layer.stride + 4 * word) : Quad{0u, 0u, 0u, 0u};
        load_columns(a.layer.col_scale, 4 * word, inside, col_scale);
        load_columns(a.layer.bias, 4 * word, inside, bias);
        finish_sums(a.layer, sums, row_scale, col_scale, bias, v);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (k >= inside) v[k] = 0.0f;
    };
    Floats held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) make(my.first + i * my.step, held[i]);
    quantize_row(a.out, my, held, make, shared);
}

/* ---- sums to results ---- */

/* A lane's four columns of a warp's rows, FINISH_AT_ONCE of them on their way together. */
template <int Path> DEVICE void finish(const clipft_cuda_int8_finish_args &a)
{
    const int col = blockIdx.x * CLIPFT_CUDA_INT8_FINISH_COLS + threadIdx.x % 32 * 4, inside = a.cols - col;
    const int begin = blockIdx.y * FINISH_ROWS + threadIdx.x / 32 * (FINISH_ROWS / WARPS);
    Floats col_scale, bias;
    load_columns(a.layer.col_scale, col, inside, col_scale);
    load_columns(a.layer.bias, col, inside, bias);
    if (inside <= 0) return;
#pragma unroll 1
    for (int row0 = begin; row0 < begin + FINISH_ROWS / WARPS && row0 < a.rows; row0 += FINISH_AT_ONCE) {
        Quad sums[FINISH_AT_ONCE] = {}, residual[FINISH_AT_ONCE] = {};
        float row_scale[FINISH_AT_ONCE] = {};
#pragma unroll
        for (int r = 0; r < FINISH_AT_ONCE; ++r) {
            const long long row = row0 + r;
            if (row >= a.rows) continue;
            sums[r] = read_quad(a.layer.sums, row * a.layer.stride + col);
            row_scale[r] = a.layer.row_scale[row];
            if (has_data(a.residual)) residual[r] = fetch<Path>(a.residual, element_at(a.residual, row, col), inside);
        }
#pragma unroll
        for (int r = 0; r < FINISH_AT_ONCE; ++r) {
            Floats v, add;
            if (row0 + r >= a.rows) break;
            finish_sums(a.layer, sums[r], row_scale[r], col_scale, bias, v);
            unpack<Path>(residual[r], add);
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (has_data(a.residual)) v[k] += add[k];
            store_quad(a.out, (long long)(row0 + r) * a.cols + col, inside, v);
        }
    }
}

KERNEL(CLIPFT_CUDA_THREADS) int8_finish_f32(clipft_cuda_int8_finish_args a) { finish<CLIPFT_CUDA_FLOAT32>(a); }
KERNEL(CLIPFT_CUDA_THREADS) int8_finish_bf16(clipft_cuda_int8_finish_args a) { finish<CLIPFT_CUDA_BFLOAT16>(a); }
KERNEL(CLIPFT_CUDA_THREADS) int8_finish_f16(clipft_cuda_int8_finish_args a) { finish<CLIPFT_CUDA_FLOAT16>(a); }
KERNEL(CLIPFT_CUDA_THREADS) int8_finish_any(clipft_cuda_int8_finish_args a) { finish<CLIPFT_CUDA_ANY_LAYOUT>(a); }
