/* The driver over the int8 kernels against float64: shapes around its blocks, dtypes, chains, and a slot that multiplies otherwise. */
#include "int8.h"

#include "../../csrc/kernels/common/sizes.h"

#include <float.h>

typedef struct layer_case {
    int64_t rows, in, out;
    clipft_activation activation;
    bool bias, transposed;
    clipft_float_kind kind;
} layer_case;

static const layer_case cases[] = {
    {1, 1, 1, CLIPFT_NO_ACTIVATION, true, false, CLIPFT_FLOAT32},     {0, 5, 7, CLIPFT_QUICK_GELU, true, false, CLIPFT_FLOAT32},
    {3, 4, 16, CLIPFT_QUICK_GELU, false, false, CLIPFT_FLOAT32},      {13, 63, 65, CLIPFT_GELU, true, false, CLIPFT_FLOAT32},
    {50, 64, 64, CLIPFT_NO_ACTIVATION, true, true, CLIPFT_FLOAT32},   {25, 130, 131, CLIPFT_GELU, true, false, CLIPFT_BFLOAT16},
    {12, 1030, 100, CLIPFT_QUICK_GELU, true, false, CLIPFT_FLOAT16},  {700, 600, 17, CLIPFT_NO_ACTIVATION, true, false, CLIPFT_FLOAT32},
    {7, 2050, 9, CLIPFT_NO_ACTIVATION, false, true, CLIPFT_BFLOAT16}, {21, 70, 77, CLIPFT_GELU_TANH, true, false, CLIPFT_FLOAT32}};

typedef struct layer_data {
    clipft_view x, y, scale, bias;
    int8_t *w;
    uint8_t *packed;
} layer_data;

