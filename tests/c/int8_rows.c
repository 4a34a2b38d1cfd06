/* The int8 micro-kernels: sums and quantised rows equal the reference's bit for bit at every shape around the tiles, on buffers of exact
 * size; results against float64. */
#include "int8.h"

#include "../../csrc/kernels/common/sizes.h"

enum { RANDOM, LARGEST, SMALLEST, ALTERNATING, BRIM, VALUES };

/* BRIM: four weights whose products with 127 just fit in 16 bits, here and there one that is too much. */
static int weight(int64_t k, int values)
{
    if (values == RANDOM) return pick(-128, 127);
    if (values == BRIM) return (k % 4 < 2 ? 1 : -1) * (64 + (int)(k % 2) + (pick(0, 299) == 0));
    return values == LARGEST ? 127 : values == SMALLEST || k % 2 ? -128 : 127;
}

static void fill_tile(uint8_t *x, int64_t n, int8_t *w, int64_t channels, int64_t depth, int values)
{
    for (int64_t k = 0; k < n; ++k) x[k] = (uint8_t)(values == RANDOM ? pick(0, 127) : 127);
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < depth; ++k) w[c * depth + k] = (int8_t)weight(k, values);
}

/* Channels as they are saved, packed by the slot itself, so that this knows nothing of its layout. */
static void test_dot(int64_t rows, int64_t panels, int64_t depth, int values)
{
    const clipft_int8_dot *dot = clipft_kernel_table.int8.dot;
    const int64_t stride = depth + 5, bytes = depth * CLIPFT_INT8_PANEL, w_stride = bytes + 64;
    const int64_t marks_bytes = clipft_int8_panel_marks(bytes), marks_stride = marks_bytes + 3;
    const int64_t channels = panels * CLIPFT_INT8_PANEL, x_size = rows > 0 ? (rows - 1) * stride + depth : 0;
    const size_t sums_bytes = (size_t)(rows * CLIPFT_INT8_COLS) * sizeof(int32_t);
    uint8_t *x = check_alloc(x_size, 1);
    int8_t *w = check_alloc(channels * depth, 1), *packed = check_alloc((panels - 1) * w_stride + bytes, 1);
    int32_t *sums = check_alloc(rows * CLIPFT_INT8_COLS, sizeof *sums), *want = check_alloc(rows * CLIPFT_INT8_COLS, sizeof *want);
    uint8_t *marks = check_alloc((panels - 1) * marks_stride + marks_bytes, 1);
    const clipft_int8_tile tile = {.x = x,
                                   .w = packed,
                                   .x_stride = stride,
                                   .w_stride = w_stride,
                                   .rows = rows,
                                   .panels = panels,
                                   .depth = depth,
                                   .marks = marks,
                                   .marks_stride = marks_stride,
                                   .ahead = packed,
                                   .ahead_panels = rows % 3};
    fill_tile(x, x_size, w, channels, depth, values);
    for (int64_t p = 0; p < panels; ++p) {
        const clipft_int8_weights part = {w + p * bytes, CLIPFT_INT8_PANEL, depth, depth, 1};
        int32_t got[CLIPFT_INT8_PANEL] = {0};
        memset(packed + p * w_stride, 0, (size_t)bytes);
        memset(marks + p * marks_stride, 0, (size_t)marks_bytes);
        dot->pack(&part, packed + p * w_stride, got);
        if (dot->mark) dot->mark(packed + p * w_stride, depth, marks + p * marks_stride);
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
    free(x), free(w), free(packed), free(marks), free(sums), free(want);
}

/* What lies on users' disks and in their caches: the bytes of the layout, panel by panel. */
static void test_packed_bytes(void)
{
    enum { OUT = 17, IN = 6, DEPTH = 8, BYTES = DEPTH * CLIPFT_INT8_PANEL };
    int8_t w[OUT * IN];
    uint8_t packed[64 + 2 * (BYTES + 4 * CLIPFT_INT8_PANEL + 1)];
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

static void test_scale(int64_t n)
{
    float *x = floats(n), *factor = floats(n), *out = floats(n), *want = floats(n);
    for (int64_t j = 0; j < n; ++j) x[j] = uniform(), factor[j] = uniform(), want[j] = x[j] * factor[j];
    clipft_kernel_table.int8.row_scale(x, n, factor, out);
    check_same(out, want, (size_t)n * sizeof *out, "row_scale", n);
    clipft_kernel_table.int8.row_scale(x, n, factor, x);
    check_same(x, want, (size_t)n * sizeof *x, "row_scale in place", n);
    free(x), free(factor), free(out), free(want);
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

/* Among the values are exact halves, which go to even. */
static void test_codes(int64_t n, float scale)
{
    float *x = calloc((size_t)n + 1, sizeof *x);
    if (!x) abort();
    int8_t *got = check_alloc(n, 1);
    for (int64_t j = 0; j < n; ++j) x[j] = (j % 3 ? uniform() * 127.0F : (float)pick(-254, 254) * 0.5F) * scale;
    clipft_kernel_table.int8.row_codes(x, n, scale, got);
    for (int64_t j = 0; j < n; ++j) check_near(got[j], nearbyint((double)(x[j] / scale)), 0.0, "row_codes", n);
    free(x), free(got);
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
    const double want[CLIPFT_ACTIVATIONS][5] = {{1.0, -1.0, NAN, 3e38, -INFINITY},
                                                {0.8457957659, -0.1542042340, NAN, 3e38, 0.0},
                                                {0.8413447461, -0.1586552539, NAN, 3e38, 0.0},
                                                {0.8411919906, -0.1588080094, NAN, 3e38, 0.0}};
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

void test_int8_rows(void)
{
    const clipft_int8_dot *dot = clipft_kernel_table.int8.dot;
    static const int64_t depths[] = {0, 4, 8, 12, 60, 64, 68, 252, 1028}, heights[] = {0, 1, 2, 3, 4, 5, 6, 7, 11, 12};
    static const int64_t widths[] = {0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64};
    for (int d = 0; d < COUNT(depths); ++d)
        for (int h = 0; h < COUNT(heights); ++h)
            for (int64_t panels = 1; panels <= 4; ++panels)
                test_dot(heights[h], panels, clipft_round_up(depths[d], dot->depth), (d + h + (int)panels) % VALUES);
    for (int values = 0; values < VALUES; ++values)
        test_dot(dot->rows, 4, 8192, values), test_dot(dot->rows - 1, 3, 2048 + 2 * dot->depth, values);
    test_packed_bytes();
    for (int n = 0; n < COUNT(widths); ++n) {
        test_scale(widths[n]);
        test_range(widths[n], 10.0F, 999, 0.0F);
        test_range(widths[n], 3e38F, widths[n] / 2, NAN);
        test_range(widths[n], 1e-40F, widths[n] - 1 < 0 ? 0 : widths[n] - 1, INFINITY);
        test_quantize(widths[n], 1.0F, 64);
        test_quantize(widths[n], 3.1415926F, 0);
        test_quantize(widths[n], 1.0e-30F, 127);
        test_codes(widths[n], 1.0F);
        test_codes(widths[n], 0.0131F);
        test_codes(widths[n], FLT_MIN);
        test_norm(widths[n] + 1, 0.0F, 1e-5F);
        test_norm(widths[n] + 1, 20.0F, 1e-5F);
        for (int a = 0; a < CLIPFT_ACTIVATIONS; ++a) {
            test_finish(n % 13, widths[n], (clipft_activation)a, 0.01F);
            test_finish(12, widths[n], (clipft_activation)a, 1.0F);
            test_finish(1, widths[n], (clipft_activation)a, 10.0F);
        }
    }
    test_finish_specials();
    test_norm(1030, 1.0F, 1e-5F);
}
