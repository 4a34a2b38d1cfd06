/* The int8 kernels and the driver over them: sums and quantised rows equal the reference's bit for bit at every shape around the tiles, on
 * buffers of exact size; results against float64. */
#include "check.h"

#include "../../csrc/kernels/common/sizes.h"
#include "../../csrc/kernels/int8/int8.h"

#include <float.h>
#include <string.h>

static const double u = 0x1p-24;
#define COUNT(array) (int)(sizeof(array) / sizeof *(array))

static int pick(int low, int high) { return low + (int)((uniform() * 0.5F + 0.5F) * (float)(high - low + 1)); }

static void check_same(const void *got, const void *want, size_t bytes, const char *what, int64_t size)
{
    check_near(memcmp(got, want, bytes) != 0, 0.0, 0.0, what, size);
}

/* ---- micro-kernels ---- */

enum { RANDOM, LARGEST, SMALLEST, ALTERNATING, VALUES };

static void fill_tile(uint8_t *x, int64_t n, int8_t *w, int64_t m, int values)
{
    for (int64_t k = 0; k < n; ++k) x[k] = (uint8_t)(values == RANDOM ? pick(0, 127) : 127);
    for (int64_t k = 0; k < m; ++k)
        w[k] = (int8_t)(values == RANDOM ? pick(-128, 127) : values == LARGEST ? 127 : values == SMALLEST || k % 2 ? -128 : 127);
}

/* Channels as they are saved, packed by the slot itself, so that this knows nothing of its layout. */
static void test_dot(int64_t rows, int64_t panels, int64_t depth, int values)
{
    const clipft_int8_dot *dot = clipft_kernel_table.int8.dot;
    const int64_t stride = depth + 5, bytes = depth * CLIPFT_INT8_PANEL, w_stride = bytes + 64;
    const int64_t channels = panels * CLIPFT_INT8_PANEL, x_size = rows > 0 ? (rows - 1) * stride + depth : 0;
    const size_t sums_bytes = (size_t)(rows * CLIPFT_INT8_COLS) * sizeof(int32_t);
    uint8_t *x = check_alloc(x_size, 1);
    int8_t *w = check_alloc(channels * depth, 1), *packed = check_alloc((panels - 1) * w_stride + bytes, 1);
    int32_t *sums = check_alloc(rows * CLIPFT_INT8_COLS, sizeof *sums), *want = check_alloc(rows * CLIPFT_INT8_COLS, sizeof *want);
    const clipft_int8_tile tile = {x, packed, stride, w_stride, rows, panels, depth, packed, rows % 3};
    fill_tile(x, x_size, w, channels * depth, values);
    for (int64_t p = 0; p < panels; ++p) {
        const clipft_int8_weights part = {w + p * bytes, CLIPFT_INT8_PANEL, depth, depth, 1};
        int32_t got[CLIPFT_INT8_PANEL] = {0};
        memset(packed + p * w_stride, 0, (size_t)bytes);
        dot->pack(&part, packed + p * w_stride, got);
        for (int64_t c = 0; c < CLIPFT_INT8_PANEL; ++c) {
            int32_t sum = 0;
            for (int64_t k = 0; k < depth; ++k) sum += part.data[c * depth + k];
            check_near(got[c], sum, 0.0, "int8 channel's sum", depth);
        }
    }
    memset(sums, 0x55, sums_bytes);
    memset(want, 0x55, sums_bytes);
    if (dot->enter) dot->enter();
    dot->multiply(&tile, sums);
    if (dot->leave) dot->leave();
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < channels; ++c) {
            int32_t sum = 0;
            for (int64_t k = 0; k < depth; ++k) sum += x[i * stride + k] * w[c * depth + k];
            want[i * CLIPFT_INT8_COLS + c] = sum;
        }
    check_same(sums, want, sums_bytes, "int8_dot", depth);
    free(x), free(w), free(packed), free(sums), free(want);
}

