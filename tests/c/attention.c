/* clipft_attention_run and clipft_attention_grad against float64, on views in buffers of exact size, at lengths and head sizes around every
 * tile.
 *
 * Tolerance: a score errs by e = (dim + 3) u of the sum of its magnitudes, and by the rounding of its distance to the maximum; weights by
 * that, twice (they are divided by their sum), and the exponential's own 3 u; sums over n terms by (n + 2) u of their magnitudes, and by
 * what the terms carry in. */
#include "check.h"

#include "../../csrc/kernels/attention/attention.h"

#include <string.h>

static const double u = 0x1p-24;

enum { QUERY, KEY, VALUE, GRAD, PARTS };

/* A head in float64. */
typedef struct head {
    int64_t rows, length, dim;
    double scale;
    bool causal;
    double *x[PARTS];         /* [rows or length, dim] */
    double *p, *ds, *ds_size; /* [rows, length]: weights, and gradients of the scores with a bound of their error */
    double *error;            /* [rows], relative, of weights */
} head;

static int64_t rows_of(const head *h, int part) { return part == KEY || part == VALUE ? h->length : h->rows; }

static double dot(const double *a, const double *b, int64_t n, double *size)
{
    double sum = 0.0;
    *size = 0.0;
    for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k], *size += fabs(a[k] * b[k]);
    return sum;
}

static void weights(head *h, int64_t i)
{
    const int64_t keys = h->causal ? i + 1 : h->length;
    double *p = h->p + i * h->length, max = -INFINITY, least = INFINITY, sum = 0.0, error = 0.0, size;
    for (int64_t j = 0; j < keys; ++j) {
        p[j] = h->scale * dot(h->x[QUERY] + i * h->dim, h->x[KEY] + j * h->dim, h->dim, &size);
        max = fmax(max, p[j]), least = fmin(least, p[j]), error = fmax(error, (double)(h->dim + 3) * u * size * h->scale);
    }
    for (int64_t j = 0; j < keys; ++j) sum += p[j] = exp(p[j] - max);
    for (int64_t j = 0; j < h->length; ++j) p[j] = j < keys ? p[j] / sum : 0.0;
    h->error[i] = 2.0 * (error + u * (max - least)) + (double)(keys + 10) * u;
}

static void score_gradients(head *h, int64_t i)
{
    const double *p = h->p + i * h->length, error = h->error[i];
    double *ds = h->ds + i * h->length, *bound = h->ds_size + i * h->length, mean = 0.0, mean_error = 0.0, size;
    for (int64_t j = 0; j < h->length; ++j) {
        ds[j] = dot(h->x[GRAD] + i * h->dim, h->x[VALUE] + j * h->dim, h->dim, &size);
        bound[j] = (double)(h->dim + 1) * u * size;
        mean += p[j] * ds[j], mean_error += p[j] * (bound[j] + (error + (double)(h->length + 4) * u) * fabs(ds[j]));
    }
    for (int64_t j = 0; j < h->length; ++j) {
        bound[j] = h->scale * p[j] * ((error + 4.0 * u) * fabs(ds[j] - mean) + bound[j] + mean_error);
        ds[j] = h->scale * p[j] * (ds[j] - mean);
    }
}

/* got = a b: a [rows, terms], whose element (i, k) lies at a[i * row + k * step] with an error as b's columns lie in `a_error`. */
static void check_product(const clipft_view *got, const double *a, const double *a_error, int64_t row, int64_t step, int64_t terms,
                          const double *b, int64_t dim, const char *what)
{
    for (int64_t i = 0; i < got->rows; ++i)
        for (int64_t d = 0; d < dim; ++d) {
            double want = 0.0, bound = 1e-37;
            for (int64_t k = 0; k < terms; ++k) {
                const double weight = a[i * row + k * step], factor = b[k * dim + d];
                want += weight * factor;
                bound += (a_error[i * row + k * step] + (double)(terms + 2) * u * fabs(weight)) * fabs(factor);
            }
            check_near((double)*clipft_view_floats(got, i, d), want, bound, what, terms);
        }
}

