/* The int8 layer with a LoRA branch, forward and backward, against float64 over the levels that the rows get by definition.
 *
 * Tolerances: u = 2^-24. Integer sums are exact, and four roundings stand behind them; the branch's are sums of in, out or rows products,
 * n u of the sum of magnitudes each, and rank more. A 16-bit result adds half an ulp of each rounding. */
#include "int8.h"

#include "../../csrc/kernels/int8/int8_lora.h"

typedef struct branch_case {
    int64_t rows, in, out, rank; /* rank 0: no branch */
    double p;
    bool quick_gelu, bias;
    clipft_float_kind kind;
} branch_case;

static const branch_case cases[] = {
    {1, 1, 1, 1, 0.0, false, true, CLIPFT_FLOAT32},       {3, 5, 7, 0, 0.0, false, false, CLIPFT_FLOAT32},
    {13, 63, 65, 3, 0.25, false, true, CLIPFT_FLOAT32},   {50, 130, 131, 0, 0.0, true, true, CLIPFT_FLOAT32},
    {200, 70, 96, 17, 0.5, true, true, CLIPFT_FLOAT32},   {25, 300, 40, 16, 0.0, true, false, CLIPFT_FLOAT32},
    {110, 40, 270, 8, 0.1, false, true, CLIPFT_BFLOAT16}, {27, 70, 90, 4, 0.2, true, true, CLIPFT_FLOAT16},
    {9, 31, 40, 0, 0.0, false, true, CLIPFT_BFLOAT16}};

typedef struct branch_data {
    clipft_view x, dy, y, scale, bias, a, b, d_x, d_bias, d_a, d_b;
    int8_t *w;
    uint8_t *packed, *packed_t;
    float *act, *mask, *v, *u;
    clipft_dropout dropout;
    float factor; /* of the branch */
} branch_data;

static double slope(const branch_case *c, double x)
{
    const double s = 1.0 / (1.0 + exp(-1.702 * x));
    return c->quick_gelu ? s + 1.702 * x * s * (1.0 - s) : 1.0;
}

static clipft_int8_lora make_layer(const branch_case *c, const branch_data *d, bool forward)
{
    const clipft_view none = {0};
    clipft_int8_lora l = {.lora = {.dropout = d->dropout, .scale = d->factor, .quick_gelu = c->quick_gelu}};
    if (c->rank > 0) l.lora.lora_a = d->a, l.lora.lora_b = d->b;
    if (forward)
        l.layer = (clipft_int8_layer){d->packed, c->out, c->in, d->scale, c->bias ? d->bias : none, CLIPFT_NO_ACTIVATION};
    else
        l.layer = (clipft_int8_layer){d->packed_t, c->in, c->out, none, none, CLIPFT_NO_ACTIVATION}, l.factor = d->scale;
    return l;
}

static double half_ulp(const branch_case *c) { return c->kind == CLIPFT_BFLOAT16 ? 0x1p-8 : c->kind == CLIPFT_FLOAT16 ? 0x1p-11 : 0.0; }

static void check_result(const branch_case *c, double got, double want, double size, int64_t n, const char *what)
{
    const double error = u * (double)(n + c->rank + 16) * size;
    check_near(got, want, error + 3.0 * half_ulp(c) * (fabs(want) + size / 4.0) + (half_ulp(c) > 0.0 ? 0x1p-24 : 0.0), what, c->in);
}

/* What the branch makes of row i: v = m . act(x) A^T, or u = factor dy B, with magnitudes behind. */
static void small_rows(const branch_case *c, const branch_data *d, int64_t i, double *v, double *u_row)
{
    for (int64_t k = 0; k < c->rank; ++k) {
        v[k] = v[c->rank + k] = u_row[k] = u_row[c->rank + k] = 0.0;
        for (int64_t j = 0; j < c->in; ++j) {
            const double term = (double)(d->mask[i * c->in + j] * d->act[i * c->in + j]) * held(&d->a, k, j);
            v[k] += term, v[c->rank + k] += fabs(term);
        }
        for (int64_t j = 0; j < c->out; ++j) {
            const double term = (double)d->factor * held(&d->dy, i, j) * held(&d->b, j, k);
            u_row[k] += term, u_row[c->rank + k] += fabs(term);
        }
    }
}