/* What lies on users' disks and in their caches: the bytes of the layout, panel by panel. */
static void test_packed_bytes(void)
{
    enum { OUT = 17, IN = 6, DEPTH = 8, BYTES = DEPTH * CLIPFT_INT8_PANEL };
    int8_t w[OUT * IN];
    uint8_t packed[64 + 2 * (BYTES + 4 * CLIPFT_INT8_PANEL)];
    int64_t header[8];
    for (int k = 0; k < OUT * IN; ++k) w[k] = (int8_t)(k * 7 - 100);
    const clipft_int8_weights weights = {w, OUT, IN, IN, 1};
    if (clipft_kernel_table.int8.dot->layout != CLIPFT_INT8_QUADS) return;
    check_near((double)clipft_int8_packed_size(OUT, IN), (double)sizeof packed, 0.0, "int8_packed_size", IN);
    clipft_int8_pack(&check_host, &weights, packed);
    memcpy(header, packed, sizeof header);
    const int64_t want[8] = {0x38746e69, OUT, IN};
    check_same(header, want, sizeof want, "packed header", IN);
    for (int c = 0; c < 2 * CLIPFT_INT8_PANEL; ++c) {
        int32_t sum = 0, got;
        for (int k = 0; k < DEPTH; ++k) {
            const int8_t held = (int8_t)packed[64 + c / CLIPFT_INT8_PANEL * BYTES + k / 4 * 64 + c % CLIPFT_INT8_PANEL * 4 + k % 4];
            const int value = c < OUT && k < IN ? w[c * IN + k] : 0;
            check_near(held, value, 0.0, "packed weight", c);
            sum += value;
        }
        memcpy(&got, packed + 64 + 2 * BYTES + 4 * c, sizeof got);
        check_near(got, sum, 0.0, "packed sum", c);
    }
    packed[24] = 1; /* another layout */
    clipft_int8_header parsed;
    check_near(clipft_int8_packed(packed, sizeof packed, &parsed), 0.0, 0.0, "int8_packed of another layout", IN);
}

static void test_range(int64_t n, float spread, int64_t special, float value)
{
    float *x = floats(n);
    clipft_range got = {-0.5F, 0.25F, 0.0F}, want = got;
    for (int64_t j = 0; j < n; ++j) x[j] = uniform() * spread;
    if (special < n) x[special] = value;
    clipft_kernel_table.int8.row_range(x, n, &got);
    clipft_int8_row_range_ref(x, n, &want);
    check_near((double)got.bad, (double)want.bad, 0.0, "row_range bad", n);
    if (special >= n) {
        check_near((double)got.low, (double)want.low, 0.0, "row_range low", n);
        check_near((double)got.high, (double)want.high, 0.0, "row_range high", n);
    }
    free(x);
}

/* Among the values are exact halves, which go to even, and what has to be clamped. */
static void test_quantize(int64_t n, float inverse, int32_t zero)
{
    float *x = calloc((size_t)n + 1, sizeof *x);
    if (!x) abort();
    uint8_t *got = check_alloc(n, 1), *want = check_alloc(n, 1);
    for (int64_t j = 0; j < n; ++j) x[j] = (j % 3 ? uniform() * 80.0F : (float)pick(-300, 300) * 0.5F) / inverse;
    clipft_kernel_table.int8.row_quantize(x, n, inverse, zero, got);
    clipft_int8_row_quantize_ref(x, n, inverse, zero, want);
    check_same(got, want, (size_t)n, "row_quantize", n);
    for (int64_t j = 0; j < n; ++j) {
        const double level = nearbyint((double)(float)((double)x[j] * (double)inverse)) + zero;
        check_near(got[j], level < 0 ? 0 : level > 127 ? 127 : level, 0.0, "row_quantize level", n);
    }
    free(x), free(got), free(want);
}

static double activated(double v, clipft_activation activation)
{
    if (activation == CLIPFT_QUICK_GELU) return v / (1.0 + exp(-1.702 * v));
    if (activation == CLIPFT_GELU) return 0.5 * v * erfc(-v * sqrt(0.5));
    return v;
}

/* Four roundings before the activation, whose slope is at most 1.13; then quick_gelu's exponential (2 u and u |t| for its argument's
 * rounding), or gelu's erfc, whose formula errs by 0.75e-7 |v| and is evaluated with a few roundings of numbers below 1. */
