/* The passes of a LoRA layer, without torch, against float64: shapes around the block, every rank, strides, 16-bit floats, dropout,
 * activation, and what is not wanted.
 *
 * Tolerances: u = 2^-24. v and u are sums of in (out) products, and what is made of them sums of r or of rows products more: n u of the sum
 * of magnitudes each. A 16-bit result adds half an ulp of itself. */
#include "check.h"

#include "../../csrc/kernels/lora/lora.h"

#include <string.h>

static const double u = 0x1p-24;

typedef struct lora_case {
    int64_t rows, in, out, rank;
    double p;
    bool quick_gelu, transposed, bias;
    clipft_float_kind kind, lora_kind;
} lora_case;

static const lora_case cases[] = {
    {1, 1, 1, 1, 0.0, false, false, true, 0, 0},
    {0, 5, 7, 2, 0.5, false, false, true, 0, 0},
    {3, 5, 7, 2, 0.0, false, false, false, 0, 0},
    {25, 17, 31, 3, 0.25, false, false, true, 0, 0},
    {24, 256, 257, 7, 0.0, true, false, true, 0, 0},
    {49, 300, 270, 8, 0.1, true, false, true, 0, 0},
    {50, 33, 512, 16, 0.0, false, true, true, 0, 0},
    {193, 100, 65, 17, 0.9, false, false, true, 0, 0},
    {400, 40, 24, 64, 0.3, false, true, true, 0, 0},
    {30, 130, 140, 128, 0.0, false, false, true, 0, 0},
    {27, 70, 90, 4, 0.0, false, false, true, CLIPFT_BFLOAT16, CLIPFT_FLOAT32},
    {27, 270, 90, 4, 0.2, true, false, true, CLIPFT_BFLOAT16, CLIPFT_BFLOAT16},
    {27, 70, 300, 16, 0.2, false, true, true, CLIPFT_FLOAT16, CLIPFT_FLOAT16},
};
enum { CASES = sizeof cases / sizeof *cases };

/* A random matrix and its values as the view's dtype holds them. */
typedef struct matrix {
    clipft_view view;
    double *value; /* [rows, cols] */
} matrix;

static double held(const clipft_view *v, int64_t i, int64_t j)
{
    float x;
    clipft_view_read(v, i, j, 1, &x);
    return (double)x;
}

static matrix make_matrix(int64_t rows, int64_t cols, clipft_float_kind kind, bool transposed)
{
    const int64_t ld = transposed ? rows + 1 : cols + 3;
    matrix m = {{check_alloc((transposed ? cols : rows) * ld, 4), rows, cols, transposed ? 1 : ld, transposed ? ld : 1, kind},
                doubles(rows * cols)};
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
            const float x = uniform();
            clipft_view_write(&m.view, i, j, 1, &x);
            m.value[i * cols + j] = held(&m.view, i, j);
        }
    return m;
}

static void free_matrix(matrix *m) { free(m->view.data), free(m->value); }

static double gelu(double x) { return x / (1.0 + exp(-1.702 * x)); }

static double gelu_slope(double x)
{
    const double s = 1.0 / (1.0 + exp(-1.702 * x));
    return s + 1.702 * x * s * (1.0 - s);
}

/* Half an ulp, relative, of a result. */
static double rounding(clipft_float_kind kind) { return kind == CLIPFT_BFLOAT16 ? 0x1p-8 : kind == CLIPFT_FLOAT16 ? 0x1p-11 : u; }

typedef struct lora_data {
    matrix x, a, b, dy, y, bias, d_x, d_a, d_b;
    double *xm, *v, *v_size, *u, *u_size; /* what the sums pass through */
    float *mask, *rank, *rank_grad;
    clipft_lora lora;
    int64_t padded;
} lora_data;

static void make_data(const lora_case *c, lora_data *d)
{
    d->x = make_matrix(c->rows, c->in, c->kind, c->transposed);
    d->dy = make_matrix(c->rows, c->out, c->kind, c->transposed);
    d->y = make_matrix(c->rows, c->out, c->kind, false);
    d->d_x = make_matrix(c->rows, c->in, c->kind, false);
    d->bias = make_matrix(1, c->out, c->kind, false);
    d->a = make_matrix(c->rank, c->in, c->lora_kind, c->transposed);
    d->b = make_matrix(c->out, c->rank, c->lora_kind, false);
    d->d_a = make_matrix(c->rank, c->in, c->lora_kind, false);
    d->d_b = make_matrix(c->out, c->rank, c->lora_kind, false);
    d->padded = clipft_lora_padded(c->rank);
    d->rank = floats(c->rows * d->padded), d->rank_grad = floats(c->rows * d->padded), d->mask = floats(c->rows * c->in);
    d->lora = (clipft_lora){.lora_a = d->a.view,
                            .lora_b = d->b.view,
                            .dropout = clipft_dropout_make(c->p, 42),
                            .scale = (float)(2.0 / (1.0 - c->p)),
                            .quick_gelu = c->quick_gelu};
    clipft_dropout_mask(&d->lora.dropout, &check_host, d->mask, c->rows, c->in);
    d->xm = doubles(c->rows * c->in);
    for (int64_t k = 0; k < c->rows * c->in; ++k) d->xm[k] = (double)d->mask[k] * (c->quick_gelu ? gelu(d->x.value[k]) : d->x.value[k]);
    d->v = doubles(c->rows * c->rank), d->v_size = doubles(c->rows * c->rank);
    d->u = doubles(c->rows * c->rank), d->u_size = doubles(c->rows * c->rank);
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t k = 0; k < c->rank; ++k) {
            double v = 0.0, v_size = 0.0, g = 0.0, g_size = 0.0;
            for (int64_t j = 0; j < c->in; ++j) {
                const double term = d->xm[i * c->in + j] * d->a.value[k * c->in + j];
                v += term, v_size += fabs(term);
            }
            for (int64_t j = 0; j < c->out; ++j) {
                const double term = (double)d->lora.scale * d->dy.value[i * c->out + j] * d->b.value[j * c->rank + k];
                g += term, g_size += fabs(term);
            }
            const int64_t at = i * c->rank + k;
            d->v[at] = v, d->v_size[at] = v_size, d->u[at] = g, d->u_size[at] = g_size;
        }
}

