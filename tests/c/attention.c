/* clipft_attention_run against float64, on views in buffers of exact size, at lengths and head sizes around every tile.
 *
 * Tolerance: a score errs by e = (dim + 3) u of the sum of its magnitudes, and by the rounding of its distance to the maximum; weights by
 * that, twice (they are divided by their sum), and the exponential's own 3 u; their sums over the keys by (length + 4) u. */
#include "check.h"

#include "../../csrc/kernels/attention/attention.h"

static const double u = 0x1p-24;

static double term(const clipft_attention *a, int64_t b, int64_t i, int64_t part, int64_t h, int64_t d)
{
    return (double)*clipft_view_floats(&a->qkv, b * a->length + i, (part * a->heads + h) * a->dim + d);
}

/* Row i of head h in float64, and for each column a bound of the error; `p` has room for the length. */
static void want_row(const clipft_attention *a, int64_t b, int64_t h, int64_t i, double *p, double *want, double *bound)
{
    const int64_t keys = a->causal ? i + 1 : a->length;
    double max = -INFINITY, least = INFINITY, sum = 0.0, error = 0.0;
    for (int64_t j = 0; j < keys; ++j) {
        double dot = 0.0, size = 0.0;
        for (int64_t d = 0; d < a->dim; ++d) {
            const double product = term(a, b, i, 0, h, d) * term(a, b, j, 1, h, d) * (double)a->scale;
            dot += product, size += fabs(product);
        }
        p[j] = dot, max = fmax(max, dot), least = fmin(least, dot), error = fmax(error, (double)(a->dim + 3) * u * size);
    }
    for (int64_t j = 0; j < keys; ++j) sum += p[j] = exp(p[j] - max);
    for (int64_t d = 0; d < a->dim; ++d) {
        double size = 0.0;
        want[d] = 0.0;
        for (int64_t j = 0; j < keys; ++j)
            want[d] += p[j] / sum * term(a, b, j, 2, h, d), size += p[j] / sum * fabs(term(a, b, j, 2, h, d));
        bound[d] = (2.0 * (error + u * (max - least)) + (double)(keys + 10) * u) * size + 1e-37;
    }
}

static void test_shape(int64_t batch, int64_t length, int64_t heads, int64_t dim, int64_t queries, bool causal, float spread)
{
    const int64_t width = heads * dim, rows = batch * length, out_rows = batch * queries, stride = 3 * width + 5, out_stride = width + 3;
    float *in = floats(rows * stride), *out = floats(out_rows * out_stride);
    double *p = doubles(length), *want = doubles(dim), *bound = doubles(dim);
    for (int64_t k = 0; k < rows * stride; ++k) in[k] = k % stride < 3 * width ? uniform() * spread : NAN;
    for (int64_t k = 0; k < out_rows * out_stride; ++k) out[k] = 7.0F;
    const clipft_attention a = {{in, rows, 3 * width, stride, 1, CLIPFT_FLOAT32},
                                {out, out_rows, width, out_stride, 1, CLIPFT_FLOAT32},
                                batch,
                                length,
                                heads,
                                dim,
                                queries,
                                1.0F / sqrtf((float)dim),
                                causal};
    check_near(clipft_attention_run(&a, &check_host), 1.0, 0.0, "attention: result", length);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < queries; ++i) {
            const float *row = out + (b * queries + i) * out_stride;
            for (int64_t h = 0; h < heads; ++h) {
                want_row(&a, b, h, i, p, want, bound);
                for (int64_t d = 0; d < dim; ++d) check_near((double)row[h * dim + d], want[d], bound[d], "attention", length);
            }
            for (int64_t d = width; d < out_stride; ++d) check_near((double)row[d], 7.0, 0.0, "attention wrote beyond the row", length);
        }
    free(in), free(out), free(p), free(want), free(bound);
}

/* A NaN in a token reaches those that attend to it, in its own head only; weights that vanish do not bring it back. */
static void test_nan(bool causal)
{
    enum { LENGTH = 21, HEADS = 2, DIM = 18, BAD = 8, WIDTH = HEADS * DIM };
    float in[2 * LENGTH * 3 * WIDTH], out[2 * LENGTH * WIDTH];
    for (int k = 0; k < 2 * LENGTH * 3 * WIDTH; ++k) in[k] = uniform();
    for (int part = 1; part < 3; ++part) in[BAD * 3 * WIDTH + part * WIDTH + DIM + 3] = part == 1 ? NAN : INFINITY;
    const clipft_attention a = {{in, 2 * LENGTH, 3 * WIDTH, 3 * WIDTH, 1, CLIPFT_FLOAT32},
                                {out, 2 * LENGTH, WIDTH, WIDTH, 1, CLIPFT_FLOAT32},
                                2,
                                LENGTH,
                                HEADS,
                                DIM,
                                LENGTH,
                                0.25F,
                                causal};
    clipft_attention_run(&a, &check_host);
    for (int i = 0; i < 2 * LENGTH; ++i)
        for (int k = 0; k < WIDTH; ++k) {
            const bool bad = i < LENGTH && k >= DIM && (!causal || i >= BAD);
            check_near(isnan(out[i * WIDTH + k]) != 0, bad, 0.0, "attention: NaN", i);
        }
}

void test_attention(void)
{
    static const int64_t lengths[] = {1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 31, 33, 50, 63, 64, 65, 77, 81, 130};
    static const int64_t dims[] = {1, 3, 8, 15, 16, 17, 33, 48, 64, 65, 80, 128};
    enum { LENGTHS = sizeof lengths / sizeof *lengths, DIMS = sizeof dims / sizeof *dims };
    for (int k = 0; k < LENGTHS; ++k)
        for (int causal = 0; causal < 2; ++causal) {
            const int64_t n = lengths[k];
            test_shape(2, n, 2, dims[(k + causal) % DIMS], n, causal, 2.0F);
            test_shape(1, n, 3, 64, n > 1 ? n / 2 : 1, causal, 1.0F);
        }
    for (int k = 0; k < DIMS; ++k) test_shape(1, 37, 2, dims[k], k % 2 ? 37 : 1, k % 3 == 0, 1.0F);
    test_shape(1, 70, 1, 64, 70, false, 20.0F); /* scores far apart: one weight takes all */
    test_shape(0, 5, 2, 8, 5, false, 1.0F);
    test_shape(2, 5, 2, 8, 0, false, 1.0F);
    test_nan(false);
    test_nan(true);
}
