/* The losses' drivers, without torch, against float64 over the whole matrix: shapes around the tile, shards, kept tiles, classes,
 * smoothing. */
#include "check.h"

#include "../../csrc/kernels/loss/loss.h"

typedef struct loss_case {
    int64_t rows, cols, dim, offset;
    float scale;
    int classes; /* 0: each pair its own */
    float smoothing;
    int64_t kept;   /* rows of tiles kept */
    bool collapsed; /* text i lies near image i, the others far: logsumexps far apart */
} loss_case;

static const loss_case cases[] = {
    {1, 1, 1, 0, 1.0F, 0, 0.0F, 0, false},
    {3, 3, 2, 0, 100.0F, 0, 0.0F, 3, false},
    {5, 9, 3, 2, 10.0F, 0, 0.1F, 0, false},
    {64, 64, 8, 0, 20.0F, 7, 0.0F, 64, false},
    {65, 130, 4, 65, 100.0F, 3, 0.2F, 65, false},
    {0, 4, 3, 4, 10.0F, 0, 0.0F, 0, false},
    {1023, 1023, 2, 0, 5.0F, 0, 0.0F, 0, false},
    {1025, 1025, 3, 0, 100.0F, 0, 0.0F, 1024, true},
    {1030, 1100, 2, 70, -3.0F, 50, 0.3F, 1024, false},
    {33, 33, 6, 0, 0.0F, 0, 0.0F, 33, false},
};
enum { CASES = sizeof cases / sizeof *cases };

typedef struct loss_data {
    clipft_logits logits;
    clipft_targets targets;
    float *image, *text, *kept, *weight;
    int32_t *ids;
    double *p; /* [rows, cols] logits, then what is made of them */
} loss_data;

static void make_data(const loss_case *c, loss_data *d)
{
    d->image = floats(c->rows * c->dim), d->text = floats(c->cols * c->dim);
    d->kept = floats(c->kept * c->cols), d->weight = floats(c->cols), d->p = doubles(c->rows * c->cols);
    d->ids = check_alloc(c->cols, sizeof *d->ids);
    for (int64_t j = 0; j < c->cols * c->dim; ++j) d->text[j] = uniform();
    for (int64_t i = 0; i < c->rows * c->dim; ++i) d->image[i] = c->collapsed ? 1.5F * d->text[c->offset * c->dim + i] : uniform();
    for (int64_t j = 0; j < c->cols; ++j) d->ids[j] = c->classes ? (int32_t)(j % c->classes) : (int32_t)j;
    for (int64_t j = 0; j < c->cols; ++j) {
        int64_t size = 0;
        for (int64_t k = 0; k < c->cols; ++k) size += d->ids[k] == d->ids[j];
        d->weight[j] = 1.0F / (float)size;
    }
    d->logits = (clipft_logits){
        {d->image, c->rows, c->dim, c->dim, 1}, {d->text, c->cols, c->dim, c->dim, 1}, c->offset, c->scale, d->kept, c->kept};
    d->targets = (clipft_targets){c->classes ? d->ids : NULL, c->classes ? d->weight : NULL, c->smoothing};
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t j = 0; j < c->cols; ++j) {
            float x = 0.0F; /* the same float products that the host makes: their rounding is not the driver's */
            for (int64_t k = 0; k < c->dim; ++k) x += d->image[i * c->dim + k] * d->text[j * c->dim + k];
            d->p[i * c->cols + j] = (double)c->scale * (double)x;
        }
}

static void free_data(loss_data *d) { free(d->image), free(d->text), free(d->kept), free(d->weight), free(d->ids), free(d->p); }

static double log_sum_exp(const double *x, int64_t n, int64_t stride)
{
    double max = -INFINITY, sum = 0.0;
    for (int64_t i = 0; i < n; ++i) max = fmax(max, x[i * stride]);
    for (int64_t i = 0; i < n; ++i) sum += exp(x[i * stride] - max);
    return max + log(sum);
}

static double target_at(const loss_data *d, const loss_case *c, int64_t i, int64_t j)
{
    const double own = d->ids[c->offset + i] == d->ids[j] ? (double)d->weight[j] : 0.0;
    return (1.0 - (double)c->smoothing) * own + (double)c->smoothing / (double)c->cols;
}

/* Gradients from dz [rows, cols], d loss / d logits, against the driver's. Errors are relative to the largest entry that the sums pass
 * through. */
static void check_gradients(const loss_data *d, const loss_case *c, const double *dz, const float *d_image, const float *d_text,
                            double d_scale, const char *what)
{
    const double u = 0x1p-24, scale = (double)c->scale;
    double ds = 0.0, size = 0.0;
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t k = 0; k < c->dim; ++k) {
            double want = 0.0, magnitude = 0.0;
            for (int64_t j = 0; j < c->cols; ++j) {
                const double term = dz[i * c->cols + j] * (double)d->text[j * c->dim + k];
                want += scale * term, magnitude += fabs(scale) * (fabs(term) + 1e-4 / (double)c->cols * 1e-2);
            }
            check_near((double)d_image[i * c->dim + k], want, u * 64.0 * (magnitude * (fabs(scale) + 8.0) + fabs(scale) / (double)c->cols),
                       what, c->rows);
            ds += want / (scale == 0.0 ? 1.0 : scale) * (double)d->image[i * c->dim + k];
            size += magnitude + fabs(scale) / (double)c->cols;
        }
    for (int64_t j = 0; j < c->cols; ++j)
        for (int64_t k = 0; k < c->dim; ++k) {
            double want = 0.0, magnitude = 0.0;
            for (int64_t i = 0; i < c->rows; ++i) {
                const double term = scale * dz[i * c->cols + j] * (double)d->image[i * c->dim + k];
                want += term, magnitude += fabs(term);
            }
            check_near((double)d_text[j * c->dim + k], want, u * 64.0 * (magnitude * (fabs(scale) + 8.0) + fabs(scale) / (double)c->cols),
                       what, c->cols);
        }
    if (scale != 0.0) check_near(d_scale, ds, u * 64.0 * size * (fabs(scale) + 8.0), what, c->rows);
}

