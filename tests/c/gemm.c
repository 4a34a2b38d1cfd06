/* clipft_gemm against float64 at sizes around every tile and block, on views of all layouts in buffers of exact size.
 *
 * Tolerance: a sum of n products in float, in any order, errs by at most (n + 1) u of the sum of magnitudes, u = 2^-24. */
#include "check.h"

#include "../../csrc/kernels/common/gemm.h"

#include <string.h>

/* [rows, cols] with `gap` floats between rows (between columns when transposed). */
static clipft_matrix matrix(int64_t rows, int64_t cols, int64_t gap, bool transposed)
{
    const int64_t lines = transposed ? cols : rows, line = transposed ? rows : cols, n = (lines - 1) * (line + gap) + line;
    clipft_matrix m = {floats(n), lines, line, line + gap, 1};
    for (int64_t k = 0; k < n; ++k) m.data[k] = uniform();
    return transposed ? clipft_transposed(m) : m;
}

static double at(clipft_matrix m, int64_t i, int64_t j) { return (double)m.data[i * m.row_stride + j * m.col_stride]; }

static void test_product(int64_t rows, int64_t cols, int64_t depth, int layout)
{
    const bool accumulate = layout & 1;
    clipft_matrix a = matrix(rows, depth, layout & 8 ? 3 : 0, layout & 2), b = matrix(depth, cols, layout & 8 ? 5 : 0, layout & 4);
    clipft_matrix c = matrix(rows, cols, layout & 8 ? 1 : 0, false);
    double *want = doubles(rows * cols), *size = doubles(rows * cols);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
            double sum = accumulate ? at(c, i, j) : 0.0, magnitude = fabs(sum);
            for (int64_t k = 0; k < depth; ++k) sum += at(a, i, k) * at(b, k, j), magnitude += fabs(at(a, i, k) * at(b, k, j));
            want[i * cols + j] = sum, size[i * cols + j] = magnitude;
            if (!accumulate) c.data[i * c.row_stride + j] = NAN; /* must not be read */
        }
    check_near((double)clipft_gemm(&check_host, c, a, b, accumulate), 1.0, 0.0, "gemm: result", depth);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j)
            check_near(at(c, i, j), want[i * cols + j], 0x1p-24 * (double)(depth + 2) * size[i * cols + j], "gemm", cols);
    free(a.data), free(b.data), free(c.data), free(want), free(size);
}

/* A NaN reaches its row, or its column, and no other. */
static void test_nan(void)
{
    clipft_matrix a = matrix(19, 40, 0, false), b = matrix(40, 35, 0, true), c = matrix(19, 35, 0, false);
    a.data[7 * 40 + 39] = NAN;
    b.data[33 * 40 + 1] = INFINITY;
    a.data[2 * 40 + 1] = 0.0F;
    clipft_gemm(&check_host, c, a, b, false);
    for (int64_t i = 0; i < 19; ++i)
        for (int64_t j = 0; j < 35; ++j) {
            const double x = at(c, i, j);
            const bool not_a_number = i == 7 || (i == 2 && j == 33);
            check_near(isnan(x) != 0, not_a_number, 0.0, "gemm: NaN", i);
            if (!not_a_number) check_near(isinf(x) != 0, j == 33, 0.0, "gemm: Inf", j);
        }
    free(a.data), free(b.data), free(c.data);
}

void test_gemm(void)
{
    static const int64_t sizes[] = {1, 2, 3, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 50, 65};
    const int count = (int)(sizeof sizes / sizeof *sizes);
    int layout = 0;
    for (int r = 0; r < count; ++r)
        for (int c = 0; c < count; ++c) test_product(sizes[r], sizes[c], sizes[(r * 5 + c) % count], layout++ % 16);
    for (layout = 0; layout < 16; ++layout)
        test_product(21, 37, CLIPFT_GEMM_DEPTH + 3 * layout - 8, layout), test_product(66, 130, 17, layout);
    test_product(9, 20, 2 * CLIPFT_GEMM_DEPTH + 1, 1);
    test_nan();
}
