/* Each micro-kernel of the losses against float64, at sizes around every vector width, on buffers of exact size.
 *
 * Tolerances: u = 2^-24 is half an ulp. An exponential of argument t costs 2 u for itself and u |t| for the rounding of t; a sum of n terms
 * in float lanes at most n u of the sum of magnitudes. */
#include "check.h"

static const double u = 0x1p-24;
static const int64_t sizes[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 1023, 1024};
enum { SIZES = sizeof sizes / sizeof *sizes };

typedef struct row_case {
    const char *name;
    float scale, spread; /* x is uniform in [-spread, spread] */
    float special;       /* put at the row's middle unless 0 */
} row_case;

static const row_case cases[] = {
    {"unit", 1.0F, 1.0F, 0.0F},       {"scale 100", 100.0F, 1.0F, 0.0F}, {"negative scale", -14.3F, 1.0F, 0.0F},
    {"zero scale", 0.0F, 1.0F, 0.0F}, {"all equal", 50.0F, 0.0F, 0.0F},  {"wide", 100.0F, 10.0F, 0.0F},
    {"nan", 10.0F, 1.0F, NAN},        {"inf", 10.0F, 1.0F, INFINITY},
};
enum { CASES = sizeof cases / sizeof *cases };

static float *row_values(const row_case *c, int64_t n)
{
    float *x = floats(n);
    for (int64_t j = 0; j < n; ++j) x[j] = uniform() * c->spread;
    if (c->special != 0.0F && n > 0) x[n / 2] = c->special;
    return x;
}

/* What a sum with a NaN must be, whatever its tolerance. */
static bool special(const row_case *c, int64_t n) { return c->special != 0.0F && n > 0; }

static void test_exp_sum(const row_case *c, int64_t n)
{
    float *x = row_values(c, n), *col = floats(n);
    const float max = clipft_kernel_table.loss.row_max(x, n, c->scale), weight = 0.25F;
    double want = 0.0, size = 0.0, true_max = -INFINITY;
    for (int64_t j = 0; j < n; ++j) true_max = fmax(true_max, (double)(c->scale * x[j])), col[j] = 1.0F;
    check_near((double)max, true_max, 0.0, c->name, n);
    const double got = (double)clipft_kernel_table.loss.row_exp_sum(x, n, c->scale, max, weight, col);
    for (int64_t j = 0; j < n; ++j) {
        const double t = (double)c->scale * (double)x[j] - (double)max, e = exp(t);
        want += e;
        const double slack = fabs(t) + product_rounding * fabs((double)c->scale * (double)x[j]);
        size += e * (3.0 + slack);
        check_near((double)col[j], 1.0 + (double)weight * e, u * (4.0 + slack) + 1e-37, c->name, n);
    }
    check_near(got, want, u * (size + (double)n * want) + 1e-37 * (double)n, c->name, n); /* NaN where the maximum is Inf */
    free(x), free(col);
}

static void test_softmax_grad(const row_case *c, int64_t n)
{
    float *x = row_values(c, n), *out = floats(n), *factor = floats(n), *lse = floats(n), *own = floats(n);
    const double row_lse = (double)fabsf(c->scale) * (double)c->spread + 1.0;
    const clipft_softmax_row row = {c->scale, (float)row_lse, 1.25F, 0.5F, 3.0F, 0.125F};
    const clipft_softmax_cols cols = {lse, own};
    for (int64_t j = 0; j < n; ++j)
        factor[j] = 1.0F + uniform(), lse[j] = (float)row_lse + fabsf(uniform()), own[j] = 1.0F + 0.5F * uniform();
    for (int wide = 0; wide < 2; ++wide) {
        if (wide)
            clipft_kernel_table.loss.row_softmax_grad_wide(x, out, n, &row, &cols);
        else
            clipft_kernel_table.loss.row_softmax_grad(x, out, n, &row, factor);
        for (int64_t j = 0; j < n; ++j) {
            const double y = (double)c->scale * (double)x[j], t = y - (double)row.lse, s = y - (double)lse[j];
            const double p = wide ? (double)row.own * exp(t) + (double)own[j] * exp(s)
                                  : exp(t) * ((double)row.own + (double)row.cross * (double)factor[j]);
            const double tolerance =
                u * (3.0 * p * (8.0 + fabs(t) + (wide ? fabs(s) : 0.0) + 2.0 * product_rounding * fabs(y)) + 1.0) + 1e-29;
            if (isinf(x[j])) continue; /* +Inf never meets a finite logsumexp */
            check_near((double)out[j], 3.0 * p - 0.125, tolerance, c->name, n);
        }
    }
    free(x), free(out), free(factor), free(lse), free(own);
}

