/* What lora_linear and its backward pass take and give, on whichever device: unboxed, checked, allocated. */
#ifndef CLIPFT_LORA_INPUTS_H
#define CLIPFT_LORA_INPUTS_H

#include "../kernels/lora/lora.h"
#include "ops.h"

typedef struct lora_inputs {
    clipft_tensor input, weight, bias, lora_a, lora_b, seed;
    clipft_view x, w, bias_row; /* [rows, in], [out, in], [1, out] or without data */
    clipft_lora lora;           /* its dropout lacks the seed, which lies on the device */
    int64_t rows, in, out, rank, padded;
} lora_inputs;

/* The arguments of lora_linear, and of its backward pass, which come with what the forward pass left. Free them in any case. */
bool lora_take_forward(lora_inputs *in, const lora_linear_args *args, clipft_error *error);
typedef struct lora_saved {
    clipft_tensor grad, rank;
    clipft_view dy;
} lora_saved;
bool lora_take_backward(lora_inputs *in, lora_saved *saved, const lora_linear_backward_args *args, clipft_error *error);
void lora_free_inputs(lora_inputs *in);
void lora_free_saved(lora_saved *saved);

/* The branch of an input and a base whose in and out are known: lora_a, lora_b and dropout. */
bool lora_check_branch(lora_inputs *in, double scaling, double dropout, bool quick_gelu, clipft_error *error);

/* What the backward pass takes beside them: the result's gradient, and the rank that the forward pass gave. */
bool lora_check_grad(const clipft_tensor *grad, const lora_inputs *in, clipft_view *dy, clipft_error *error);
bool lora_check_rank(const clipft_tensor *rank, const lora_inputs *in, clipft_error *error);

bool lora_view_of(const clipft_tensor *t, clipft_view *view, clipft_error *error);

/* Dropout's probability, and its seed where there is dropout: a 0-d int64 tensor. */
bool lora_check_dropout(const clipft_tensor *seed, double p, clipft_dropout *dropout, clipft_error *error);

/* Gives dropout its seed, where that lies on the CPU. */
bool lora_seed_dropout(const clipft_tensor *seed, clipft_dropout *dropout, double p, clipft_error *error);

/* A mask's [rows, cols]. */
bool lora_check_mask(const int64_t *sizes, clipft_error *error);

/* New tensors beside the input: the result and v [rows, padded] float32; a temporary [rows, cols] in the input's dtype. */
bool lora_make_result(const lora_inputs *in, clipft_tensor *output, clipft_view *y, clipft_error *error);
bool lora_make_output(const lora_inputs *in, clipft_tensor *output, clipft_view *y, clipft_tensor *rank, clipft_error *error);
bool lora_temporary(const lora_inputs *in, int64_t cols, clipft_tensor *tensor, clipft_view *view, clipft_error *error);

/* A gradient like its tensor, or [0] where it is not needed; over no rows it is zero. */
bool lora_make_gradient(bool needed, const clipft_tensor *like, clipft_tensor *grad, clipft_view *view, clipft_error *error);
void lora_zero_gradient(const clipft_tensor *t);

typedef struct lora_gradients {
    clipft_tensor input, weight, bias, lora_a, lora_b; /* [0] where not needed */
    clipft_view d_x, d_w, d_bias, d_a, d_b;            /* without data where not needed */
    clipft_tensor u, activated;                        /* temporaries: [rows, padded]; act(x) for the weight's gradient */
    clipft_view act;
} lora_gradients;

/* Those that the arguments ask for. Free them in any case; boxing takes them out. */
bool lora_make_gradients(lora_gradients *g, const lora_inputs *in, const lora_linear_backward_args *args, clipft_error *error);
lora_linear_backward_results lora_box_gradients(lora_gradients *g);
void lora_free_gradients(lora_gradients *g);

/* quick_gelu alone: its input, or gradient and input, in order in memory; a result like the input. */
bool gelu_take(clipft_slot_Tensor slot, const char *name, clipft_tensor *t, clipft_view *view, clipft_error *error);
bool gelu_take_gradient(const quick_gelu_backward_args *args, clipft_tensor *grad, clipft_view *dy, clipft_tensor *input, clipft_view *x,
                        clipft_error *error);
bool gelu_make_result(const clipft_tensor *like, clipft_tensor *out, clipft_view *view, clipft_error *error);

#endif