static void test_contrastive(const loss_case *c)
{
    loss_data d;
    make_data(c, &d);
    double *row = doubles(c->rows), *col = doubles(c->cols), *dz = doubles(c->rows * c->cols), target = 0.0, want_target = 0.0,
           d_scale = 0.0;
    float *d_image = floats(c->rows * c->dim), *d_text = floats(c->cols * c->dim);
    const double u = 0x1p-24, grad = 0.75, n = (double)c->cols;
    const double lse_tolerance = u * (64.0 + product_rounding * 3.0 * fabs((double)c->scale) * (double)c->dim);

    check_near(clipft_contrastive_forward(&d.logits, &d.targets, &check_host, row, col, &target), 1.0, 0.0, "forward", c->rows);
    for (int64_t i = 0; i < c->rows; ++i) check_near(row[i], log_sum_exp(d.p + i * c->cols, c->cols, 1), lse_tolerance, "row lse", c->rows);
    for (int64_t j = 0; c->rows && j < c->cols; ++j)
        check_near(col[j], log_sum_exp(d.p + j, c->rows, c->cols), lse_tolerance, "col lse", c->rows);
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t j = 0; j < c->cols; ++j) want_target += target_at(&d, c, i, j) * d.p[i * c->cols + j];
    check_near(target, want_target, u * 16.0 * (double)(c->rows + 1) * (fabs((double)c->scale) * (double)c->dim + 1.0), "target", c->rows);

    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t j = 0; j < c->cols; ++j) {
            const double s = d.p[i * c->cols + j];
            dz[i * c->cols + j] = grad * (exp(s - row[i]) + exp(s - col[j]) - 2.0 * target_at(&d, c, i, j)) / (2.0 * n);
        }
    const clipft_matrix di = {d_image, c->rows, c->dim, c->dim, 1}, dt = {d_text, c->cols, c->dim, c->dim, 1};
    check_near(clipft_contrastive_backward(&d.logits, &d.targets, &check_host, row, col, grad, di, dt, &d_scale), 1.0, 0.0, "backward",
               c->rows);
    check_gradients(&d, c, dz, d_image, d_text, d_scale, "contrastive gradient");
    free(row), free(col), free(dz), free(d_image), free(d_text);
    free_data(&d);
}

static void test_sigmoid(const loss_case *c)
{
    loss_data d;
    make_data(c, &d);
    double *dz = doubles(c->rows * c->cols), loss = 0.0, want = 0.0, d_scale = 0.0, d_bias = 0.0, want_bias = 0.0, size = 0.0, alone = 0.0;
    float *d_image = floats(c->rows * c->dim), *d_text = floats(c->cols * c->dim);
    const double u = 0x1p-24, n = (double)c->cols, bias = -2.0;
    const clipft_sigmoid_terms terms = {(float)bias, d.targets.class_ids};

    const clipft_matrix di = {d_image, c->rows, c->dim, c->dim, 1}, dt = {d_text, c->cols, c->dim, c->dim, 1};
    const clipft_sigmoid_gradients grad = {di, dt, &d_scale, &d_bias};

    check_near(clipft_sigmoid(&d.logits, &terms, &check_host, &alone, NULL), 1.0, 0.0, "sigmoid without gradients", c->rows);
    check_near(clipft_sigmoid(&d.logits, &terms, &check_host, &loss, &grad), 1.0, 0.0, "sigmoid with gradients", c->rows);
    check_near(alone, loss, 0.0, "sigmoid loss without gradients", c->rows);
    for (int64_t i = 0; i < c->rows; ++i)
        for (int64_t j = 0; j < c->cols; ++j) {
            const bool pair = d.ids[j] == d.ids[c->offset + i];
            const double z = d.p[i * c->cols + j] + bias, signed_z = pair ? -z : z;
            const double f = fmax(signed_z, 0.0) + log1p(exp(-fabs(z)));
            want += f / n, size += f * (8.0 + fabs(z)) / n;
            dz[i * c->cols + j] = (pair ? -1.0 / (1.0 + exp(z)) : 1.0 / (1.0 + exp(-z))) / n;
            want_bias += dz[i * c->cols + j];
        }
    check_near(loss, want, u * (size + 1100.0 * want), "sigmoid loss", c->rows);
    check_near(d_bias, want_bias, u * 1200.0 * (size + 1.0), "sigmoid bias", c->rows);
    check_gradients(&d, c, dz, d_image, d_text, d_scale, "sigmoid gradient");
    free(dz), free(d_image), free(d_text);
    free_data(&d);
}

void test_losses(void)
{
    for (int k = 0; k < CASES; ++k) {
        test_contrastive(&cases[k]);
        test_sigmoid(&cases[k]);
    }
}
