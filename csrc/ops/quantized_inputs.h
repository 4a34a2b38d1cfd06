/* What quantized_linear and quantized_chain take, on whichever device: unboxed and checked. */
#ifndef CLIPFT_QUANTIZED_INPUTS_H
#define CLIPFT_QUANTIZED_INPUTS_H

#include "../kernels/int8/int8.h"
#include "ops.h"

typedef struct int8_layer_tensors {
    clipft_tensor weight, scale, bias;
} int8_layer_tensors;

typedef struct int8_inputs {
    clipft_tensor input, norm_weight, norm_bias, residual; /* all but the first may be empty: none */
    int8_layer_tensors layers[CLIPFT_INT8_LAYERS];
    clipft_view x; /* [rows, in] */
    clipft_int8_chain chain;
} int8_inputs;

/* Checks a weight, [out, in] int8 as it is saved or what a device made of it, and sets the layer's out and in. */
typedef bool (*int8_check_weight)(const clipft_tensor *weight, const clipft_tensor *input, clipft_int8_layer *layer, clipft_error *error);

/* What quantized_pack gave. */
bool int8_check_packed(const clipft_tensor *packed, const clipft_tensor *input, clipft_int8_layer *layer, clipft_error *error);

/* A layer's scale and bias, whose out is known; they become its views. */
bool int8_check_layer(const int8_layer_tensors *tensors, const clipft_tensor *input, int64_t activation, clipft_int8_layer *layer,
                      clipft_error *error);

/* That the input has so many features. */
bool int8_check_features(const clipft_tensor *input, int64_t in, clipft_error *error);

bool int8_check_plain(const clipft_tensor *weight, const clipft_tensor *input, clipft_int8_layer *layer, clipft_error *error);

/* The arguments of quantized_linear and of quantized_chain. Free them in any case. */
bool int8_take_linear(int8_inputs *in, const quantized_linear_args *args, clipft_error *error);
bool int8_take_chain(int8_inputs *in, const quantized_chain_args *args, int8_check_weight check, clipft_error *error);
void int8_inputs_free(int8_inputs *in);

/* A new tensor for the result, beside the input. */
bool int8_make_output(const int8_inputs *in, clipft_tensor *output, clipft_view *y, clipft_error *error);

#endif