static double tolerance(double v, double size, clipft_activation activation)
{
    const double before = 4.0 * u * size * 1.13;
    if (activation == CLIPFT_QUICK_GELU) return before + u * (8.0 + 4.0 * fabs(v)) * fabs(activated(v, activation)) + 1e-36;
    return activation == CLIPFT_GELU ? before + (1e-7 + 8.0 * u) * fabs(v) : before;
}

/* Every second time with a residual, which the results then replace. */
static void test_finish(int64_t rows, int64_t cols, clipft_activation activation, float spread)
{
    static bool residual;
    float row_scale[12], col_scale[CLIPFT_INT8_COLS], bias[CLIPFT_INT8_COLS];
    int32_t row_zero[12], col_sum[CLIPFT_INT8_COLS], sums[12 * CLIPFT_INT8_COLS] = {0};
    const int64_t stride = cols + 1;
    float *out = floats(rows * stride);
    for (int64_t i = 0; i < rows; ++i) row_scale[i] = fabsf(uniform()) * spread, row_zero[i] = pick(0, 127);
    for (int64_t j = 0; j < CLIPFT_INT8_COLS; ++j)
        col_scale[j] = uniform() * 1e-3F, col_sum[j] = pick(-98304, 98304), bias[j] = uniform() * spread;
    for (int64_t k = 0; k < rows * CLIPFT_INT8_COLS; ++k) sums[k] = pick(-500000, 500000);
    for (int64_t k = 0; k < rows * stride; ++k) out[k] = 7.0F;
    residual = !residual;
    const double before = residual ? 7.0 : 0.0;
    const clipft_int8_finish finish = {row_scale, row_zero, col_scale, col_sum, bias,   residual ? out : NULL,
                                       out,       rows,     cols,      stride,  stride, activation};
    clipft_kernel_table.int8.finish(&finish, sums);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
            const double sum = sums[i * CLIPFT_INT8_COLS + j] - (double)row_zero[i] * col_sum[j];
            const double product = sum * (double)row_scale[i] * (double)col_scale[j], v = product + (double)bias[j];
            const double want = activated(v, activation) + before, error = tolerance(v, fabs(product) + fabs(v), activation);
            check_near((double)out[i * stride + j], want, error + u * before * fabs(want), "int8_finish", cols);
        }
        check_near((double)out[i * stride + cols], 7.0, 0.0, "int8_finish wrote beyond the row", cols);
    }
    free(out);
}

/* What a huge or a bad row becomes: nothing but a limit of the function, or NaN. */
static void test_finish_specials(void)
{
    const float row_scale[] = {1.0F, -1.0F, NAN, 3e38F, -INFINITY};
    const int32_t row_zero[5] = {0}, col_sum[CLIPFT_INT8_COLS] = {0};
    const double want[3][5] = {
        {1.0, -1.0, NAN, 3e38, -INFINITY}, {0.8457957659, -0.1542042340, NAN, 3e38, 0.0}, {0.8413447461, -0.1586552539, NAN, 3e38, 0.0}};
    float col_scale[CLIPFT_INT8_COLS], bias[CLIPFT_INT8_COLS] = {0}, out[5 * CLIPFT_INT8_COLS];
    int32_t sums[5 * CLIPFT_INT8_COLS];
    for (int j = 0; j < CLIPFT_INT8_COLS; ++j) col_scale[j] = 1.0F;
    for (int k = 0; k < 5 * CLIPFT_INT8_COLS; ++k) sums[k] = 1;
    for (int activation = 0; activation < CLIPFT_ACTIVATIONS; ++activation) {
        const clipft_int8_finish finish = {.row_scale = row_scale,
                                           .row_zero = row_zero,
                                           .col_scale = col_scale,
                                           .col_sum = col_sum,
                                           .bias = bias,
                                           .out = out,
                                           .rows = 5,
                                           .cols = CLIPFT_INT8_COLS,
                                           .out_stride = CLIPFT_INT8_COLS,
                                           .activation = (clipft_activation)activation};
        clipft_kernel_table.int8.finish(&finish, sums);
        for (int k = 0; k < 5 * CLIPFT_INT8_COLS; ++k) {
            const double expected = want[activation][k / CLIPFT_INT8_COLS];
            check_near((double)out[k], expected, 1e-6 * fabs(expected), "int8_finish of specials", activation);
        }
    }
}

