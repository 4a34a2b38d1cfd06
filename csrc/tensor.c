#include "tensor.h"

#include "dispatch.h"
#include "kernels/common/convert.h"
#include "kernels/common/gemm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- views ---- */

static bool describe(clipft_tensor *t, clipft_error *error)
{
    AOTITorchError bad = clipft_torch.aoti_torch_get_dim(t->handle, &t->ndim);
    bad |= clipft_torch.aoti_torch_get_data_ptr(t->handle, &t->data);
    bad |= clipft_torch.aoti_torch_get_dtype(t->handle, &t->dtype);
    bad |= clipft_torch.aoti_torch_get_device_type(t->handle, &t->device);
    bad |= clipft_torch.aoti_torch_get_device_index(t->handle, &t->index);
    if (t->index < 0) t->index = 0; /* as torch gives it for the CPU */
    for (int64_t d = 0; !bad && t->ndim <= CLIPFT_MAX_DIM && d < t->ndim; ++d) {
        bad |= clipft_torch.aoti_torch_get_size(t->handle, d, &t->size[d]);
        bad |= clipft_torch.aoti_torch_get_stride(t->handle, d, &t->stride[d]);
    }
    return !bad || clipft_fail(error, CLIPFT_RUNTIME_ERROR, "%s is not a tensor with memory of its own (sparse or fake?)", t->name);
}

bool clipft_unbox(clipft_slot_Tensor slot, const char *name, clipft_tensor *tensor, clipft_error *error)
{
    *tensor = (clipft_tensor){.handle = (AtenTensorHandle)(uintptr_t)slot.bits, .name = name};
    return describe(tensor, error);
}

static bool empty_on(int32_t device, int32_t index, int32_t dtype, int64_t ndim, const int64_t *sizes, clipft_tensor *tensor,
                     clipft_error *error)
{
    int64_t strides[CLIPFT_MAX_DIM] = {0}, stride = 1;
    *tensor = (clipft_tensor){.name = "result"};
    for (int64_t d = ndim - 1; d >= 0; --d) {
        strides[d] = stride;
        if (__builtin_mul_overflow(stride, sizes[d] > 0 ? sizes[d] : 1, &stride))
            return clipft_fail(error, CLIPFT_OUT_OF_MEMORY, "a %s result of 2^63 elements or more was asked for", clipft_dtype_name(dtype));
    }
    if (clipft_torch.aoti_torch_empty_strided(ndim, sizes, strides, dtype, device, index, &tensor->handle)) {
        const bool cuda = device == clipft_torch.aoti_torch_device_type_cuda();
        const char *what = cuda ? clipft_torch_cuda_what() : NULL;
        const clipft_error_kind kind = what && !strstr(what, "out of memory") ? CLIPFT_RUNTIME_ERROR : CLIPFT_OUT_OF_MEMORY;
        return clipft_fail(error, kind, "torch could not allocate a %s tensor of %lld elements%s%s", clipft_dtype_name(dtype),
                           (long long)stride, what ? ": " : "", what ? what : "");
    }
    return describe(tensor, error);
}

bool clipft_empty(int32_t dtype, int64_t ndim, const int64_t *sizes, clipft_tensor *tensor, clipft_error *error)
{
    return empty_on(clipft_torch.aoti_torch_device_type_cpu(), 0, dtype, ndim, sizes, tensor, error);
}

bool clipft_empty_beside(const clipft_tensor *beside, int32_t dtype, int64_t ndim, const int64_t *sizes, clipft_tensor *tensor,
                         clipft_error *error)
{
    return empty_on(beside->device, beside->index, dtype, ndim, sizes, tensor, error);
}

bool clipft_empty_view(const clipft_tensor *beside, int64_t ndim, const int64_t *sizes, clipft_tensor *tensor, clipft_view *view,
                       clipft_error *error)
{
    return clipft_empty_beside(beside, beside->dtype, ndim, sizes, tensor, error) &&
           (clipft_tensor_view(tensor, view) || clipft_fail(error, CLIPFT_RUNTIME_ERROR, "the result has no memory"));
}

clipft_slot_Tensor clipft_box(clipft_tensor *tensor)
{
    const clipft_slot_Tensor slot = {(StableIValue)(uintptr_t)tensor->handle};
    tensor->handle = NULL;
    return slot;
}

