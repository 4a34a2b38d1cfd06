/* quantized_linear: y = act(x W^T + b) with int8 weights as they are saved; quantized_chain: one or two layers packed by quantized_pack,
 * with the norm before and the residual behind them; quantized_unpack: what was packed, [out, in]; quantized_weight: float weights as
 * codes, packed as they are and transposed, for a layer that trains. The work is kernels/int8/int8.h. */
#include "quantized_inputs.h"

#include <math.h>
#include <stdlib.h>

/* Everything checked: the product into a new tensor. */
static bool multiply(const int8_inputs *in, clipft_tensor *output, clipft_error *error)
{
    clipft_view y;
    return clipft_check_cpu(&in->input, error) && int8_make_output(in, output, &y, error) &&
           (clipft_int8_run(&in->chain, &clipft_torch_host, &in->x, &y) ||
            clipft_fail(error, CLIPFT_RUNTIME_ERROR, "out of memory, or torch's threads failed"));
}

static bool pack(const clipft_tensor *weight, uint8_t *packed, clipft_error *error)
{
    const clipft_int8_weights w = {weight->data, weight->size[0], weight->size[1], weight->stride[0], weight->stride[1]};
    return clipft_int8_pack(&clipft_torch_host, &w, packed) || clipft_fail(error, CLIPFT_RUNTIME_ERROR, "torch's threads failed");
}

static void run_quantized_linear(const quantized_linear_args *args, quantized_linear_results *results, clipft_error *error)
{
    int8_inputs in = {0};
    clipft_int8_layer *layer = in.chain.layers;
    clipft_tensor output = {0};
    uint8_t *packed = NULL;

    if (!int8_take_linear(&in, args, error) || !clipft_check_cpu(&in.input, error)) goto done;
    packed = malloc((size_t)clipft_int8_packed_size(layer->out, layer->in));
    layer->packed = packed;
    if (!packed)
        clipft_fail(error, CLIPFT_OUT_OF_MEMORY, "no memory for packed weights, [%lld, %lld]", (long long)layer->out, (long long)layer->in);
    else if (pack(&in.layers[0].weight, packed, error) && multiply(&in, &output, error))
        results->result = clipft_box(&output);
done:
    free(packed);
    clipft_release(&output);
    int8_inputs_free(&in);
}
CLIPFT_CPU_ENTRY(quantized_linear)

/* Beside itself where nothing else is there. */
bool int8_check_packed(const clipft_tensor *t, const clipft_tensor *input, clipft_int8_layer *layer, clipft_error *error)
{
    clipft_int8_header header;
    if (!clipft_check_dtype(t, clipft_dtype_uint8(), "uint8", error) || !clipft_check_cpu(t, error) ||
        !clipft_check_beside(t, input, error) || !clipft_check_dim(t, 1, "[bytes]", error))
        return false;
    if (t->stride[0] != 1 || !clipft_int8_packed(t->data, t->size[0], &header))
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be what quantized_pack gave", t->name);
    *layer = (clipft_int8_layer){.packed = t->data, .out = header.out, .in = header.in};
    return true;
}

static void run_quantized_chain(const quantized_chain_args *args, quantized_chain_results *results, clipft_error *error)
{
    int8_inputs in = {0};
    clipft_tensor output = {0};
    if (int8_take_chain(&in, args, int8_check_packed, error) && multiply(&in, &output, error)) results->result = clipft_box(&output);
    clipft_release(&output);
    int8_inputs_free(&in);
}
CLIPFT_CPU_ENTRY(quantized_chain)

static void run_quantized_pack(const quantized_pack_args *args, quantized_pack_results *results, clipft_error *error)
{
    clipft_tensor weight, packed = {0};
    clipft_int8_layer layer;
    int64_t size;

    if (!clipft_unbox(args->weight_int8, "weight_int8", &weight, error) || !int8_check_plain(&weight, &weight, &layer, error) ||
        !clipft_check_cpu(&weight, error))
        goto done;
    size = clipft_int8_packed_size(layer.out, layer.in);
    if (clipft_empty(clipft_dtype_uint8(), 1, &size, &packed, error) && pack(&weight, packed.data, error))
        results->result = clipft_box(&packed);
done:
    clipft_release(&packed);
    clipft_release(&weight);
}
CLIPFT_CPU_ENTRY(quantized_pack)

