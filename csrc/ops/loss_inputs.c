#include "loss_inputs.h"

#include <stdlib.h>

static bool check_embeds(const clipft_tensor *t, clipft_error *error)
{
    return clipft_check_float(t, error) && clipft_check_dim(t, 2, "[N, D]", error);
}

static bool check_pairing(const loss_inputs *in, bool shard, int64_t row_offset, clipft_error *error)
{
    const clipft_tensor *image = &in->image, *text = &in->text;
    char expected[64], got[64];
    if (text->dtype != image->dtype)
        return clipft_fail(error, CLIPFT_TYPE_ERROR, "text_embeds must have the dtype of image_embeds, %s, got %s",
                           clipft_dtype_name(image->dtype), clipft_dtype_name(text->dtype));
    if (!clipft_check_beside(text, image, error)) return false;
    if (text->size[1] != image->size[1] || (!shard && text->size[0] != image->size[0]))
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "text_embeds must have the shape of image_embeds, %s, got %s",
                           clipft_shape_text(image, expected, sizeof expected), clipft_shape_text(text, got, sizeof got));
    if (text->size[0] == 0 || text->size[1] == 0)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "image_embeds must hold at least one pair and one feature, got shape %s",
                           clipft_shape_text(text, got, sizeof got));
    if (row_offset < 0 || row_offset > text->size[0] - image->size[0])
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "row_offset must leave the %lld images of this shard among the %lld pairs, got %lld",
                           (long long)image->size[0], (long long)text->size[0], (long long)row_offset);
    return true;
}

bool loss_check_scalar(const clipft_tensor *tensor, const clipft_tensor *beside, clipft_error *error)
{
    return clipft_check_dtype(tensor, clipft_dtype_float32(), "a float32 tensor", error) && clipft_check_beside(tensor, beside, error) &&
           clipft_check_dim(tensor, 0, "0-d", error);
}

bool loss_scalar(const clipft_tensor *tensor, const clipft_tensor *beside, float *value, clipft_error *error)
{
    if (!loss_check_scalar(tensor, beside, error)) return false;
    *value = *(const float *)tensor->data;
    return true;
}

bool loss_inputs_unbox(loss_inputs *in, const loss_slots *slots, clipft_error *error)
{
    bool ok = clipft_unbox(slots->image_embeds, "image_embeds", &in->image, error);
    ok &= clipft_unbox(slots->text_embeds, "text_embeds", &in->text, error);
    ok &= clipft_unbox(slots->logit_scale, "logit_scale", &in->scale, error);
    in->logits.row_offset = slots->row_offset;
    return ok && check_embeds(&in->image, error) && check_embeds(&in->text, error) &&
           check_pairing(in, slots->shard, slots->row_offset, error) && loss_check_scalar(&in->scale, &in->image, error);
}

bool loss_inputs_take(loss_inputs *in, const loss_slots *slots, clipft_error *error)
{
    return loss_inputs_unbox(in, slots, error) && clipft_check_cpu(&in->image, error) &&
           loss_scalar(&in->scale, &in->image, &in->logits.scale, error) &&
           clipft_float_matrix(&in->image, &in->logits.image, &in->image_copy, error) &&
           clipft_float_matrix(&in->text, &in->logits.text, &in->text_copy, error);
}

void loss_inputs_free(loss_inputs *in)
{
    free(in->image_copy);
    free(in->text_copy);
    clipft_release(&in->image);
    clipft_release(&in->text);
    clipft_release(&in->scale);
}

bool loss_result(int32_t dtype, double value, clipft_tensor *out, clipft_error *error)
{
    if (!clipft_empty(dtype, 0, NULL, out, error)) return false;
    if (dtype == clipft_dtype_float32())
        *(float *)out->data = (float)value;
    else
        *(double *)out->data = value;
    return true;
}

bool loss_check_targets(const clipft_tensor *labels, double smoothing, const loss_inputs *in, clipft_error *error)
{
    if (!(smoothing >= 0.0 && smoothing < 1.0))
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "label_smoothing must be in [0, 1), got %g", smoothing);
    return loss_check_labels(labels, in, error);
}

bool loss_check_labels(const clipft_tensor *labels, const loss_inputs *in, clipft_error *error)
{
    const int64_t n = in->text.size[0];
    char shape[64];
    if (labels->ndim == 1 && labels->size[0] == 0) return true;
    if (!clipft_check_dtype(labels, clipft_dtype_int64(), "int64", error)) return false;
    if (labels->ndim != 1 || labels->size[0] != n)
        return clipft_fail(error, CLIPFT_VALUE_ERROR, "labels must have one entry per pair, [%lld], got shape %s", (long long)n,
                           clipft_shape_text(labels, shape, sizeof shape));
    if (!clipft_check_beside(labels, &in->image, error)) return false;
    return n <= INT32_MAX ||
           clipft_fail(error, CLIPFT_VALUE_ERROR, "labels must number at most %d pairs, got %lld", INT32_MAX, (long long)n);
}

