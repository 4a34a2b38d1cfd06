/* A linear layer with frozen int8 weights and a LoRA branch, for training:
 *
 *   y = act(x)^ W^T + b + s (m . act(x)) A^T B^T      x^: rows brought to 7 bits, as in int8.h; the rest as in kernels/lora/lora.h
 *   dx = (((dy * weight_scale)^ w + m . (u A)) act'(x)      w^T packed as a layer of its own, whose scale is 1
 *
 * and, in float32 from x itself, dA, dB and the sums over dy. */
#ifndef CLIPFT_INT8_LORA_H
#define CLIPFT_INT8_LORA_H

#include "../lora/lora.h"
#include "int8.h"

typedef struct clipft_int8_lora {
    clipft_int8_layer layer; /* forward: the weight; backward: its transpose, without scale and bias */
    clipft_view factor;      /* backward: [1, out] weight_scale */
    clipft_lora lora;        /* matrices without data: no branch */
} clipft_int8_lora;

/* y [rows, out]; v [rows, padded] where there is a branch. False when memory ran out or the host failed. */
bool clipft_int8_lora_forward(const clipft_int8_lora *l, const clipft_host *host, const clipft_view *x, float *v, const clipft_view *y);

/* Those with data are wanted. */
typedef struct clipft_int8_lora_gradients {
    clipft_view x, bias, lora_a, lora_b;
} clipft_int8_lora_gradients;

/* x is read where there is a branch or an activation. `u` [rows, padded]: work space for the gradients of x and lora_a through a branch. */
bool clipft_int8_lora_backward(const clipft_int8_lora *l, const clipft_host *host, const clipft_view *x, const clipft_view *dy,
                               const float *v, float *u, const clipft_int8_lora_gradients *d);

#endif