/* Mean and variance err by a few roundings of the row's largest value, however long it is: sums run in many lanes and double would not
 * tell. */
static void test_norm(int64_t n, float offset, float eps)
{
    float x[1040] = {0}, weight[1040] = {0}, bias[1040] = {0}, out[1040];
    double sum = 0.0, squares = 0.0, largest = 0.0;
    for (int64_t j = 0; j < n; ++j) x[j] = uniform() + offset, weight[j] = uniform(), bias[j] = uniform(), sum += (double)x[j];
    const double mean = sum / (double)n;
    for (int64_t j = 0; j < n; ++j) squares += pow((double)x[j] - mean, 2), largest = fmax(largest, fabs((double)x[j]));
    const double inverse = 1.0 / sqrt(squares / (double)n + (double)eps);
    clipft_kernel_table.int8.row_norm(x, n, weight, bias, eps, out);
    for (int64_t j = 0; j < n; ++j) {
        const double normed = ((double)x[j] - mean) * inverse, moved = (8.0 + (double)n / 32.0) * u * largest * inverse;
        const double error = moved * (1.0 + fabs(normed)) + 8.0 * u * fabs(normed);
        check_near((double)out[j], normed * (double)weight[j] + (double)bias[j],
                   error * fabs((double)weight[j]) + 2.0 * u * (1.0 + fabs(normed)), "row_norm", n);
    }
    clipft_kernel_table.int8.row_norm(x, n, weight, bias, eps, x);
    check_same(x, out, (size_t)n * sizeof *x, "row_norm in place", n);
}

/* ---- the driver ---- */

typedef struct layer_case {
    int64_t rows, in, out;
    clipft_activation activation;
    bool bias, transposed;
    clipft_float_kind kind;
} layer_case;

static const layer_case cases[] = {
    {1, 1, 1, CLIPFT_NO_ACTIVATION, true, false, CLIPFT_FLOAT32},    {0, 5, 7, CLIPFT_QUICK_GELU, true, false, CLIPFT_FLOAT32},
    {3, 4, 16, CLIPFT_QUICK_GELU, false, false, CLIPFT_FLOAT32},     {13, 63, 65, CLIPFT_GELU, true, false, CLIPFT_FLOAT32},
    {50, 64, 64, CLIPFT_NO_ACTIVATION, true, true, CLIPFT_FLOAT32},  {25, 130, 131, CLIPFT_GELU, true, false, CLIPFT_BFLOAT16},
    {12, 1030, 100, CLIPFT_QUICK_GELU, true, false, CLIPFT_FLOAT16}, {700, 600, 17, CLIPFT_NO_ACTIVATION, true, false, CLIPFT_FLOAT32},
    {7, 2050, 9, CLIPFT_NO_ACTIVATION, false, true, CLIPFT_BFLOAT16}};

typedef struct layer_data {
    clipft_view x, y, scale, bias;
    int8_t *w;
    uint8_t *packed;
} layer_data;

static clipft_view make_view(int64_t rows, int64_t cols, bool transposed, clipft_float_kind kind)
{
    const int64_t ld = transposed ? rows + 1 : cols + 3;
    clipft_view v = {check_alloc((transposed ? cols : rows) * ld, 4), rows, cols, transposed ? 1 : ld, transposed ? ld : 1, kind};
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
            const float value = uniform() + 0.3F;
            clipft_view_write(&v, i, j, 1, &value);
        }
    return v;
}

static double held(const clipft_view *v, int64_t i, int64_t j)
{
    float x;
    clipft_view_read(v, i, j, 1, &x);
    return (double)x;
}

static void pack(const int8_t *w, int64_t out, int64_t in, uint8_t *packed)
{
    const clipft_int8_weights weights = {w, out, in, in, 1};
    clipft_int8_pack(&check_host, &weights, packed);
}