static void check_outputs(const branch_case *c, const branch_data *d, int64_t i, const double *v)
{
    const clipft_view act = {d->act, c->rows, c->in, c->in, 1, CLIPFT_FLOAT32};
    double *level = doubles(c->in), scale = 0.0;
    row_levels(&act, i, level, &scale);
    for (int64_t j = 0; j < c->out; ++j) {
        double sum = 0.0, want = c->bias ? held(&d->bias, 0, j) : 0.0, size = fabs(want);
        for (int64_t k = 0; k < c->in; ++k) sum += level[k] * d->w[j * c->in + k];
        want += sum * scale * held(&d->scale, 0, j), size += fabs(sum * scale * held(&d->scale, 0, j));
        for (int64_t k = 0; k < c->rank; ++k) {
            want += (double)d->factor * v[k] * held(&d->b, j, k);
            size += fabs((double)d->factor * v[c->rank + k] * held(&d->b, j, k));
        }
        check_result(c, held(&d->y, i, j), want, size, c->in, "int8_lora output");
    }
    free(level);
}

static void check_input_gradient(const branch_case *c, const branch_data *d, int64_t i, const double *u_row)
{
    clipft_view scaled = {floats(c->out), 1, c->out, c->out, 1, CLIPFT_FLOAT32};
    double *level = doubles(c->out), scale = 0.0;
    for (int64_t j = 0; j < c->out; ++j) *clipft_view_floats(&scaled, 0, j) = (float)(held(&d->dy, i, j) * held(&d->scale, 0, j));
    row_levels(&scaled, 0, level, &scale);
    for (int64_t j = 0; j < c->in; ++j) {
        double sum = 0.0, want, size;
        for (int64_t k = 0; k < c->out; ++k) sum += level[k] * d->w[k * c->in + j];
        want = sum * scale, size = fabs(want);
        for (int64_t k = 0; k < c->rank; ++k) {
            want += (double)d->mask[i * c->in + j] * u_row[k] * held(&d->a, k, j);
            size += fabs(u_row[c->rank + k] * held(&d->a, k, j));
        }
        if (c->rank == 0 && !c->quick_gelu && c->kind == CLIPFT_FLOAT32)
            check_near(held(&d->d_x, i, j), (double)((float)sum * (float)scale), 0.0, "int8 input gradient, exactly", c->in);
        want *= slope(c, held(&d->x, i, j)), size *= 1.2;
        check_result(c, held(&d->d_x, i, j), want, size, c->out, "int8_lora input gradient");
    }
    free(scaled.data), free(level);
}

static void check_sums(const branch_case *c, const branch_data *d, const double *v, const double *u_rows)
{
    for (int64_t j = 0; j < c->out; ++j) {
        double bias = 0.0, size = 0.0;
        for (int64_t i = 0; i < c->rows; ++i) bias += held(&d->dy, i, j), size += fabs(held(&d->dy, i, j));
        check_result(c, held(&d->d_bias, 0, j), bias, size, c->rows, "int8_lora bias gradient");
    }
    for (int64_t k = 0; k < c->rank; ++k) {
        for (int64_t j = 0; j < c->out; ++j) {
            double want = 0.0, size = 0.0;
            for (int64_t i = 0; i < c->rows; ++i) {
                want += (double)d->factor * held(&d->dy, i, j) * v[2 * c->rank * i + k];
                size += fabs((double)d->factor * held(&d->dy, i, j)) * v[2 * c->rank * i + c->rank + k];
            }
            check_result(c, held(&d->d_b, j, k), want, size, c->rows + c->in, "int8_lora lora_b gradient");
        }
        for (int64_t j = 0; j < c->in; ++j) {
            double want = 0.0, size = 0.0;
            for (int64_t i = 0; i < c->rows; ++i) {
                const double x = (double)(d->mask[i * c->in + j] * d->act[i * c->in + j]);
                want += u_rows[2 * c->rank * i + k] * x;
                size += u_rows[2 * c->rank * i + c->rank + k] * fabs(x);
            }
            check_result(c, held(&d->d_a, k, j), want, size, c->rows + c->out, "int8_lora lora_a gradient");
        }
    }
}

