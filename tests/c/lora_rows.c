/* Each micro-kernel of LoRA and quick_gelu against float64, at ranks and widths around every tile, on buffers of exact size.
 *
 * Tolerances: u = 2^-24. A sum of n products in float, in any order, errs by at most (n + 1) u of the sum of magnitudes. */
#include "check.h"

#include <string.h>

static const double u = 0x1p-24;
static const int64_t ranks[] = {1, 2, 3, 7, 8, 16, 17, 64, 128};
static const int64_t widths[] = {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 100, 255, 256};
static const int64_t heights[] = {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 24};
#define COUNT(array) (int)(sizeof(array) / sizeof *(array))

static float *random_floats(int64_t n)
{
    float *x = calloc((size_t)(n > 0 ? n : 1), sizeof *x);
    if (!x) abort();
    for (int64_t k = 0; k < n; ++k) x[k] = uniform();
    return x;
}

static int64_t pad(int64_t n) { return (n + CLIPFT_RANK_PAD - 1) / CLIPFT_RANK_PAD * CLIPFT_RANK_PAD; }

/* v = x panel, on top of what v holds. */
static void test_down(int64_t rows, int64_t cols, int64_t rank)
{
    const int64_t padded = pad(rank), stride = cols + 3;
    float *x = random_floats(rows * stride), *panel = random_floats(cols * padded), *v = random_floats(rows * padded);
    double *want = doubles(rows * padded), *size = doubles(rows * padded);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < padded; ++k) {
            double sum = (double)v[i * padded + k], magnitude = fabs(sum);
            for (int64_t j = 0; j < cols; ++j) {
                const double term = (double)x[i * stride + j] * (double)panel[j * padded + k];
                sum += term, magnitude += fabs(term);
            }
            want[i * padded + k] = sum, size[i * padded + k] = magnitude;
        }
    clipft_kernel_table.lora.rank_down(x, stride, rows, cols, panel, padded, v, (clipft_ahead){cols % 2 ? x : NULL, stride});
    for (int64_t k = 0; k < rows * padded; ++k) check_near((double)v[k], want[k], u * (double)(cols + 2) * size[k], "rank_down", cols);
    free(x), free(panel), free(v), free(want), free(size);
}

/* out = init + m . v panel with one init row, or in place, and with a mask, or without. */
static void test_up(int64_t rows, int64_t cols, int64_t rank, bool in_place, bool masked)
{
    const int64_t padded = pad(rank), stride = cols + 1;
    float *v = random_floats(rows * padded), *panel = random_floats(rank * stride), *init = random_floats(cols);
    float *out = random_floats(rows * stride), *before = floats(rows * stride);
    int32_t *mask = check_alloc(rows * cols, sizeof *mask);
    memcpy(before, out, (size_t)(rows * stride) * sizeof *out);
    for (int64_t j = 0; j < rows * cols; ++j) mask[j] = j % 3 ? -1 : 0;
    const clipft_rank_tile tile = {.v = v,
                                   .panel = panel,
                                   .init = in_place ? out : init,
                                   .out = out,
                                   .mask = masked ? mask : NULL,
                                   .rows = rows,
                                   .cols = cols,
                                   .rank = rank,
                                   .padded = padded,
                                   .panel_stride = stride,
                                   .init_stride = in_place ? stride : 0,
                                   .out_stride = stride,
                                   .mask_stride = cols};
    clipft_kernel_table.lora.rank_up(&tile);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
            double sum = (double)(in_place ? before[i * stride + j] : init[j]), magnitude = fabs(sum);
            for (int64_t k = 0; k < rank && !(masked && !mask[i * cols + j]); ++k) {
                const double term = (double)v[i * padded + k] * (double)panel[k * stride + j];
                sum += term, magnitude += fabs(term);
            }
            check_near((double)out[i * stride + j], sum, u * (double)(rank + 2) * magnitude, "rank_up", cols);
        }
        check_near((double)out[i * stride + cols], (double)before[i * stride + cols], 0.0, "rank_up wrote beyond the row", cols);
    }
    free(v), free(panel), free(init), free(out), free(before), free(mask);
}

/* acc += v^T x. */
static void test_outer(int64_t rows, int64_t cols, int64_t rank)
{
    const int64_t padded = pad(rank), width = pad(cols);
    float *v = random_floats(rows * padded), *x = random_floats(rows * width), *acc = random_floats(padded * width);
    double *want = doubles(rank * width), *size = doubles(rank * width);
    for (int64_t k = 0; k < rank; ++k)
        for (int64_t j = 0; j < width; ++j) {
            double sum = (double)acc[k * width + j], magnitude = fabs(sum);
            for (int64_t i = 0; i < rows; ++i) {
                const double term = (double)v[i * padded + k] * (double)x[i * width + j];
                sum += term, magnitude += fabs(term);
            }
            want[k * width + j] = sum, size[k * width + j] = magnitude;
        }
    clipft_kernel_table.lora.rank_outer(v, padded, rows, rank, x, width, width, acc, width, (clipft_ahead){cols % 2 ? x : NULL, width});
    for (int64_t k = 0; k < rank * width; ++k) check_near((double)acc[k], want[k], u * (double)(rows + 2) * size[k], "rank_outer", cols);
    free(v), free(x), free(acc), free(want), free(size);
}