void clipft_delete(AtenTensorHandle handle)
{
    if (handle) clipft_torch.aoti_torch_delete_tensor_object(handle);
}

void clipft_release(clipft_tensor *tensor)
{
    clipft_delete(tensor->handle);
    tensor->handle = NULL;
}

/* ---- checks ---- */

const char *clipft_dtype_name(int32_t dtype)
{
#define DTYPE_NAME(X, name)                                                                                                                \
    if (dtype == clipft_dtype_##name()) return #name;
    CLIPFT_TORCH_DTYPES(, DTYPE_NAME)
#undef DTYPE_NAME
    return "another dtype";
}

const char *clipft_shape_text(const clipft_tensor *tensor, char *text, int size)
{
    int used = snprintf(text, (size_t)size, "[");
    for (int64_t d = 0; d < tensor->ndim && used < size; ++d) {
        int64_t extent = 0;
        clipft_torch.aoti_torch_get_size(tensor->handle, d, &extent);
        used += snprintf(text + used, (size_t)(size - used), "%s%lld", d ? ", " : "", (long long)extent);
    }
    if (used < size) snprintf(text + used, (size_t)(size - used), "]");
    return text;
}

const char *clipft_device_text(const clipft_tensor *tensor, char *text, int size)
{
    /* c10/core/DeviceType.h, in its order; tests/abi/conformance.cpp counts. */
    static const char *const names[] = {"cpu",  "cuda", "mkldnn", "opengl", "opencl", "ideep", "hip",
                                        "fpga", "maia", "xla",    "vulkan", "metal",  "xpu",   "mps",
                                        "meta", "hpu",  "ve",     "lazy",   "ipu",    "mtia",  "privateuseone"};
    const bool known = tensor->device >= 0 && tensor->device < (int32_t)(sizeof names / sizeof *names);
    const char *name = known ? names[tensor->device] : "another device";
    if (known && strcmp(name, "cpu") != 0 && strcmp(name, "meta") != 0)
        snprintf(text, (size_t)size, "%s:%d", name, tensor->index);
    else
        snprintf(text, (size_t)size, "%s", name);
    return text;
}

bool clipft_check_cpu(const clipft_tensor *tensor, clipft_error *error)
{
    char got[32];
    return tensor->device == clipft_torch.aoti_torch_device_type_cpu() ||
           clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be on the device of the other tensors, cpu, got %s", tensor->name,
                       clipft_device_text(tensor, got, sizeof got));
}

bool clipft_check_beside(const clipft_tensor *tensor, const clipft_tensor *beside, clipft_error *error)
{
    char want[32], got[32];
    return (tensor->device == beside->device && tensor->index == beside->index) ||
           clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be on the device of the other tensors, %s, got %s", tensor->name,
                       clipft_device_text(beside, want, sizeof want), clipft_device_text(tensor, got, sizeof got));
}

bool clipft_check_dim(const clipft_tensor *tensor, int64_t ndim, const char *layout, clipft_error *error)
{
    char shape[96];
    return tensor->ndim == ndim || clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be %s, got shape %s", tensor->name, layout,
                                               clipft_shape_text(tensor, shape, sizeof shape));
}

bool clipft_check_dtype(const clipft_tensor *tensor, int32_t dtype, const char *expected, clipft_error *error)
{
    return tensor->dtype == dtype ||
           clipft_fail(error, CLIPFT_TYPE_ERROR, "%s must be %s, got %s", tensor->name, expected, clipft_dtype_name(tensor->dtype));
}

bool clipft_check_float(const clipft_tensor *tensor, clipft_error *error)
{
    const int32_t dtype = tensor->dtype;
    return dtype == clipft_dtype_float32() || dtype == clipft_dtype_bfloat16() || dtype == clipft_dtype_float16() ||
           clipft_fail(error, CLIPFT_TYPE_ERROR, "%s must be float32, bfloat16 or float16, got %s", tensor->name, clipft_dtype_name(dtype));
}

bool clipft_check_features(const clipft_tensor *tensor, clipft_error *error)
{
    char shape[96];
    if (!clipft_check_float(tensor, error)) return false;
    return (tensor->ndim >= 1 && tensor->ndim <= CLIPFT_MAX_DIM && tensor->size[tensor->ndim - 1] > 0) ||
           clipft_fail(error, CLIPFT_VALUE_ERROR, "%s must be [..., in] with in > 0 and at most %d dimensions, got shape %s", tensor->name,
                       CLIPFT_MAX_DIM, clipft_shape_text(tensor, shape, sizeof shape));
}

