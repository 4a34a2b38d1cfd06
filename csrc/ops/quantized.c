/* quantized_linear: y = act(x W^T + b) with int8 weights, either as they are saved or packed by quantized_pack. The work is kernels/int8.h.
 */
#include "../kernels/int8.h"
#include "../tensor.h"
#include "ops.h"

#include <stdlib.h>
#include <string.h>

typedef struct int8_inputs {
    clipft_tensor input, weight, scale, bias; /* weight: [out, in] int8, or packed */
    clipft_view x;                            /* [rows, in] */
    clipft_int8_layer layer;
    int64_t out, in;
} int8_inputs;

/* ---- checks: clipft/quantized.py has the same words ---- */

static bool check_input(const clipft_tensor *t, clipft_error *error)
{
    char shape[96];
    if (!clipft_is_float(t))
        return clipft_fail(error, "%s must be float32, bfloat16 or float16, got %s", t->name, clipft_dtype_name(t->dtype));
    if (!clipft_check_cpu(t, error)) return false;
    if (t->ndim < 1 || t->ndim > CLIPFT_MAX_DIM || t->size[t->ndim - 1] == 0)
        return clipft_fail(error, "input must be [..., in] with in > 0 and at most %d dimensions, got shape %s", CLIPFT_MAX_DIM,
                           clipft_shape_text(t, shape, sizeof shape));
    return true;
}

static bool check_weight(const clipft_tensor *t, clipft_error *error)
{
    char shape[96];
    if (!clipft_check_dtype(t, clipft_torch.aoti_torch_dtype_int8(), "int8", error) || !clipft_check_cpu(t, error)) return false;
    if (t->ndim == 2 && t->size[0] > 0 && t->size[0] <= CLIPFT_INT8_MAX_OUT && t->size[1] > 0 && t->size[1] <= CLIPFT_INT8_MAX_IN)
        return true;
    return clipft_fail(error, "weight_int8 must be [out, in] with 0 < out <= %d and 0 < in <= %d, got shape %s", CLIPFT_INT8_MAX_OUT,
                       CLIPFT_INT8_MAX_IN, clipft_shape_text(t, shape, sizeof shape));
}

static bool check_features(const clipft_tensor *input, int64_t in, clipft_error *error)
{
    char shape[96];
    return input->size[input->ndim - 1] == in || clipft_fail(error, "input must have the weight's %lld features last, got shape %s",
                                                             (long long)in, clipft_shape_text(input, shape, sizeof shape));
}

static bool check_out(const clipft_tensor *t, int64_t out, clipft_error *error)
{
    char shape[96];
    return (t->ndim == 1 && t->size[0] == out) ||
           clipft_fail(error, "%s must be [out], [%lld], got shape %s", t->name, (long long)out, clipft_shape_text(t, shape, sizeof shape));
}

static bool check_bias(const clipft_tensor *t, const clipft_tensor *input, int64_t out, clipft_error *error)
{
    if (t->ndim == 1 && t->size[0] == 0) return true; /* none */
    if (t->dtype != input->dtype && t->dtype != clipft_torch.aoti_torch_dtype_float32())
        return clipft_fail(error, "bias must have the dtype of input, %s, or float32, got %s", clipft_dtype_name(input->dtype),
                           clipft_dtype_name(t->dtype));
    return clipft_check_cpu(t, error) && check_out(t, out, error);
}

static bool check_layer(int8_inputs *in, int64_t activation, clipft_error *error)
{
    const clipft_tensor *scale = &in->scale;
    if (!check_features(&in->input, in->in, error)) return false;
    if (!clipft_check_dtype(scale, clipft_torch.aoti_torch_dtype_float32(), "float32", error) || !clipft_check_cpu(scale, error) ||
        !check_out(scale, in->out, error) || !check_bias(&in->bias, &in->input, in->out, error))
        return false;
    if (activation < 0 || activation >= CLIPFT_ACTIVATIONS)
        return clipft_fail(error, "activation must be None, \"quick_gelu\" or \"gelu\" (0, 1 or 2), got %lld", (long long)activation);
    in->layer.activation = (clipft_activation)activation;
    if (!clipft_tensor_view(&in->input, &in->x))
        return clipft_fail(error, "input must be contiguous where it has more than two dimensions");
    clipft_tensor_view(scale, &in->layer.scale); /* one dimension always is */
    if (in->bias.size[0] > 0) clipft_tensor_view(&in->bias, &in->layer.bias);
    return true;
}

/* ---- entries ---- */