static void pack(const int8_t *w, int64_t out, int64_t in, uint8_t *packed)
{
    const clipft_int8_weights weights = {w, out, in, in, 1};
    int8_t *back = check_alloc(out * in, 1);
    clipft_int8_pack(&check_host, &weights, packed);
    check_near(clipft_int8_unpack(&check_host, packed, back) && memcmp(back, w, (size_t)(out * in)) == 0, 1.0, 0.0, "int8_unpack", in);
    free(back);
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

/* Packed as a transpose, element by element what a copy of the transpose is. */
static void test_transposed(int64_t out, int64_t in)
{
    const int64_t size = clipft_int8_packed_size(in, out);
    int8_t *w = check_alloc(out * in, 1), *copy = check_alloc(out * in, 1), *apart = check_alloc(2 * out * in, 1);
    uint8_t *packed[3];
    for (int64_t j = 0; j < out; ++j)
        for (int64_t k = 0; k < in; ++k) w[j * in + k] = copy[k * out + j] = apart[2 * (j * in + k)] = (int8_t)pick(-128, 127);
    const clipft_int8_weights views[] = {{copy, in, out, out, 1}, {w, in, out, 1, in}, {apart, in, out, 2, 2 * in}};
    for (int k = 0; k < 3; ++k) {
        packed[k] = check_alloc(size, 1);
        clipft_int8_pack(&check_host, &views[k], packed[k]);
        check_same(packed[k], packed[0], (size_t)size, "int8_pack of a transpose", in);
    }
    free(w), free(copy), free(apart), free(packed[0]), free(packed[1]), free(packed[2]);
}

/* Channel 1 is zero, 2 denormal, 3 huge, 4 holds what is not finite. */
static void test_quantize(int64_t out, int64_t in)
{
    const clipft_view w = make_view(out, in, false, CLIPFT_FLOAT32);
    int8_t *codes = check_alloc(out * in, 1);
    float *scale = floats(out);
    for (int64_t j = 1; j < out && j < 4; ++j)
        for (int64_t k = 0; k < in; ++k) *clipft_view_floats(&w, j, k) *= j == 1 ? 0.0F : j == 2 ? 1e-42F : 2e38F;
    if (out > 4) *clipft_view_floats(&w, 4, in / 2) = in % 2 ? NAN : -INFINITY;
    check_near(clipft_int8_quantize(&check_host, &w, codes, scale), 1.0, 0.0, "int8_quantize", in);
    for (int64_t j = 0; j < out; ++j) {
        float largest = 0.0F;
        for (int64_t k = 0; k < in; ++k) largest = fmaxf(largest, fabsf(*clipft_view_floats(&w, j, k)));
        const float step = largest / 127.0F, want = step > 0.0F ? fmaxf(step, FLT_MIN) : 1.0F;
        check_near((double)scale[j], j == 4 ? NAN : (double)want, 0.0, "int8_quantize's scale", in);
        for (int64_t k = 0; k < in && j != 4; ++k)
            check_near(codes[j * in + k], nearbyint((double)(*clipft_view_floats(&w, j, k) / want)), 0.0, "int8_quantize's codes", in);
    }
    free(w.data), free(codes), free(scale);
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

/* ---- a slot that multiplies otherwise ---- */

enum { OTHER_LAYOUT = 99, OTHER_DEPTH = 64 };

static int entered;

static void enter(void) { ++entered; }
static void leave(void) { --entered; }

static void pack_channels(const clipft_int8_weights *w, int8_t *panel, int32_t *sums)
{
    for (int64_t c = 0; c < w->out; ++c)
        for (int64_t k = 0; k < w->in; ++k) {
            const int8_t value = w->data[c * w->row_stride + k * w->col_stride];
            panel[c * clipft_round_up(w->in, OTHER_DEPTH) + k] = value;
            sums[c] += value;
        }
}

static void unpack_channels(const int8_t *panel, int64_t channels, int64_t in, int8_t *w)
{
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < in; ++k) w[c * in + k] = panel[c * clipft_round_up(in, OTHER_DEPTH) + k];
}

static void multiply_channels(const clipft_int8_tile *tile, int32_t *sums)
{
    check_near(entered, 1.0, 0.0, "int8_dot outside of enter and leave", tile->rows);
    for (int64_t i = 0; i < tile->rows; ++i)
        for (int64_t c = 0; c < tile->panels * CLIPFT_INT8_PANEL; ++c) {
            const int8_t *w = tile->w + c / CLIPFT_INT8_PANEL * tile->w_stride + c % CLIPFT_INT8_PANEL * tile->depth;
            int32_t sum = 0;
            for (int64_t k = 0; k < tile->depth; ++k) sum += tile->x[i * tile->x_stride + k] * w[k];
            sums[i * CLIPFT_INT8_COLS + c] = sum;
        }
}

/* With other rows, depth and layout, and a state of the CPU, the driver gives what it gives with the slot of this ISA. */
static void test_other_slot(int64_t rows)
{
    static const clipft_int8_dot other = {.layout = (clipft_int8_layout)OTHER_LAYOUT,
                                          .depth = OTHER_DEPTH,
                                          .rows = CLIPFT_INT8_ROWS,
                                          .pack = pack_channels,
                                          .unpack = unpack_channels,
                                          .multiply = multiply_channels,
                                          .enter = enter,
                                          .leave = leave};
    enum { IN = 70, OUT = 131 };
    const clipft_int8_dot *const slots[] = {clipft_kernel_table.int8.dot, &other};
    const clipft_view x = make_view(rows, IN, false, CLIPFT_FLOAT32), scale = make_view(1, OUT, false, CLIPFT_FLOAT32);
    const clipft_view y[] = {make_view(rows, OUT, false, CLIPFT_FLOAT32), make_view(rows, OUT, false, CLIPFT_FLOAT32)};
    int8_t w[IN * OUT];
    for (int k = 0; k < IN * OUT; ++k) w[k] = (int8_t)pick(-128, 127);
    for (int k = 0; k < 2; ++k) {
        clipft_int8_header header;
        clipft_kernel_table.int8.dot = slots[k];
        test_transposed(37, 70);
        const int64_t size = clipft_int8_packed_size(OUT, IN);
        uint8_t *packed = check_alloc(size, 1);
        pack(w, OUT, IN, packed);
        check_near(clipft_int8_packed(packed, size, &header), 1.0, 0.0, "int8_packed of a slot", rows);
        const clipft_int8_chain chain = {.layers = {{packed, OUT, IN, scale, {0}, CLIPFT_GELU}}, .count = 1};
        check_near(clipft_int8_run(&chain, &check_host, &x, &y[k]), 1.0, 0.0, "int8_run", rows);
        check_near(entered, 0.0, 0.0, "int8 leave", rows);
        clipft_kernel_table.int8.dot = slots[0];
        check_near(clipft_int8_packed(packed, size, &header), k == 0, 0.0, "int8_packed for another slot", rows);
        free(packed);
    }
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < OUT; ++j) check_near(held(&y[1], i, j), held(&y[0], i, j), 0.0, "another slot", rows);
    free(x.data), free(scale.data), free(y[0].data), free(y[1].data);
}

void test_int8(void)
{
    for (int c = 0; c < COUNT(cases); ++c) test_layer(&cases[c]);
    for (int k = 0; k < 16; ++k) {
        test_chain(200, k & 8 ? CLIPFT_BFLOAT16 : CLIPFT_FLOAT32, 1 + (k & 1), k & 2, k & 4);
        test_chain(9, k & 8 ? CLIPFT_BFLOAT16 : CLIPFT_FLOAT32, 1 + (k & 1), k & 2, k & 4);
    }
    for (int64_t n = 1; n < 70; n += 11) test_transposed(n, 34), test_transposed(34, n), test_quantize(n, 34), test_quantize(17, n);
    test_extremes();
    test_other_slot(9);
    test_other_slot(200);
}