/* Rows 2 and 5, where there are such, are bad; row 1 is zero; row 3 is huge, row 4 denormal. */
static void set_rows(const clipft_view *x)
{
    for (int64_t i = 1; i < x->rows && i < 6; ++i)
        for (int64_t j = 0; j < x->cols; ++j) {
            const float now = (float)held(x, i, j), big = x->kind == CLIPFT_FLOAT16 ? 6e4F : 3e38F;
            const float value = i == 1             ? 0.0F
                                : i == 3           ? (j % 2 ? -big : big)
                                : i == 4           ? now * 1e-39F
                                : j != x->cols / 2 ? now
                                : i == 2           ? NAN
                                                   : -INFINITY;
            clipft_view_write(x, i, j, 1, &value);
        }
}

/* Levels of a row by the definition; false where it holds what is not finite. */
static bool row_levels(const clipft_view *x, int64_t i, double *level, double *scale)
{
    float low = 0.0F, high = 0.0F;
    for (int64_t j = 0; j < x->cols; ++j) {
        const float v = (float)held(x, i, j);
        if (!isfinite(v)) return false;
        low = fminf(low, v), high = fmaxf(high, v);
    }
    const float step = fmaxf(high / 127.0F - low / 127.0F, FLT_MIN), inverse = 1.0F / step;
    const double zero = -nearbyint((double)(float)((double)low * (double)inverse));
    for (int64_t j = 0; j < x->cols; ++j) {
        const double q = nearbyint((double)(float)(held(x, i, j) * (double)inverse)) + zero;
        level[j] = (q > 127 ? 127 : q < 0 ? 0 : q) - zero;
    }
    *scale = (double)step;
    return true;
}

static void check_layer(const layer_case *c, const layer_data *d)
{
    const double rounding = c->kind == CLIPFT_BFLOAT16 ? 0x1p-8 : c->kind == CLIPFT_FLOAT16 ? 0x1p-11 : 0.0;
    const double largest = c->kind == CLIPFT_FLOAT16 ? 65504.0 : (double)FLT_MAX;
    double *level = doubles(c->in), scale = 0.0;
    for (int64_t i = 0; i < c->rows; ++i) {
        const bool good = row_levels(&d->x, i, level, &scale);
        for (int64_t j = 0; j < c->out; ++j) {
            double sum = 0.0, bias = c->bias ? held(&d->bias, 0, j) : 0.0;
            for (int64_t k = 0; good && k < c->in; ++k) sum += level[k] * d->w[j * c->in + k];
            const double product = sum * scale * held(&d->scale, 0, j), v = product + bias, want = activated(v, c->activation);
            const double got = held(&d->y, i, j), error = tolerance(v, fabs(product) + fabs(v), c->activation);
            if (!good)
                check_near(got, NAN, 0.0, "row with a NaN", c->in);
            else if (fabs(want) < largest * 0.99)
                check_near(got, want, error + rounding * (fabs(want) + error) + (rounding > 0.0 ? 0x1p-25 : 0.0), "int8_linear", c->in);
        }
    }
    free(level);
}

static void test_layer(const layer_case *c)
{
    const int64_t size = clipft_int8_packed_size(c->out, c->in);
    layer_data d = {.x = make_view(c->rows, c->in, c->transposed, c->kind),
                    .y = make_view(c->rows, c->out, c->transposed, c->kind),
                    .scale = make_view(1, c->out, false, CLIPFT_FLOAT32),
                    .bias = make_view(1, c->out, false, c->kind),
                    .w = check_alloc(c->out * c->in, 1),
                    .packed = check_alloc(size, 1)};
    set_rows(&d.x);
    for (int64_t j = 0; j < c->out; ++j)
        for (int64_t k = 0; k < c->in; ++k) d.w[j * c->in + k] = (int8_t)(j == 1 ? 0 : pick(-128, 127));
    pack(d.w, c->out, c->in, d.packed);
    clipft_int8_header header;
    check_near(clipft_int8_packed(d.packed, size, &header) && header.out == c->out && header.in == c->in, 1.0, 0.0, "int8_packed", size);
    check_near(!clipft_int8_packed(d.packed, size - 1, &header), 1.0, 0.0, "int8_packed of a part", size);
    const clipft_int8_layer layer = {d.packed, c->out, c->in, d.scale, c->bias ? d.bias : (clipft_view){0}, c->activation};
    const clipft_int8_chain chain = {.layers = {layer}, .count = 1};
    check_near(clipft_int8_run(&chain, &check_host, &d.x, &d.y), 1.0, 0.0, "int8_linear", size);
    check_layer(c, &d);
    free(d.x.data), free(d.y.data), free(d.scale.data), free(d.bias.data), free(d.w), free(d.packed);
}