static void test_matches(const row_case *c, int64_t n)
{
    float *x = row_values(c, n), *y = row_values(c, n);
    int32_t *ids = check_alloc(n, sizeof *ids);
    double match = 0.0, total = 1.0, size = 1.0;
    float all = 1.0F;
    for (int64_t j = 0; j < n; ++j) {
        ids[j] = (int32_t)(j % 3);
        size += fabs((double)x[j]), total += (double)x[j], match += j % 3 == 1 ? (double)x[j] : 0.0;
        y[j] = x[j];
    }
    const double got = (double)clipft_kernel_table.loss.row_match_sum(x, n, ids, 1, &all);
    if (!isfinite(size)) size = 0.0; /* the sums are then exact: Inf or NaN, or finite where no match is special */
    for (int64_t j = 0; j < n; ++j) size += isfinite(x[j]) ? fabs((double)x[j]) : 0.0;
    check_near(got, match, u * (double)(n + 1) * size, c->name, n);
    check_near((double)all, total, u * (double)(n + 1) * size, c->name, n);
    clipft_kernel_table.loss.row_match_add(y, n, ids, 2, 0.5F);
    for (int64_t j = 0; j < n; ++j)
        if (isfinite(x[j])) check_near((double)y[j], (double)(x[j] + (j % 3 == 2 ? 0.5F : 0.0F)), 0.0, c->name, n);
    free(x), free(y), free(ids);
}

/* With ids every third element counts with the other sign. */
static void test_sigmoid(const row_case *c, int64_t n, bool labelled)
{
    float *x = row_values(c, n), *out = floats(n);
    int32_t *some = check_alloc(n, sizeof *some), *ids = labelled ? some : NULL;
    for (int64_t j = 0; j < n; ++j) some[j] = (int32_t)(j % 3);
    const float bias = -10.0F, gain = 0.5F;
    double loss = 0.0, size = 0.0, grad = 0.0, grad_size = 0.0;
    const double got = (double)clipft_kernel_table.loss.row_softplus_sum(x, n, c->scale, bias, ids, 1);
    const double got_grad = (double)clipft_kernel_table.loss.row_sigmoid_grad(x, out, n, c->scale, bias, gain, ids, 1);
    for (int64_t j = 0; j < n; ++j) {
        const double sign = labelled && j % 3 == 1 ? -1.0 : 1.0, z = sign * ((double)c->scale * (double)x[j] + (double)bias);
        const double f = fmax(z, 0.0) + log1p(exp(-fabs(z))), g = sign * (double)gain / (1.0 + exp(-z));
        loss += f, grad += g, grad_size += fabs(g);
        const double slack = fabs(z) + 2.0 * product_rounding * fabs((double)c->scale * (double)x[j]);
        size += f * (8.0 + slack);
        if (isfinite(x[j]))
            check_near((double)out[j], g, u * fabs(g) * (8.0 + slack) + 1e-30, c->name, n);
        else if (isnan(x[j]))
            check_near((double)out[j], NAN, 0.0, c->name, n);
    }
    if (isnan(c->special) && n > 0) {
        check_near(got, NAN, 0.0, c->name, n);
        check_near(got_grad, NAN, 0.0, c->name, n);
    } else if (!special(c, n)) {
        check_near(got, loss, u * (size + (double)n * loss) + 1e-37 * (double)n, c->name, n);
        check_near(got_grad, grad, u * (size + (double)(n + 120) * grad_size) + 1e-30 * (double)n, c->name, n);
    }
    free(x), free(out), free(some);
}

static void test_col_lse(const row_case *c, int64_t cols)
{
    const int64_t rows = 5, stride = cols + 3;
    float *x = row_values(c, rows * stride), *max = floats(cols), *sum = floats(cols);
    clipft_kernel_table.loss.block_col_lse(x, rows, cols, stride, c->scale, 2 - cols / 2, max, sum);
    for (int64_t j = 0; j < cols; ++j) {
        double m = -INFINITY, want = 0.0, size = 0.0;
        for (int64_t i = 0; i < rows; ++i)
            if (i != 2 - cols / 2 + j) m = fmax(m, (double)(c->scale * x[i * stride + j]));
        for (int64_t i = 0; i < rows; ++i) {
            if (i == 2 - cols / 2 + j) continue;
            const double t = (double)c->scale * (double)x[i * stride + j] - m;
            want += exp(t), size += exp(t) * (8.0 + fabs(t) + product_rounding * fabs((double)c->scale * (double)x[i * stride + j]));
        }
        check_near((double)max[j], m, 0.0, c->name, cols);
        check_near((double)sum[j], want, u * size + 1e-37, c->name, cols);
    }
    free(x), free(max), free(sum);
}

void test_loss_rows(void)
{
    for (int k = 0; k < CASES; ++k)
        for (int s = 0; s < SIZES; ++s) {
            test_exp_sum(&cases[k], sizes[s]);
            test_softmax_grad(&cases[k], sizes[s]);
            test_matches(&cases[k], sizes[s]);
            test_sigmoid(&cases[k], sizes[s], false);
            test_sigmoid(&cases[k], sizes[s], true);
            test_col_lse(&cases[k], sizes[s]);
        }
}