static void free_data(lora_data *d)
{
    matrix *all[] = {&d->x, &d->a, &d->b, &d->dy, &d->y, &d->bias, &d->d_x, &d->d_a, &d->d_b};
    for (unsigned k = 0; k < sizeof all / sizeof *all; ++k) free_matrix(all[k]);
    free(d->xm), free(d->v), free(d->v_size), free(d->u), free(d->u_size), free(d->mask), free(d->rank), free(d->rank_grad);
}

static void check_forward(const lora_case *c, const lora_data *d, bool with_bias)
{
    const double relative = u * (double)(c->in + c->rank + 16);
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t j = 0; j < c->out; ++j) {
            double want = with_bias ? (c->bias ? d->bias.value[j] : 0.0) : d->y.value[i * c->out + j], size = fabs(want);
            for (int64_t k = 0; k < c->rank; ++k) {
                const double factor = (double)d->lora.scale * d->b.value[j * c->rank + k];
                want += factor * d->v[i * c->rank + k], size += fabs(factor) * d->v_size[i * c->rank + k];
            }
            check_near(held(&d->y.view, i, j), want, relative * size + rounding(c->kind) * fabs(want), "y", c->rows);
        }
}

static void test_forward(const lora_case *c, lora_data *d)
{
    const clipft_view none = {0};
    matrix act = make_matrix(c->rows, c->in, c->kind, false);
    check_near(clipft_lora_down(&d->lora, &check_host, &d->x.view, c->quick_gelu ? &act.view : &none, d->rank), 1.0, 0.0, "down", c->rows);
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t k = 0; k < d->padded; ++k) {
            const int64_t at = i * c->rank + k;
            if (k < c->rank)
                check_near((double)d->rank[i * d->padded + k], d->v[at], u * (double)(c->in + 12) * d->v_size[at], "v", c->rows);
            else
                check_near((double)d->rank[i * d->padded + k], 0.0, 0.0, "v's pad", c->rows);
        }
    for (int64_t k = 0; c->quick_gelu && k < c->rows * c->in; ++k) {
        const double want = gelu(d->x.value[k]);
        check_near(held(&act.view, k / c->in, k % c->in), want, (u * 12.0 + rounding(c->kind)) * fabs(want), "activated", c->rows);
    }
    check_near(clipft_lora_up(&d->lora, &check_host, d->rank, NULL, &d->y.view), 1.0, 0.0, "up", c->rows);
    check_forward(c, d, false);
    check_near(clipft_lora_up(&d->lora, &check_host, d->rank, c->bias ? &d->bias.view : &none, &d->y.view), 1.0, 0.0, "up", c->rows);
    check_forward(c, d, true);
    free_matrix(&act);
}

static void check_sums(const lora_case *c, const lora_data *d)
{
    const double relative = u * (double)(c->rows + c->in + c->out + 16);
    for (int64_t k = 0; k < c->rank; ++k) {
        for (int64_t j = 0; j < c->in; ++j) {
            double want = 0.0, size = 0.0;
            for (int64_t i = 0; i < c->rows; ++i) {
                const double x = d->xm[i * c->in + j];
                want += d->u[i * c->rank + k] * x, size += d->u_size[i * c->rank + k] * fabs(x);
            }
            check_near(held(&d->d_a.view, k, j), want, relative * size + rounding(c->lora_kind) * fabs(want), "dA", c->rows);
        }
        for (int64_t j = 0; j < c->out; ++j) {
            double want = 0.0, size = 0.0;
            for (int64_t i = 0; i < c->rows; ++i) {
                const double g = (double)d->lora.scale * d->dy.value[i * c->out + j];
                want += g * d->v[i * c->rank + k], size += fabs(g) * d->v_size[i * c->rank + k];
            }
            check_near(held(&d->d_b.view, j, k), want, relative * size + rounding(c->lora_kind) * fabs(want), "dB", c->rows);
        }
    }
}