/* ---- float32 in and out of 16-bit floats ---- */

static bool allocate_copy(const clipft_tensor *t, float **copy, clipft_error *error)
{
    const int64_t rows = t->size[0], cols = t->size[1];
    *copy = NULL;
    if (cols == 0 || rows <= INT64_MAX / 8 / cols) *copy = malloc((size_t)(rows * cols) * sizeof(float) + 1);
    if (!*copy)
        clipft_fail(error, CLIPFT_OUT_OF_MEMORY, "no memory for a float32 copy of %s, [%lld, %lld]", t->name, (long long)rows,
                    (long long)cols);
    return *copy != NULL;
}

/* One row into float32, whatever its dtype and stride. */
static void copy_row(const clipft_tensor *t, int64_t row, float *out)
{
    const int64_t cols = t->size[1], stride = t->stride[1];
    const bool bfloat16 = t->dtype == clipft_dtype_bfloat16();
    if (t->dtype == clipft_dtype_float32()) {
        const float *in = (const float *)t->data + row * t->stride[0];
        for (int64_t j = 0; j < cols; ++j) out[j] = in[j * stride];
        return;
    }
    const uint16_t *in = (const uint16_t *)t->data + row * t->stride[0];
    const int64_t step = stride == 1 ? cols : 1;
    for (int64_t j = 0; j < cols; j += step) {
        if (bfloat16)
            clipft_bfloat16_to_float(in + j * stride, out + j, step);
        else
            clipft_float16_to_float(in + j * stride, out + j, step);
    }
}

bool clipft_float_matrix(const clipft_tensor *t, clipft_matrix *matrix, float **copy, clipft_error *error)
{
    const int64_t rows = t->size[0], cols = t->size[1];
    *copy = NULL;
    if (t->dtype == clipft_dtype_float32() && t->stride[1] == 1 && t->stride[0] >= cols) {
        *matrix = (clipft_matrix){t->data, rows, cols, t->stride[0], 1};
        return true;
    }
    if (!allocate_copy(t, copy, error)) return false;
    for (int64_t i = 0; i < rows; ++i) copy_row(t, i, *copy + i * cols);
    *matrix = (clipft_matrix){*copy, rows, cols, cols, 1};
    return true;
}

bool clipft_float_target(const clipft_tensor *t, clipft_matrix *matrix, float **copy, clipft_error *error)
{
    *copy = NULL;
    if (t->dtype != clipft_dtype_float32() && !allocate_copy(t, copy, error)) return false;
    *matrix = (clipft_matrix){*copy ? *copy : t->data, t->size[0], t->size[1], t->size[1], 1};
    return true;
}

void clipft_float_result(const clipft_tensor *t, const float *copy)
{
    const int64_t n = t->size[0] * t->size[1];
    if (!copy) return;
    if (t->dtype == clipft_dtype_bfloat16())
        clipft_float_to_bfloat16(copy, t->data, n);
    else
        clipft_float_to_float16(copy, t->data, n);
}

bool clipft_tensor_view(const clipft_tensor *t, clipft_view *view)
{
    const int64_t last = t->ndim - 1;
    const bool sixteen = t->dtype != clipft_dtype_float32();
    const bool bfloat16 = t->dtype == clipft_dtype_bfloat16();
    int64_t rows = 1, stride = 0;
    bool empty = false; /* then strides mean nothing */
    if (t->ndim > CLIPFT_MAX_DIM) return false;
    for (int64_t d = 0; d <= last; ++d) empty |= t->size[d] == 0;
    for (int64_t d = last - 1; d >= 0; --d) {
        if (t->size[d] == 1) continue;
        if (!empty && rows > 1 && t->stride[d] != rows * stride) return false;
        if (rows == 1) stride = t->stride[d];
        rows *= t->size[d];
    }
    const int64_t cols = t->size[last];
    *view = (clipft_view){t->data,
                          rows,
                          cols,
                          rows > 1 ? stride : cols,
                          cols > 1 ? t->stride[last] : 1,
                          bfloat16  ? CLIPFT_BFLOAT16
                          : sixteen ? CLIPFT_FLOAT16
                                    : CLIPFT_FLOAT32};
    return true;
}

