/* What the two losses share at their boundary to torch: the embeddings, their checks, and the gradients' memory. */
#ifndef CLIPFT_LOSS_INPUTS_H
#define CLIPFT_LOSS_INPUTS_H

#include "../kernels/loss/loss.h"
#include "ops.h"

/* Of which of its arguments the sigmoid loss makes gradients. The scale's is made from the image's or the text's. */
typedef struct sigmoid_needs {
    bool image, text, any;
} sigmoid_needs;

static inline sigmoid_needs sigmoid_needs_of(clipft_slot_bool image, clipft_slot_bool text, clipft_slot_bool scalars)
{
    const bool i = clipft_unbox_bool(image), t = clipft_unbox_bool(text), s = clipft_unbox_bool(scalars);
    return (sigmoid_needs){i || (s && !t), t, i || t || s};
}

/* Floats that the contrastive loss's forward pass may keep for its backward pass: all tiles up to N = 3238. */
enum { CLIPFT_KEEP = 40 * 1024 * 1024 / 4 };

typedef struct loss_inputs {
    clipft_tensor image, text, scale;
    float *image_copy, *text_copy;
    clipft_logits logits;
} loss_inputs;

/* What every op of the losses takes. `shard`: the images are some rows, from row_offset on, of a batch that has as many texts as pairs;
 * otherwise the shapes agree. */
typedef struct loss_slots {
    clipft_slot_Tensor image_embeds, text_embeds, logit_scale;
    bool shard;
    int64_t row_offset;
} loss_slots;

/* Unboxes and checks them; all lie on one device. */
bool loss_inputs_unbox(loss_inputs *in, const loss_slots *slots, clipft_error *error);
/* The same on the CPU, with values read. */
bool loss_inputs_take(loss_inputs *in, const loss_slots *slots, clipft_error *error);
void loss_inputs_free(loss_inputs *in);

/* A one-element float32 argument beside another tensor, and its value on the CPU. */
bool loss_check_scalar(const clipft_tensor *tensor, const clipft_tensor *beside, clipft_error *error);
bool loss_scalar(const clipft_tensor *tensor, const clipft_tensor *beside, float *value, clipft_error *error);

/* A new 0-d float32 or float64 result. */
bool loss_result(int32_t dtype, double value, clipft_tensor *out, clipft_error *error);

/* The contrastive loss's targets: labels (none when empty) and label_smoothing. */
typedef struct target_slots {
    clipft_slot_Tensor labels;
    clipft_slot_float label_smoothing;
} target_slots;
bool loss_check_targets(const clipft_tensor *labels, double smoothing, const loss_inputs *in, clipft_error *error);
/* The same of the labels alone. */
bool loss_check_labels(const clipft_tensor *labels, const loss_inputs *in, clipft_error *error);
/* Labels of any value on the CPU become class ids 0, 1, ... [n] and, unless `weight` is NULL, 1 / size of the class [n]. */
bool loss_number_classes(const clipft_tensor *labels, int32_t *ids, float *weight, clipft_error *error);
/* What the contrastive loss's forward pass returned: float64, [n]. */
bool loss_check_lse(const clipft_tensor *lse, int64_t n, clipft_error *error);

/* How many rows of tiles are kept, and their tensor, [rows, N]; none unless `keep`. */
bool loss_keep_tiles(loss_inputs *in, bool keep, clipft_tensor *tiles, clipft_error *error);
/* The same in the backward pass, from the tensor that the forward pass returned. */
bool loss_reuse_tiles(loss_inputs *in, const clipft_tensor *tiles, clipft_error *error);

typedef struct loss_gradients {
    clipft_tensor image, text; /* [0, 0] where not needed */
    float *image_copy, *text_copy;
    clipft_matrix image_f, text_f; /* data NULL where not computed */
} loss_gradients;

/* Of that dtype. Where the scale needs a gradient one of the two is needed, for it is made from that. */
bool loss_gradients_make(loss_gradients *grad, const loss_inputs *in, bool needs_image, bool needs_text, int32_t dtype,
                         clipft_error *error);
/* Converts to that dtype. */
void loss_gradients_finish(loss_gradients *grad);
void loss_gradients_free(loss_gradients *grad);

#endif