static void check_all(const branch_case *c, const branch_data *d)
{
    double *v = doubles(2 * c->rank * c->rows), *u_rows = doubles(2 * c->rank * c->rows);
    for (int64_t i = 0; i < c->rows; ++i) {
        const int64_t at = 2 * c->rank * i;
        small_rows(c, d, i, v + at, u_rows + at);
        check_outputs(c, d, i, v + at);
        check_input_gradient(c, d, i, u_rows + at);
    }
    check_sums(c, d, v, u_rows);
    free(v), free(u_rows);
}

static void pack_both(const branch_case *c, branch_data *d)
{
    const clipft_int8_weights plain = {d->w, c->out, c->in, c->in, 1}, transposed = {d->w, c->in, c->out, 1, c->in};
    for (int64_t k = 0; k < c->in * c->out; ++k) d->w[k] = (int8_t)pick(-127, 127);
    clipft_int8_pack(&check_host, &plain, d->packed);
    clipft_int8_pack(&check_host, &transposed, d->packed_t);
}

static void activate(const branch_case *c, const branch_data *d)
{
    for (int64_t i = 0; i < c->rows; ++i) {
        float *row = d->act + i * c->in;
        clipft_view_read(&d->x, i, 0, c->in, row);
        if (c->quick_gelu) clipft_kernel_table.lora.row_quick_gelu(row, row, c->in);
    }
    clipft_dropout_mask(&d->dropout, &check_host, d->mask, c->rows, c->in);
}

static void test_branch(const branch_case *c)
{
    const int64_t rank = c->rank > 0 ? c->rank : 1, padded = clipft_lora_padded(rank);
    branch_data d = {.x = make_view(c->rows, c->in, false, c->kind),
                     .dy = make_view(c->rows, c->out, false, c->kind),
                     .y = make_view(c->rows, c->out, false, c->kind),
                     .scale = make_view(1, c->out, false, CLIPFT_FLOAT32),
                     .bias = make_view(1, c->out, false, c->kind),
                     .a = make_view(rank, c->in, false, CLIPFT_FLOAT32),
                     .b = make_view(c->out, rank, false, CLIPFT_FLOAT32),
                     .d_x = make_view(c->rows, c->in, false, c->kind),
                     .d_bias = make_view(1, c->out, false, CLIPFT_FLOAT32),
                     .d_a = make_view(rank, c->in, false, CLIPFT_FLOAT32),
                     .d_b = make_view(c->out, rank, false, CLIPFT_FLOAT32),
                     .w = check_alloc(c->out * c->in, 1),
                     .packed = check_alloc(clipft_int8_packed_size(c->out, c->in), 1),
                     .packed_t = check_alloc(clipft_int8_packed_size(c->in, c->out), 1),
                     .act = floats(c->rows * c->in),
                     .mask = floats(c->rows * c->in),
                     .v = floats(c->rows * padded),
                     .u = floats(c->rows * padded),
                     .dropout = clipft_dropout_make(c->p, 77),
                     .factor = (float)(2.0 / (1.0 - c->p))};
    pack_both(c, &d);
    activate(c, &d);
    const clipft_int8_lora forward = make_layer(c, &d, true), backward = make_layer(c, &d, false);
    clipft_int8_lora_gradients wanted = {.x = d.d_x, .bias = d.d_bias};
    if (c->rank > 0) wanted.lora_a = d.d_a, wanted.lora_b = d.d_b;
    check_near(clipft_int8_lora_forward(&forward, &check_host, &d.x, d.v, &d.y), 1.0, 0.0, "int8_lora_forward", c->in);
    check_near(clipft_int8_lora_backward(&backward, &check_host, &d.x, &d.dy, d.v, d.u, &wanted), 1.0, 0.0, "int8_lora_backward", c->in);
    check_all(c, &d);
    free(d.x.data), free(d.dy.data), free(d.y.data), free(d.scale.data), free(d.bias.data), free(d.a.data), free(d.b.data);
    free(d.d_x.data), free(d.d_bias.data), free(d.d_a.data), free(d.d_b.data);
    free(d.w), free(d.packed), free(d.packed_t), free(d.act), free(d.mask), free(d.v), free(d.u);
}

void test_int8_lora(void)
{
    for (int k = 0; k < COUNT(cases); ++k) test_branch(&cases[k]);
}