/* What fuses norm, two layers and a residual, against the same one after the other: equal but for the rounding of 16-bit rows in between,
 * so exactly in float32. 200 rows go block by block, 9 by channels. */
static void test_chain(int64_t rows, clipft_float_kind kind, int count, bool norm, bool residual)
{
    enum { IN = 70, HIDDEN = 131, OUT = 67 };
    const int64_t sizes[] = {IN, HIDDEN, count > 1 ? OUT : HIDDEN};
    clipft_view x = make_view(rows, IN, false, kind), y = make_view(rows, sizes[2], false, kind),
                normed = make_view(rows, IN, false, CLIPFT_FLOAT32);
    const clipft_view hidden = make_view(rows, HIDDEN, false, CLIPFT_FLOAT32), want = make_view(rows, sizes[2], false, CLIPFT_FLOAT32);
    const clipft_view weight = make_view(1, IN, false, CLIPFT_FLOAT32), bias = make_view(1, IN, false, kind);
    const clipft_view scale = make_view(1, HIDDEN, false, CLIPFT_FLOAT32), added = make_view(rows, sizes[2], residual, kind);
    clipft_int8_chain chain = {.count = count, .norm_eps = 1e-5F};
    float row[IN], shift[IN];
    for (int k = 0; k < count; ++k) {
        const int64_t in = sizes[k], out = sizes[k + 1];
        int8_t *w = check_alloc(in * out, 1);
        uint8_t *packed = check_alloc(clipft_int8_packed_size(out, in), 1);
        for (int64_t j = 0; j < in * out; ++j) w[j] = (int8_t)pick(-128, 127);
        pack(w, out, in, packed);
        chain.layers[k] = (clipft_int8_layer){packed, out, in, scale, {0}, k + 1 < count ? CLIPFT_QUICK_GELU : CLIPFT_NO_ACTIVATION};
        free(w);
    }
    clipft_view_read(&bias, 0, 0, IN, shift);
    for (int64_t i = 0; i < rows; ++i) {
        clipft_view_read(&x, i, 0, IN, row);
        if (norm) clipft_kernel_table.int8.row_norm(row, IN, clipft_view_floats(&weight, 0, 0), shift, chain.norm_eps, row);
        clipft_view_write(&normed, i, 0, IN, row);
    }
    clipft_int8_chain first = {.layers = {chain.layers[0]}, .count = 1}, second = {.layers = {chain.layers[1]}, .count = 1};
    clipft_int8_run(&first, &check_host, &normed, count > 1 ? &hidden : &want);
    if (count > 1) clipft_int8_run(&second, &check_host, &hidden, &want);
    if (norm) chain.norm_weight = weight, chain.norm_bias = bias;
    if (residual) chain.residual = added;
    check_near(clipft_int8_run(&chain, &check_host, &x, &y), 1.0, 0.0, "int8_run", rows);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < sizes[2]; ++j) {
            const double sum = (double)(float)(held(&want, i, j) + (residual ? held(&added, i, j) : 0.0));
            check_near(held(&y, i, j), sum, kind == CLIPFT_BFLOAT16 ? 0x1p-8 * fabs(sum) : 0.0, "chain", rows);
        }
    for (int k = 0; k < count; ++k) free((void *)(uintptr_t)chain.layers[k].packed);
    free(x.data), free(y.data), free(normed.data), free(hidden.data), free(want.data), free(weight.data), free(bias.data);
    free(scale.data), free(added.data);
}