/* Results of one head, in views of it alone: the forward pass's, and the three gradients. */
static void check_head(head *h, const clipft_view got[PARTS])
{
    const int64_t n = h->rows * h->length, length = h->length;
    double *p_error = doubles(n);
    for (int64_t i = 0; i < h->rows; ++i) {
        weights(h, i);
        score_gradients(h, i);
        for (int64_t j = 0; j < length; ++j) p_error[i * length + j] = h->error[i] * h->p[i * length + j];
    }
    check_product(&got[GRAD], h->p, p_error, length, 1, length, h->x[VALUE], h->dim, "attention");
    check_product(&got[QUERY], h->ds, h->ds_size, length, 1, length, h->x[KEY], h->dim, "attention: gradient of queries");
    check_product(&got[KEY], h->ds, h->ds_size, 1, length, h->rows, h->x[QUERY], h->dim, "attention: gradient of keys");
    check_product(&got[VALUE], h->p, p_error, 1, length, h->rows, h->x[GRAD], h->dim, "attention: gradient of values");
    free(p_error);
}

/* A matrix of all heads, `beyond` floats between its rows. */
typedef struct operand {
    float *data;
    int64_t size, stride;
    clipft_view view;
} operand;

static operand make_operand(int64_t rows, int64_t width, int64_t beyond, float spread)
{
    operand o = {floats(rows * (width + beyond)), rows * (width + beyond), width + beyond, {0}};
    for (int64_t k = 0; k < o.size; ++k) o.data[k] = spread == 0.0F ? 7.0F : k % o.stride < width ? uniform() * spread : NAN;
    o.view = (clipft_view){o.data, rows, width, o.stride, 1, CLIPFT_FLOAT32};
    return o;
}

static clipft_view view_of_head(clipft_view all, int64_t rows, int64_t batch, int64_t index, int64_t dim)
{
    const clipft_view own = clipft_view_transposed(clipft_view_rows(all, batch * rows, (batch + 1) * rows));
    return clipft_view_transposed(clipft_view_rows(own, index * dim, (index + 1) * dim));
}

static void test_shape(int64_t batch, int64_t queries, int64_t length, int64_t heads, int64_t dim, bool causal, float spread)
{
    const int64_t width = heads * dim;
    head h = {.rows = queries, .length = length, .dim = dim, .causal = causal};
    operand in[PARTS], out[PARTS]; /* out[GRAD]: the forward pass's result */
    for (int part = 0; part < PARTS; ++part) {
        in[part] = make_operand(batch * rows_of(&h, part), width, 5, part == GRAD ? 1.0F : spread);
        out[part] = make_operand(batch * rows_of(&h, part), width, 3, 0.0F);
        h.x[part] = doubles(rows_of(&h, part) * dim);
    }
    h.p = doubles(queries * length), h.ds = doubles(queries * length), h.ds_size = doubles(queries * length), h.error = doubles(queries);
    const clipft_attention a = {in[QUERY].view, in[KEY].view, in[VALUE].view,           batch, queries, length,
                                heads,          dim,          1.0F / sqrtf((float)dim), causal};
    const clipft_attention_grads grads = {out[QUERY].view, out[KEY].view, out[VALUE].view};
    h.scale = (double)a.scale;
    check_near(clipft_attention_run(&a, &out[GRAD].view, &check_host), 1.0, 0.0, "attention: result", length);
    check_near(clipft_attention_grad(&a, &in[GRAD].view, &grads, &check_host), 1.0, 0.0, "attention: gradient's result", length);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t k = 0; k < heads; ++k) {
            clipft_view got[PARTS];
            for (int part = 0; part < PARTS; ++part) {
                const clipft_view from = view_of_head(in[part].view, rows_of(&h, part), b, k, dim);
                got[part] = view_of_head(out[part].view, rows_of(&h, part), b, k, dim);
                for (int64_t i = 0; i < from.rows; ++i)
                    for (int64_t d = 0; d < dim; ++d) h.x[part][i * dim + d] = (double)*clipft_view_floats(&from, i, d);
            }
            check_head(&h, got);
        }
    for (int part = 0; part < PARTS; ++part) {
        for (int64_t k = 0; k < out[part].size; ++k)
            if (k % out[part].stride >= width) check_near((double)out[part].data[k], 7.0, 0.0, "attention wrote beyond the row", length);
        free(in[part].data), free(out[part].data), free(h.x[part]);
    }
    free(h.p), free(h.ds), free(h.ds_size), free(h.error);
}