static void check_d_x(const lora_case *c, const lora_data *d, const double *before)
{
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t j = 0; j < c->in; ++j) {
            const int64_t at = i * c->in + j;
            double want = 0.0, size = 0.0;
            for (int64_t k = 0; k < c->rank; ++k) {
                const double a = (double)d->mask[at] * d->a.value[k * c->in + j];
                want += d->u[i * c->rank + k] * a, size += d->u_size[i * c->rank + k] * fabs(a);
            }
            if (before) {
                const double slope = c->quick_gelu ? gelu_slope(d->x.value[at]) : 1.0;
                want = (want + before[at]) * slope, size = (size + fabs(before[at])) * 1.2;
            }
            check_near(held(&d->d_x.view, i, j), want, u * (double)(c->out + c->rank + 24) * size + rounding(c->kind) * fabs(want), "dx",
                       c->rows);
        }
}

static void test_backward(const lora_case *c, lora_data *d)
{
    const clipft_view none = {0};
    const clipft_host *host = &check_host;
    bool ok = clipft_lora_gradient_up(&d->lora, host, &d->dy.view, d->rank, d->rank_grad, &d->d_b.view);
    ok &= clipft_lora_gradient_down(&d->lora, host, &d->x.view, d->rank_grad, &d->d_a.view, &d->d_x.view, true);
    check_near(ok, 1.0, 0.0, "backward", c->rows);
    check_sums(c, d);
    check_d_x(c, d, d->d_x.value);
    ok = clipft_lora_gradient_down(&d->lora, host, &d->x.view, d->rank_grad, &none, &d->d_x.view, false);
    check_near(ok, 1.0, 0.0, "dx alone", c->rows);
    check_d_x(c, d, NULL);
    ok = clipft_lora_gradient_up(&d->lora, host, &d->dy.view, d->rank, d->rank_grad, &none) &&
         clipft_lora_gradient_down(&d->lora, host, &d->x.view, d->rank_grad, &d->d_a.view, &none, false) &&
         clipft_lora_gradient_up(&d->lora, host, &d->dy.view, d->rank, NULL, &d->d_b.view);
    check_near(ok, 1.0, 0.0, "dA alone, dB alone", c->rows);
    check_sums(c, d);
}

static void test_column_sums(const lora_case *c, lora_data *d)
{
    check_near(clipft_column_sums(&check_host, &d->dy.view, &d->bias.view), 1.0, 0.0, "column sums", c->rows);
    for (int64_t j = 0; j < c->out; ++j) {
        double want = 0.0;
        for (int64_t i = 0; i < c->rows; ++i) want += d->dy.value[i * c->out + j];
        check_near(held(&d->bias.view, 0, j), want, (rounding(c->kind) + u) * fabs(want) + 1e-12, "column sums", c->rows);
    }
}

/* quick_gelu's own passes, in place and not. */
static void test_gelu_passes(const lora_case *c, const lora_data *d)
{
    matrix y = make_matrix(c->rows, c->in, c->kind, false);
    bool ok = clipft_quick_gelu(&check_host, &d->x.view, &y.view);
    for (int64_t k = 0; k < c->rows * c->in; ++k) {
        const double want = gelu(d->x.value[k]);
        check_near(held(&y.view, k / c->in, k % c->in), want, (u * 12.0 + rounding(c->kind)) * fabs(want), "quick_gelu", c->rows);
    }
    ok &= clipft_quick_gelu_backward(&check_host, &d->x.view, &d->x.view, &y.view);
    check_near(ok, 1.0, 0.0, "quick_gelu", c->rows);
    for (int64_t k = 0; k < c->rows * c->in; ++k) {
        const double want = d->x.value[k] * gelu_slope(d->x.value[k]);
        check_near(held(&y.view, k / c->in, k % c->in), want, u * 24.0 + rounding(c->kind) * fabs(want), "quick_gelu gradient", c->rows);
    }
    free_matrix(&y);
}

/* p out of 2^32 hashes are dropped, at both ends of p too. */
static void test_thresholds(void)
{
    check_near(clipft_dropout_make(0.0, 1).active, 0.0, 0.0, "no dropout", 0);
    check_near((double)clipft_dropout_make(0.5, 1).threshold, 0.0, 0.0, "p = 1/2", 0);
    check_near((double)clipft_dropout_make(1e-12, 1).threshold, -0x1p31, 0.0, "p near 0", 0);
    check_near((double)clipft_dropout_make(1.0 - 0x1p-53, 1).threshold, 0x1p31 - 1.0, 0.0, "p near 1", 0);
}

void test_lora(void)
{
    test_thresholds();
    for (int k = 0; k < CASES; ++k) {
        lora_data d;
        make_data(&cases[k], &d);
        test_forward(&cases[k], &d);
        test_backward(&cases[k], &d);
        test_column_sums(&cases[k], &d);
        test_gelu_passes(&cases[k], &d);
        free_data(&d);
    }
}