typedef struct labelled {
    int64_t label, index;
} labelled;

static int by_label(const void *a, const void *b)
{
    const int64_t x = ((const labelled *)a)->label, y = ((const labelled *)b)->label;
    return (x > y) - (x < y);
}

bool loss_number_classes(const clipft_tensor *labels, int32_t *ids, float *weight, clipft_error *error)
{
    const int64_t n = labels->size[0];
    labelled *order = malloc((size_t)n * sizeof *order);
    if (!order) return clipft_fail(error, CLIPFT_OUT_OF_MEMORY, "no memory for %lld labels", (long long)n);
    for (int64_t i = 0; i < n; ++i) order[i] = (labelled){((const int64_t *)labels->data)[i * labels->stride[0]], i};
    qsort(order, (size_t)n, sizeof *order, by_label);
    int32_t id = 0;
    for (int64_t begin = 0, end = 0; begin < n; begin = end, ++id) {
        while (end < n && order[end].label == order[begin].label) ++end;
        for (int64_t k = begin; k < end; ++k) {
            ids[order[k].index] = id;
            if (weight) weight[order[k].index] = 1.0F / (float)(end - begin);
        }
    }
    free(order);
    return true;
}

bool loss_check_lse(const clipft_tensor *t, int64_t n, clipft_error *error)
{
    char shape[64];
    if (!clipft_check_dtype(t, clipft_dtype_float64(), "float64", error)) return false;
    return (t->ndim == 1 && t->size[0] == n && (n < 2 || t->stride[0] == 1)) ||
           clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be [%lld] and contiguous, got shape %s", t->name, (long long)n,
                       clipft_shape_text(t, shape, sizeof shape));
}

/* clipft/ops/losses.py computes the same number for the fake tensor. */
static int64_t kept_rows(int64_t rows, int64_t cols)
{
    const int64_t room = CLIPFT_KEEP / cols;
    return rows <= room ? rows : room / CLIPFT_TILE * CLIPFT_TILE;
}

bool loss_keep_tiles(loss_inputs *in, bool keep, clipft_tensor *tiles, clipft_error *error)
{
    const int64_t cols = in->logits.text.rows;
    const int64_t sizes[] = {keep ? kept_rows(in->logits.image.rows, cols) : 0, cols};
    if (!clipft_empty(clipft_dtype_float32(), 2, sizes, tiles, error)) return false;
    in->logits.kept = tiles->data;
    in->logits.kept_rows = sizes[0];
    return true;
}

bool loss_reuse_tiles(loss_inputs *in, const clipft_tensor *tiles, clipft_error *error)
{
    const int64_t rows = in->logits.image.rows, cols = in->logits.text.rows;
    char shape[64];
    if (!clipft_check_dtype(tiles, clipft_dtype_float32(), "float32", error) || !clipft_check_dim(tiles, 2, "[rows, N]", error))
        return false;
    if ((tiles->size[0] != 0 && tiles->size[0] != kept_rows(rows, cols)) || tiles->size[1] != cols ||
        (tiles->size[0] > 0 && (tiles->stride[0] != cols || tiles->stride[1] != 1)))
        return clipft_fail(error, CLIPFT_VALUE_ERROR,
                           "tiles must be what the forward pass returned, [0 or %lld, %lld] contiguous, got shape %s",
                           (long long)kept_rows(rows, cols), (long long)cols, clipft_shape_text(tiles, shape, sizeof shape));
    in->logits.kept = tiles->data;
    in->logits.kept_rows = tiles->size[0];
    return true;
}

static bool make_gradient(clipft_tensor *grad, const clipft_tensor *like, bool needed, int32_t dtype, clipft_matrix *matrix, float **copy,
                          clipft_error *error)
{
    const int64_t none[] = {0, 0};
    if (!clipft_empty(dtype, 2, needed ? like->size : none, grad, error)) return false;
    return !needed || clipft_float_target(grad, matrix, copy, error);
}

bool loss_gradients_make(loss_gradients *grad, const loss_inputs *in, bool needs_image, bool needs_text, int32_t dtype, clipft_error *error)
{
    return make_gradient(&grad->image, &in->image, needs_image, dtype, &grad->image_f, &grad->image_copy, error) &&
           make_gradient(&grad->text, &in->text, needs_text, dtype, &grad->text_f, &grad->text_copy, error);
}

void loss_gradients_finish(loss_gradients *grad)
{
    clipft_float_result(&grad->image, grad->image_copy);
    clipft_float_result(&grad->text, grad->text_copy);
}

void loss_gradients_free(loss_gradients *grad)
{
    free(grad->image_copy);
    free(grad->text_copy);
    clipft_release(&grad->image);
    clipft_release(&grad->text);
}