/* A NaN in a token reaches those that attend to it, in its own head only; weights that vanish do not bring it back. Gradients: its head. */
static void test_nan(bool causal)
{
    enum { LENGTH = 21, HEADS = 2, DIM = 18, BAD = 8, WIDTH = HEADS * DIM, ALL = 2 * LENGTH * WIDTH };
    static float in[PARTS][ALL], out[PARTS][ALL];
    for (int k = 0; k < PARTS * ALL; ++k) in[k / ALL][k % ALL] = uniform();
    in[KEY][BAD * WIDTH + DIM + 3] = NAN, in[VALUE][BAD * WIDTH + DIM + 3] = INFINITY;
    clipft_view views[2][PARTS];
    for (int part = 0; part < PARTS; ++part) {
        views[0][part] = (clipft_view){in[part], 2 * LENGTH, WIDTH, WIDTH, 1, CLIPFT_FLOAT32};
        views[1][part] = (clipft_view){out[part], 2 * LENGTH, WIDTH, WIDTH, 1, CLIPFT_FLOAT32};
    }
    const clipft_attention a = {views[0][QUERY], views[0][KEY], views[0][VALUE], 2, LENGTH, LENGTH, HEADS, DIM, 0.25F, causal};
    const clipft_attention_grads grads = {views[1][QUERY], views[1][KEY], views[1][VALUE]};
    clipft_attention_run(&a, &views[1][GRAD], &check_host);
    clipft_attention_grad(&a, &views[0][GRAD], &grads, &check_host);
    for (int i = 0; i < 2 * LENGTH; ++i)
        for (int k = 0; k < WIDTH; ++k) {
            const bool its_head = i < LENGTH && k >= DIM, bad = its_head && (!causal || i >= BAD);
            check_near(isnan(out[GRAD][i * WIDTH + k]) != 0, bad, 0.0, "attention: NaN", i);
            for (int part = 0; part < GRAD; ++part)
                if (!its_head) check_near(isnan(out[part][i * WIDTH + k]) != 0, 0.0, 0.0, "attention: NaN in a gradient", i);
            if (bad) check_near(isnan(out[QUERY][i * WIDTH + k]) != 0, 1.0, 0.0, "attention: NaN in its gradient", i);
        }
}

void test_attention(void)
{
    static const int64_t lengths[] = {1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 31, 33, 50, 59, 60, 61, 63, 64, 65, 77, 81, 130};
    static const int64_t dims[] = {1, 3, 8, 15, 16, 17, 33, 48, 64, 65, 80, 128};
    enum { LENGTHS = sizeof lengths / sizeof *lengths, DIMS = sizeof dims / sizeof *dims };
    for (int k = 0; k < LENGTHS; ++k)
        for (int causal = 0; causal < 2; ++causal) {
            const int64_t n = lengths[k];
            test_shape(2, n, n, 2, dims[(k + causal) % DIMS], causal, 2.0F);
            test_shape(1, n > 1 ? n / 2 : 1, n, 3, 64, causal, 1.0F);
        }
    for (int k = 0; k < DIMS; ++k) test_shape(1, k % 2 ? 37 : 1, 37, 2, dims[k], k % 3 == 0, 1.0F);
    test_shape(1, 70, 70, 1, 64, false, 10.0F); /* scores far apart: one weight takes all */
    test_shape(1, 70, 9, 1, 64, false, 1.0F);
    test_shape(0, 5, 5, 2, 8, false, 1.0F);
    test_shape(2, 0, 5, 2, 8, false, 1.0F);
    test_nan(false);
    test_nan(true);
}
