#include "quantized_inputs.h"

#include <string.h>

/* ---- checks ---- */

bool int8_check_plain(const clipft_tensor *t, const clipft_tensor *input, clipft_int8_layer *layer, clipft_error *error)
{
    char shape[96];
    if (!clipft_check_dtype(t, clipft_dtype_int8(), "int8", error) || !clipft_check_beside(t, input, error)) return false;
    if (t->ndim == 2 && t->size[0] > 0 && t->size[0] <= CLIPFT_INT8_MAX_OUT && t->size[1] > 0 && t->size[1] <= CLIPFT_INT8_MAX_IN) {
        layer->out = t->size[0], layer->in = t->size[1];
        return true;
    }
    return clipft_fail(error, CLIPFT_VALUE_ERROR, "weight_int8 must be [out, in] with 0 < out <= %d and 0 < in <= %d, got shape %s",
                       CLIPFT_INT8_MAX_OUT, CLIPFT_INT8_MAX_IN, clipft_shape_text(t, shape, sizeof shape));
}

static bool check_out(const clipft_tensor *t, int64_t out, clipft_error *error)
{
    char shape[96];
    return (t->ndim == 1 && t->size[0] == out) || clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be [out], [%lld], got shape %s", t->name,
                                                              (long long)out, clipft_shape_text(t, shape, sizeof shape));
}

/* A vector in float32 or the input's dtype, or empty: none. */
static bool check_vector(const clipft_tensor *t, const clipft_tensor *input, int64_t size, clipft_error *error)
{
    if (t->ndim == 1 && t->size[0] == 0) return true;
    if (t->dtype != input->dtype && t->dtype != clipft_dtype_float32())
        return clipft_fail(error, CLIPFT_TYPE_ERROR, "%s must have the dtype of input, %s, or float32, got %s", t->name,
                           clipft_dtype_name(input->dtype), clipft_dtype_name(t->dtype));
    return clipft_check_beside(t, input, error) && check_out(t, size, error);
}

/* The view of a vector that check_vector passed; without data where it is empty. */
static clipft_view vector_view(const clipft_tensor *t)
{
    clipft_view view = {0};
    if (t->size[0] > 0) clipft_tensor_view(t, &view); /* one dimension is always in order */
    return view;
}

bool int8_check_features(const clipft_tensor *input, int64_t in, clipft_error *error)
{
    char shape[96];
    return input->size[input->ndim - 1] == in ||
           clipft_fail(error, CLIPFT_VALUE_ERROR, "input must have the weight's %lld features last, got shape %s", (long long)in,
                       clipft_shape_text(input, shape, sizeof shape));
}

bool int8_check_layer(const int8_layer_tensors *t, const clipft_tensor *input, int64_t activation, clipft_int8_layer *layer,
                      clipft_error *error)
{
    if (!clipft_check_dtype(&t->scale, clipft_dtype_float32(), "float32", error) || !clipft_check_beside(&t->scale, input, error) ||
        !check_out(&t->scale, layer->out, error) || !check_vector(&t->bias, input, layer->out, error))
        return false;
    if (activation < 0 || activation >= CLIPFT_ACTIVATIONS)
        return clipft_fail(error, CLIPFT_VALUE_ERROR,
                           "activation must be None, \"quick_gelu\", \"gelu\" or \"gelu_tanh\" (0 to 3), got %lld", (long long)activation);
    layer->activation = (clipft_activation)activation;
    clipft_tensor_view(&t->scale, &layer->scale);
    layer->bias = vector_view(&t->bias);
    return true;
}

static bool check_rows(int8_inputs *in, clipft_error *error)
{
    if (!int8_check_features(&in->input, in->chain.layers[0].in, error)) return false;
    if (!clipft_tensor_view(&in->input, &in->x))
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "input must be contiguous where it has more than two dimensions");
    return true;
}

/* The norm before the layers and what is added behind them. */
static bool check_surroundings(int8_inputs *in, clipft_error *error)
{
    char shape[96];
    const clipft_int8_chain *chain = &in->chain;
    const clipft_tensor *residual = &in->residual;
    const int64_t features = chain->layers[0].in, out = chain->layers[chain->count - 1].out;
    if (!check_vector(&in->norm_weight, &in->input, features, error) || !check_vector(&in->norm_bias, &in->input, features, error))
        return false;
    if (in->norm_weight.size[0] != in->norm_bias.size[0])
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "norm_weight and norm_bias must come together");
    in->chain.norm_weight = vector_view(&in->norm_weight);
    in->chain.norm_bias = vector_view(&in->norm_bias);
    if (residual->ndim == 1 && residual->size[0] == 0) return true;
    if (!clipft_check_dtype(residual, in->input.dtype, clipft_dtype_name(in->input.dtype), error) ||
        !clipft_check_beside(residual, &in->input, error))
        return false;
    if (residual->ndim != in->input.ndim || !clipft_tensor_view(residual, &in->chain.residual) || in->chain.residual.rows != in->x.rows ||
        in->chain.residual.cols != out)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "residual must be contiguous and of the result's %lld rows of %lld, got shape %s",
                           (long long)in->x.rows, (long long)out, clipft_shape_text(residual, shape, sizeof shape));
    return true;
}