static void run_quantized_unpack(const quantized_unpack_args *args, quantized_unpack_results *results, clipft_error *error)
{
    const int64_t sizes[] = {clipft_unbox_int(args->channels), clipft_unbox_int(args->features)};
    clipft_tensor packed, weight = {0};
    clipft_int8_layer layer = {0};

    if (!clipft_unbox(args->packed, "packed", &packed, error) || !int8_check_packed(&packed, &packed, &layer, error)) goto done;
    if (layer.out != sizes[0] || layer.in != sizes[1])
        clipft_fail(error, CLIPFT_VALUE_ERROR, "packed must be of [%lld, %lld], got [%lld, %lld]", (long long)sizes[0], (long long)sizes[1],
                    (long long)layer.out, (long long)layer.in);
    else if (clipft_empty(clipft_dtype_int8(), 2, sizes, &weight, error) &&
             (clipft_int8_unpack(&clipft_torch_host, packed.data, weight.data) ||
              clipft_fail(error, CLIPFT_RUNTIME_ERROR, "torch's threads failed")))
        results->result = clipft_box(&weight);
done:
    clipft_release(&weight);
    clipft_release(&packed);
}
CLIPFT_CPU_ENTRY(quantized_unpack)

/* ---- float weights ---- */

typedef struct weight_results {
    clipft_tensor codes, packed, packed_t, scale;
} weight_results;

static void free_results(weight_results *r)
{
    clipft_release(&r->codes);
    clipft_release(&r->packed);
    clipft_release(&r->packed_t);
    clipft_release(&r->scale);
}

static bool check_weight(const clipft_tensor *t, clipft_view *w, clipft_error *error)
{
    char shape[96];
    if (!clipft_check_dtype(t, clipft_dtype_float32(), "float32", error) || !clipft_check_cpu(t, error)) return false;
    if (t->ndim != 2 || t->size[0] <= 0 || t->size[1] <= 0 || t->size[0] > CLIPFT_INT8_MAX_IN || t->size[1] > CLIPFT_INT8_MAX_IN)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "weight must be [out, in], each 1 to %d, got shape %s", CLIPFT_INT8_MAX_IN,
                           clipft_shape_text(t, shape, sizeof shape));
    if (!clipft_tensor_view(t, w) || w->col_stride != 1) return clipft_fail(error, CLIPFT_VALUE_ERROR, "weight must be contiguous");
    return true;
}

static bool make_results(const clipft_tensor *weight, weight_results *r, clipft_error *error)
{
    const int64_t out = weight->size[0], in = weight->size[1];
    const int64_t size = clipft_int8_packed_size(out, in), size_of_t = clipft_int8_packed_size(in, out);
    return clipft_empty(clipft_dtype_int8(), 2, weight->size, &r->codes, error) &&
           clipft_empty(clipft_dtype_uint8(), 1, &size, &r->packed, error) &&
           clipft_empty(clipft_dtype_uint8(), 1, &size_of_t, &r->packed_t, error) &&
           clipft_empty(clipft_dtype_float32(), 1, &out, &r->scale, error);
}

static bool quantize(const clipft_view *w, weight_results *r, clipft_error *error)
{
    const float *scale = r->scale.data;
    if (!clipft_int8_quantize(&clipft_torch_host, w, r->codes.data, r->scale.data))
        return clipft_fail(error, CLIPFT_RUNTIME_ERROR, "torch's threads failed");
    for (int64_t j = 0; j < w->rows; ++j)
        if (isnan(scale[j])) return clipft_fail(error, CLIPFT_VALUE_ERROR, "weight must be finite, got NaN or Inf in it");
    const clipft_int8_weights codes = {r->codes.data, w->rows, w->cols, w->cols, 1},
                              transposed = {r->codes.data, w->cols, w->rows, 1, w->cols};
    return (clipft_int8_pack(&clipft_torch_host, &codes, r->packed.data) &&
            clipft_int8_pack(&clipft_torch_host, &transposed, r->packed_t.data)) ||
           clipft_fail(error, CLIPFT_RUNTIME_ERROR, "torch's threads failed");
}

static void run_quantized_weight(const quantized_weight_args *args, quantized_weight_results *results, clipft_error *error)
{
    clipft_tensor weight;
    weight_results r = {0};
    clipft_view w;
    if (clipft_unbox(args->weight, "weight", &weight, error) && check_weight(&weight, &w, error) && make_results(&weight, &r, error) &&
        quantize(&w, &r, error))
        *results = (quantized_weight_results){clipft_box(&r.packed), clipft_box(&r.packed_t), clipft_box(&r.scale)};
    free_results(&r);
    clipft_release(&weight);
}
CLIPFT_CPU_ENTRY(quantized_weight)
