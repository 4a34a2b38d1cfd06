#include "call.h"

#include <string.h>

_Static_assert((int)CLIPFT_FLOAT32 == (int)CLIPFT_CUDA_FLOAT32 && (int)CLIPFT_BFLOAT16 == (int)CLIPFT_CUDA_BFLOAT16 &&
                   (int)CLIPFT_FLOAT16 == (int)CLIPFT_CUDA_FLOAT16,
               "one number for a kind of floats");

bool cuda_begin(cuda_call *call, clipft_cuda_file file, const clipft_tensor *beside)
{
    char got[32];
    call->beside = beside;
    if (beside->device != clipft_torch.aoti_torch_device_type_cuda())
        return clipft_fail(call->error, CLIPFT_VALUE_ERROR, "%s must be on the device of the other tensors, cuda, got %s", beside->name,
                           clipft_device_text(beside, got, sizeof got));
    const char *problem = clipft_cuda_problem(beside->index, file);
    if (problem) return clipft_fail(call->error, CLIPFT_NOT_IMPLEMENTED, "the CUDA kernels cannot run: %s", problem);
    return !clipft_torch_cuda.aoti_torch_get_current_cuda_stream(beside->index, &call->stream) ||
           clipft_fail(call->error, CLIPFT_RUNTIME_ERROR, "torch has no current stream on cuda:%d", beside->index);
}

void cuda_end(cuda_call *call)
{
    for (int k = 0; k < call->works; ++k) clipft_release(&call->work[k]);
}

void *cuda_work(cuda_call *call, int32_t dtype, int64_t count)
{
    const int64_t size = count > 0 ? count : 1; /* torch gives nothing no address */
    if (call->works == CUDA_WORK) {
        clipft_fail(call->error, CLIPFT_RUNTIME_ERROR, "more work space than CUDA_WORK: a bug in clipft");
        return NULL;
    }
    clipft_tensor *t = &call->work[call->works++];
    return clipft_empty_beside(call->beside, dtype, 1, &size, t, call->error) ? t->data : NULL;
}

bool cuda_launch(cuda_call *call, clipft_cuda_kernel kernel, int64_t blocks_x, int64_t blocks_y, int threads, void *args)
{
    const char *problem = clipft_cuda_launch(call->beside->index, call->stream, kernel, blocks_x, blocks_y, threads, args);
    return !problem || clipft_fail(call->error, CLIPFT_RUNTIME_ERROR, "a CUDA kernel did not start: %s", problem);
}

bool cuda_launch_items(cuda_call *call, clipft_cuda_kernel kernel, int64_t count, void *args)
{
    return cuda_launch(call, kernel, cuda_blocks(count, CLIPFT_CUDA_THREADS), 1, CLIPFT_CUDA_THREADS, args);
}

bool cuda_torch_failed(cuda_call *call, const char *what)
{
    const char *why = clipft_torch_cuda_what();
    const clipft_error_kind kind = why && strstr(why, "out of memory") ? CLIPFT_OUT_OF_MEMORY : CLIPFT_RUNTIME_ERROR;
    return clipft_fail(call->error, kind, "%s failed in torch: %s", what, why ? why : "it wrote why to standard error");
}

static AtenTensorHandle wrap_beside(const cuda_call *call, const clipft_view *view)
{
    return clipft_wrap_view(view, call->beside->device, call->beside->index);
}

bool cuda_multiply(cuda_call *call, clipft_view c, const clipft_tensor *start, bool accumulate, clipft_view a, clipft_view b)
{
    AtenTensorHandle out = wrap_beside(call, &c), left = wrap_beside(call, &a), right = wrap_beside(call, &b);
    bool ok = out && left && right;
    if (ok && c.kind == a.kind)
        ok = !clipft_torch_cuda.aoti_torch_cuda_addmm_out(out, start ? start->handle : out, left, right, start || accumulate ? 1.0 : 0.0,
                                                          1.0);
    else if (ok && clipft_torch_cuda.aoti_torch_cuda_mm_dtype_out)
        ok = !clipft_torch_cuda.aoti_torch_cuda_mm_dtype_out(out, left, right, clipft_dtype_float32());
    else if (ok)
        ok = clipft_torch_product("aten::mm", "dtype_out", out, left, right, clipft_dtype_float32());
    clipft_delete(out);
    clipft_delete(left);
    clipft_delete(right);
    return ok || cuda_torch_failed(call, "a matrix product");
}

/* See args.h. */
static int path_of(const clipft_view *view)
{
    const uintptr_t bytes = view->kind == CLIPFT_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
    const bool quads = view->col_stride == 1 && view->cols % 4 == 0 && (view->rows == 1 || view->row_stride % 4 == 0) &&
                       (uintptr_t)view->data % (4 * bytes) == 0;
    return quads ? (int)view->kind : CLIPFT_CUDA_ANY_LAYOUT;
}

clipft_cuda_matrix cuda_matrix(const clipft_view *view)
{
    const bool wide = view->kind == CLIPFT_FLOAT32;
    return (clipft_cuda_matrix){wide ? view->data : NULL, wide ? NULL : view->data, view->row_stride,
                                view->col_stride,         (int)view->kind,          path_of(view)};
}

clipft_cuda_target cuda_target(const clipft_view *view)
{
    const bool wide = view->kind == CLIPFT_FLOAT32;
    return (clipft_cuda_target){wide ? view->data : NULL, wide ? NULL : view->data, (int)view->kind, path_of(view)};
}