/* ---- taking them ---- */

static bool unbox_layer(int8_layer_tensors *t, clipft_slot_Tensor weight, const char *weight_name, clipft_slot_Tensor scale,
                        clipft_slot_Tensor bias, clipft_error *error)
{
    bool ok = clipft_unbox(weight, weight_name, &t->weight, error);
    ok &= clipft_unbox(scale, "weight_scale", &t->scale, error);
    ok &= clipft_unbox(bias, "bias", &t->bias, error);
    return ok;
}

void int8_inputs_free(int8_inputs *in)
{
    clipft_release(&in->input);
    clipft_release(&in->norm_weight);
    clipft_release(&in->norm_bias);
    clipft_release(&in->residual);
    for (int k = 0; k < CLIPFT_INT8_LAYERS; ++k) {
        clipft_release(&in->layers[k].weight);
        clipft_release(&in->layers[k].scale);
        clipft_release(&in->layers[k].bias);
    }
}

bool int8_take_linear(int8_inputs *in, const quantized_linear_args *args, clipft_error *error)
{
    clipft_int8_layer *layer = in->chain.layers;
    bool ok = clipft_unbox(args->input, "input", &in->input, error);
    ok &= unbox_layer(in->layers, args->weight_int8, "weight_int8", args->weight_scale, args->bias, error);
    in->chain.count = 1;
    return ok && clipft_check_features(&in->input, error) && int8_check_plain(&in->layers[0].weight, &in->input, layer, error) &&
           check_rows(in, error) && int8_check_layer(in->layers, &in->input, clipft_unbox_int(args->activation), layer, error);
}

static bool check_second(int8_inputs *in, int8_check_weight check, clipft_error *error)
{
    clipft_int8_layer *layers = in->chain.layers;
    if (!check(&in->layers[1].weight, &in->input, &layers[1], error)) return false;
    if (layers[1].in != layers[0].out)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "packed2 must take the first layer's %lld features, got %lld",
                           (long long)layers[0].out, (long long)layers[1].in);
    return int8_check_layer(&in->layers[1], &in->input, CLIPFT_NO_ACTIVATION, &layers[1], error);
}

bool int8_take_chain(int8_inputs *in, const quantized_chain_args *args, int8_check_weight check, clipft_error *error)
{
    clipft_int8_chain *chain = &in->chain;
    bool ok = clipft_unbox(args->input, "input", &in->input, error);
    ok &= clipft_unbox(args->norm_weight, "norm_weight", &in->norm_weight, error);
    ok &= clipft_unbox(args->norm_bias, "norm_bias", &in->norm_bias, error);
    ok &= unbox_layer(&in->layers[0], args->packed, "packed", args->weight_scale, args->bias, error);
    ok &= unbox_layer(&in->layers[1], args->packed2, "packed2", args->weight_scale2, args->bias2, error);
    ok &= clipft_unbox(args->residual, "residual", &in->residual, error);
    chain->norm_eps = (float)clipft_unbox_float(args->norm_eps);
    if (!ok || !clipft_check_features(&in->input, error) || !check(&in->layers[0].weight, &in->input, &chain->layers[0], error) ||
        !check_rows(in, error) ||
        !int8_check_layer(&in->layers[0], &in->input, clipft_unbox_int(args->activation), &chain->layers[0], error))
        return false;
    chain->count = in->layers[1].weight.size[0] > 0 ? 2 : 1;
    return (chain->count == 1 || check_second(in, check, error)) && check_surroundings(in, error);
}

bool int8_make_output(const int8_inputs *in, clipft_tensor *output, clipft_view *y, clipft_error *error)
{
    int64_t sizes[CLIPFT_MAX_DIM];
    memcpy(sizes, in->input.size, sizeof sizes);
    sizes[in->input.ndim - 1] = in->chain.layers[in->chain.count - 1].out;
    return clipft_empty_view(&in->input, in->input.ndim, sizes, output, y, error);
}