static bool unbox_inputs(int8_inputs *in, const StableIValue *stack, const char *weight, clipft_error *error)
{
    bool ok = clipft_unbox(stack[0], "input", &in->input, error);
    ok &= clipft_unbox(stack[1], weight, &in->weight, error);
    ok &= clipft_unbox(stack[2], "weight_scale", &in->scale, error);
    ok &= clipft_unbox(stack[3], "bias", &in->bias, error);
    return ok && check_input(&in->input, error);
}

static void free_inputs(int8_inputs *in)
{
    clipft_release(&in->input);
    clipft_release(&in->weight);
    clipft_release(&in->scale);
    clipft_release(&in->bias);
}

/* Everything checked: the product into a new tensor. */
static bool multiply(const int8_inputs *in, clipft_tensor *output, clipft_error *error)
{
    int64_t sizes[CLIPFT_MAX_DIM];
    clipft_view y;
    memcpy(sizes, in->input.size, sizeof sizes);
    sizes[in->input.ndim - 1] = in->out;
    if (!clipft_empty(in->input.dtype, in->input.ndim, sizes, output, error)) return false;
    if (!clipft_tensor_view(output, &y)) return clipft_fail(error, "the result has no memory");
    return clipft_int8_linear(&in->layer, &clipft_torch_host, &in->x, &y) || clipft_fail(error, "out of memory, or torch's threads failed");
}

static bool pack(const clipft_tensor *weight, uint8_t *packed, clipft_error *error)
{
    return clipft_int8_pack(&clipft_torch_host, weight->data, weight->size[0], weight->size[1], weight->stride[0], weight->stride[1],
                            packed) ||
           clipft_fail(error, "torch's threads failed");
}

void clipft_op_quantized_linear(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "quantized_linear"};
    int8_inputs in = {0};
    clipft_tensor output = {0};
    uint8_t *packed = NULL;

    if (!unbox_inputs(&in, stack, "weight_int8", &error) || !check_weight(&in.weight, &error)) goto done;
    in.out = in.weight.size[0];
    in.in = in.weight.size[1];
    if (!check_layer(&in, (int64_t)stack[4], &error)) goto done;
    packed = malloc((size_t)clipft_int8_packed_size(in.out, in.in));
    in.layer.packed = packed;
    if (!packed)
        clipft_fail(&error, "no memory for packed weights, [%lld, %lld]", (long long)in.out, (long long)in.in);
    else if (pack(&in.weight, packed, &error) && multiply(&in, &output, &error))
        stack[0] = clipft_box(&output);
done:
    free(packed);
    clipft_release(&output);
    free_inputs(&in);
    clipft_throw(&error, __FILE__, __LINE__);
}

void clipft_op_quantized_linear_packed(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "quantized_linear_packed"};
    int8_inputs in = {0};
    clipft_tensor output = {0};
    clipft_int8_header header;

    if (!unbox_inputs(&in, stack, "packed", &error)) goto done;
    if (!clipft_check_dtype(&in.weight, clipft_torch.aoti_torch_dtype_uint8(), "uint8", &error) || !clipft_check_cpu(&in.weight, &error) ||
        !clipft_check_dim(&in.weight, 1, "[bytes]", &error))
        goto done;
    if (in.weight.stride[0] != 1 || !clipft_int8_packed(in.weight.data, in.weight.size[0], &header)) {
        clipft_fail(&error, "packed must be what quantized_pack gave");
        goto done;
    }
    in.layer.packed = in.weight.data;
    in.out = header.out;
    in.in = header.in;
    if (check_layer(&in, (int64_t)stack[4], &error) && multiply(&in, &output, &error)) stack[0] = clipft_box(&output);
done:
    clipft_release(&output);
    free_inputs(&in);
    clipft_throw(&error, __FILE__, __LINE__);
}

void clipft_op_quantized_pack(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)
{
    (void)num_inputs, (void)num_outputs;
    clipft_error error = {.op = "quantized_pack"};
    clipft_tensor weight, packed = {0};
    int64_t size;

    if (!clipft_unbox(stack[0], "weight_int8", &weight, &error) || !check_weight(&weight, &error)) goto done;
    size = clipft_int8_packed_size(weight.size[0], weight.size[1]);
    if (clipft_empty(clipft_torch.aoti_torch_dtype_uint8(), 1, &size, &packed, &error) && pack(&weight, packed.data, &error))
        stack[0] = clipft_box(&packed);
done:
    clipft_release(&packed);
    clipft_release(&weight);
    clipft_throw(&error, __FILE__, __LINE__);
}