/* Sums as large as they get: in the middle they pass what 16 bits hold, and zero * column sum wraps. */
static void test_extremes(void)
{
    enum { IN = 4099, OUT = 33 };
    const clipft_view x = make_view(2, IN, false, CLIPFT_FLOAT32), y = make_view(2, OUT, false, CLIPFT_FLOAT32);
    const clipft_view scale = make_view(1, OUT, false, CLIPFT_FLOAT32);
    int8_t *w = check_alloc((int64_t)IN * OUT, 1);
    uint8_t *packed = check_alloc(clipft_int8_packed_size(OUT, IN), 1);
    for (int64_t j = 0; j < IN; ++j) clipft_view_floats(&x, 0, j)[0] = 127.0F, clipft_view_floats(&x, 1, j)[0] = -127.0F;
    for (int64_t k = 0; k < (int64_t)IN * OUT; ++k) w[k] = (int8_t)(k / IN % 2 ? -128 : 127);
    for (int64_t j = 0; j < OUT; ++j) clipft_view_floats(&scale, 0, j)[0] = 1.0F;
    pack(w, OUT, IN, packed);
    const clipft_int8_chain chain = {.layers = {{packed, OUT, IN, scale, {0}, CLIPFT_NO_ACTIVATION}}, .count = 1};
    clipft_int8_run(&chain, &check_host, &x, &y);
    for (int64_t i = 0; i < 2; ++i)
        for (int64_t j = 0; j < OUT; ++j)
            check_near(held(&y, i, j), (double)(float)((i ? -127 : 127) * (j % 2 ? -128 : 127) * (double)IN), 0.0, "extremes", IN);
    free(x.data), free(y.data), free(scale.data), free(w), free(packed);
}

void test_int8(void)
{
    const clipft_int8_dot *dot = clipft_kernel_table.int8.dot;
    static const int64_t depths[] = {0, 4, 8, 12, 60, 64, 68, 252, 1028}, heights[] = {0, 1, 2, 3, 4, 5, 6, 7, 11, 12};
    static const int64_t widths[] = {0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64};
    for (int d = 0; d < COUNT(depths); ++d)
        for (int h = 0; h < COUNT(heights); ++h)
            for (int64_t panels = 1; panels <= 4; ++panels)
                test_dot(heights[h], panels, clipft_round_up(depths[d], dot->depth), (d + h + (int)panels) % VALUES);
    for (int values = 0; values < VALUES; ++values) test_dot(dot->rows, 4, 8192, values);
    test_packed_bytes();
    for (int n = 0; n < COUNT(widths); ++n) {
        test_range(widths[n], 10.0F, 999, 0.0F);
        test_range(widths[n], 3e38F, widths[n] / 2, NAN);
        test_range(widths[n], 1e-40F, widths[n] - 1 < 0 ? 0 : widths[n] - 1, INFINITY);
        test_quantize(widths[n], 1.0F, 64);
        test_quantize(widths[n], 3.1415926F, 0);
        test_quantize(widths[n], 1.0e-30F, 127);
        test_norm(widths[n] + 1, 0.0F, 1e-5F);
        test_norm(widths[n] + 1, 20.0F, 1e-5F);
        for (int a = 0; a < CLIPFT_ACTIVATIONS; ++a) {
            test_finish(n % 13, widths[n], (clipft_activation)a, 0.01F);
            test_finish(12, widths[n], (clipft_activation)a, 1.0F);
            test_finish(1, widths[n], (clipft_activation)a, 10.0F);
        }
    }
    test_finish_specials();
    for (int c = 0; c < COUNT(cases); ++c) test_layer(&cases[c]);
    for (int k = 0; k < 16; ++k) {
        test_chain(200, k & 8 ? CLIPFT_BFLOAT16 : CLIPFT_FLOAT32, 1 + (k & 1), k & 2, k & 4);
        test_chain(9, k & 8 ? CLIPFT_BFLOAT16 : CLIPFT_FLOAT32, 1 + (k & 1), k & 2, k & 4);
    }
    test_norm(1030, 1.0F, 1e-5F);
    test_extremes();
}