/* Every ISA makes the reference's bits, wherever a row is cut, in place and apart. */
static void test_dropout(int64_t n, bool in_place)
{
    const clipft_dropout_row row = {0x12345678U, 0x9abcdef0U, 1000, -1000000000};
    float *x = random_floats(n), *apart = floats(n), *out = in_place ? x : apart;
    int32_t *mask = check_alloc(n, sizeof *mask);
    for (int64_t j = 0; j < n; ++j) x[j] = 2.0F;
    clipft_kernel_table.lora.row_dropout(&row, x, out, mask, n);
    for (int64_t j = 0; j < n; ++j) {
        clipft_dropout_row at = row;
        int32_t kept;
        float one = 2.0F;
        at.col += (uint32_t)j;
        clipft_lora_row_dropout_ref(&at, &one, &one, &kept, 1);
        check_near((double)mask[j], (double)kept, 0.0, "row_dropout mask", n);
        check_near((double)out[j], kept ? 2.0 : 0.0, 0.0, "row_dropout", n);
        if (!in_place) check_near((double)x[j], 2.0, 0.0, "row_dropout's input", n);
    }
    free(x), free(apart), free(mask);
}

static void test_quick_gelu(int64_t n, float spread)
{
    float *x = random_floats(n), *dy = random_floats(n), *out = floats(n);
    for (int64_t j = 0; j < n; ++j) x[j] *= spread;
    clipft_kernel_table.lora.row_quick_gelu(x, out, n);
    for (int64_t j = 0; j < n; ++j) {
        const double z = 1.702 * (double)x[j], s = 1.0 / (1.0 + exp(-z)), want = (double)x[j] * s;
        check_near((double)out[j], want, u * (8.0 + 2.0 * fabs(z)) * fabs(want) + 1e-34, "quick_gelu", n);
    }
    clipft_kernel_table.lora.row_quick_gelu_grad(x, dy, out, n);
    for (int64_t j = 0; j < n; ++j) {
        const double z = 1.702 * (double)x[j], s = 1.0 / (1.0 + exp(-z)), s1 = 1.0 / (1.0 + exp(z));
        const double want = (double)dy[j] * (s + z * s * s1), magnitude = fabs((double)dy[j]) * (s + fabs(z) * s * s1);
        check_near((double)out[j], want, u * (12.0 + 3.0 * fabs(z)) * magnitude + 1e-34, "quick_gelu gradient", n);
    }
    free(x), free(dy), free(out);
}

static void test_quick_gelu_specials(void)
{
    enum { N = 37 };
    float x[N], dy[N], out[N];
    for (int j = 0; j < N; ++j) x[j] = (float)(j % 3 ? 1.0 : NAN), dy[j] = 1.0F;
    x[1] = INFINITY;
    clipft_kernel_table.lora.row_quick_gelu(x, out, N);
    for (int j = 0; j < N; ++j)
        check_near((double)out[j], j == 1 ? INFINITY : j % 3 ? 1.0 / (1.0 + exp(-1.702)) : NAN, 1e-6, "quick_gelu of specials", N);
    clipft_kernel_table.lora.row_quick_gelu_grad(x, dy, out, N);
    for (int j = 0; j < N; j += 3) check_near((double)out[j], NAN, 0.0, "quick_gelu gradient of NaN", N);
}

/* Far out the gradient is 1 or 0 to the last value, and what has overflowed downwards is NaN, as torch has it. */
static void test_quick_gelu_far(void)
{
    enum { N = 19 };
    float x[N], dy[N], out[N];
    for (int j = 0; j < N; ++j) x[j] = (j % 2 ? -1.0F : 1.0F) * powf(10.0F, (float)(2 * (j + 1))), dy[j] = 1.0F;
    clipft_kernel_table.lora.row_quick_gelu_grad(x, dy, out, N);
    for (int j = 0; j < N; ++j) check_near((double)out[j], j % 2 ? 0.0 : 1.0, 1e-30, "quick_gelu gradient far out", N);
    for (int j = 0; j < N; ++j) x[j] = -INFINITY;
    clipft_kernel_table.lora.row_quick_gelu(x, out, N);
    for (int j = 0; j < N; ++j) check_near((double)out[j], NAN, 0.0, "quick_gelu of -Inf", N);
}

void test_lora_rows(void)
{
    for (int w = 0; w < COUNT(widths); ++w) {
        for (int h = 0; h < COUNT(heights); ++h) {
            const int64_t rank = ranks[(w + h) % COUNT(ranks)];
            test_down(heights[h], widths[w], rank);
            for (int form = 0; form < 4; ++form) test_up(heights[h], widths[w], rank, form & 1, form & 2);
            test_outer(heights[h], widths[w], rank);
        }
        test_dropout(widths[w], true);
        test_dropout(widths[w], false);
        test_quick_gelu(widths[w], 1.0F);
        test_quick_gelu(widths[w], 30.0F);
        test_quick_gelu(widths[w], 200.0F);
    }
    for (int r = 0; r < COUNT(ranks); ++r) {
        test_down(13, 33, ranks[r]);
        test_up(13, 37, ranks[r], true, r % 2);
        test_outer(13, 33, ranks[r]);
    }
    test_quick_gelu_specials();
    test_quick_gelu_far();
}
