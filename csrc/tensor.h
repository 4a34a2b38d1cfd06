/* Between a boxed call's stack and C: owned tensor handles become typed views, checks leave a full message, results go back. */
#ifndef CLIPFT_TENSOR_H
#define CLIPFT_TENSOR_H

#include "error.h"
#include "kernels/common/host.h"
#include "kernels/common/views.h"
#include "torch_abi.h"

enum { CLIPFT_MAX_DIM = 8 };

typedef struct clipft_tensor {
    AtenTensorHandle handle; /* owned */
    const char *name;        /* the argument, for messages */
    void *data;
    int64_t ndim;
    int64_t size[CLIPFT_MAX_DIM], stride[CLIPFT_MAX_DIM]; /* filled where ndim <= CLIPFT_MAX_DIM */
    int32_t dtype, device, index;                         /* index: of the device; 0 on the CPU */
} clipft_tensor;

/* Takes the handle out of a stack slot. */
bool clipft_unbox(clipft_slot_Tensor slot, const char *name, clipft_tensor *tensor, clipft_error *error);

/* A new contiguous CPU tensor. Give it back with clipft_box, or it is freed with clipft_release. */
bool clipft_empty(int32_t dtype, int64_t ndim, const int64_t *sizes, clipft_tensor *tensor, clipft_error *error);
/* The same on the device of another tensor. */
bool clipft_empty_beside(const clipft_tensor *beside, int32_t dtype, int64_t ndim, const int64_t *sizes, clipft_tensor *tensor,
                         clipft_error *error);

/* The same in its dtype as well, and the tensor's view. */
bool clipft_empty_view(const clipft_tensor *beside, int64_t ndim, const int64_t *sizes, clipft_tensor *tensor, clipft_view *view,
                       clipft_error *error);

clipft_slot_Tensor clipft_box(clipft_tensor *tensor);
void clipft_release(clipft_tensor *tensor);

static inline double clipft_unbox_float(clipft_slot_float slot)
{
    union {
        StableIValue bits;
        double value;
    } u = {slot.bits};
    return u.value;
}
static inline int64_t clipft_unbox_int(clipft_slot_int slot) { return (int64_t)slot.bits; }
static inline bool clipft_unbox_bool(clipft_slot_bool slot) { return slot.bits & 1U; }

/* The checks that several ops have; each names the tensor and what it got. */
bool clipft_check_cpu(const clipft_tensor *tensor, clipft_error *error);
bool clipft_check_beside(const clipft_tensor *tensor, const clipft_tensor *beside, clipft_error *error); /* on the same device */
bool clipft_check_dim(const clipft_tensor *tensor, int64_t ndim, const char *layout, clipft_error *error);
bool clipft_check_dtype(const clipft_tensor *tensor, int32_t dtype, const char *expected, clipft_error *error);
bool clipft_check_float(const clipft_tensor *tensor, clipft_error *error);    /* float32, bfloat16 or float16 */
bool clipft_check_features(const clipft_tensor *tensor, clipft_error *error); /* the same, [..., in] with in > 0 */

const char *clipft_dtype_name(int32_t dtype);
/* "[3, 4]" */
const char *clipft_shape_text(const clipft_tensor *tensor, char *text, int size);
/* "cpu", "cuda:0" */
const char *clipft_device_text(const clipft_tensor *tensor, char *text, int size);

/* A [rows, cols] float tensor as float32 with unit column stride: the tensor's own memory, or a converted copy in *copy (free it), NULL
 * otherwise. */
bool clipft_float_matrix(const clipft_tensor *tensor, clipft_matrix *matrix, float **copy, clipft_error *error);

/* Where a [rows, cols] float32 result is computed that `tensor` (contiguous) takes: its own memory, or *copy, to be converted by
 * clipft_float_result. */
bool clipft_float_target(const clipft_tensor *tensor, clipft_matrix *matrix, float **copy, clipft_error *error);
void clipft_float_result(const clipft_tensor *tensor, const float *copy);

/* The tensor's memory, all dimensions but the last taken as one: they must lie in order, else false. A float dtype and at least one
 * dimension are the caller's checks. */
bool clipft_tensor_view(const clipft_tensor *tensor, clipft_view *view);

/* A torch tensor over a matrix in memory, on that device; delete it. NULL when torch fails. */
AtenTensorHandle clipft_wrap_memory(void *data, int32_t dtype, const int64_t sizes[2], const int64_t strides[2], int32_t device,
                                    int32_t index);
AtenTensorHandle clipft_wrap_view(const clipft_view *view, int32_t device, int32_t index);
void clipft_delete(AtenTensorHandle handle); /* NULL is nothing */

/* c = start + a b, or a b without a start (NULL), all of one dtype. The start is c itself or one row, [1, cols], for every row of c. */
bool clipft_torch_gemm(const clipft_view *c, const clipft_view *start, const clipft_view *a, const clipft_view *b);

/* Kernels' host on torch: its threads and its GEMM. */
extern const clipft_host clipft_torch_host;

#endif