/* ---- the kernels' host ---- */

AtenTensorHandle clipft_wrap_memory(void *data, int32_t dtype, const int64_t sizes[2], const int64_t strides[2], int32_t device,
                                    int32_t index)
{
    AtenTensorHandle handle = NULL;
    const bool bad = clipft_torch.aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, dtype, device, index, &handle);
    return bad ? NULL : handle;
}

AtenTensorHandle clipft_wrap_view(const clipft_view *m, int32_t device, int32_t index)
{
    const int32_t dtype = m->kind == CLIPFT_FLOAT32    ? clipft_dtype_float32()
                          : m->kind == CLIPFT_BFLOAT16 ? clipft_dtype_bfloat16()
                                                       : clipft_dtype_float16();
    return clipft_wrap_memory(m->data, dtype, (const int64_t[]){m->rows, m->cols}, (const int64_t[]){m->row_stride, m->col_stride}, device,
                              index);
}

static AtenTensorHandle wrap_on_cpu(const clipft_view *m) { return clipft_wrap_view(m, clipft_torch.aoti_torch_device_type_cpu(), 0); }

/* Where torch has no such product: ours, of float32 copies. */
static bool own_product(const clipft_view *c, const clipft_view *start, const clipft_view *a, const clipft_view *b)
{
    float *work = calloc((size_t)(c->rows * c->cols + a->rows * a->cols + b->rows * b->cols) + 1, sizeof *work);
    if (!work) return false;
    const clipft_matrix sum = {work, c->rows, c->cols, c->cols, 1}, left = {sum.data + c->rows * c->cols, a->rows, a->cols, a->cols, 1},
                        right = {left.data + a->rows * a->cols, b->rows, b->cols, b->cols, 1};
    clipft_view_pack(a, left.data, left.row_stride);
    clipft_view_pack(b, right.data, right.row_stride);
    for (int64_t i = 0; start && i < sum.rows; ++i)
        clipft_view_read(start, start->rows == 1 ? 0 : i, 0, sum.cols, sum.data + i * sum.row_stride);
    const bool ok = left.cols == 0 || clipft_gemm(&clipft_torch_host, sum, left, right, start != NULL);
    for (int64_t i = 0; i < sum.rows; ++i) clipft_view_write(c, i, 0, sum.cols, sum.data + i * sum.row_stride);
    free(work);
    return ok;
}

bool clipft_torch_gemm(const clipft_view *c, const clipft_view *start, const clipft_view *a, const clipft_view *b)
{
    if (!clipft_torch.aoti_torch_cpu_addmm_out) return own_product(c, start, a, b);
    /* The same tensor, not only the same memory, where the sum starts from c: torch copies otherwise. */
    AtenTensorHandle out = wrap_on_cpu(c), self = start && start != c ? wrap_on_cpu(start) : out;
    AtenTensorHandle left = wrap_on_cpu(a), right = wrap_on_cpu(b);
    const bool ok = out && self && left && right && !clipft_torch.aoti_torch_cpu_addmm_out(out, self, left, right, start ? 1.0 : 0.0, 1.0);
    if (self != out) clipft_delete(self);
    clipft_delete(out);
    clipft_delete(left);
    clipft_delete(right);
    return ok;
}

static clipft_view float_view(clipft_matrix m) { return (clipft_view){m.data, m.rows, m.cols, m.row_stride, m.col_stride, CLIPFT_FLOAT32}; }

static bool host_gemm(clipft_matrix c, clipft_matrix a, clipft_matrix b, bool accumulate)
{
    if (clipft_dispatch_own_gemm() || !clipft_torch.aoti_torch_cpu_addmm_out) return clipft_gemm(&clipft_torch_host, c, a, b, accumulate);
    const clipft_view out = float_view(c), left = float_view(a), right = float_view(b);
    return clipft_torch_gemm(&out, accumulate ? &out : NULL, &left, &right);
}

static bool host_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void *), void *ctx)
{
    return begin >= end || !clipft_torch.torch_parallel_for(begin, end, grain, fn, ctx);
}

static int64_t host_threads(void)
{
    uint32_t threads;
    return clipft_torch.torch_get_num_threads(&threads) || threads == 0 ? 1 : (int64_t)threads;
}

const clipft_host clipft_torch_host = {host_gemm, host_parallel_for, host_threads};
