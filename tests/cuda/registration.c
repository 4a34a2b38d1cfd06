/* The CUDA ops under torch.ops.clipft_emulated, for CPU tensors: csrc as it is, over a torch whose CUDA is its CPU and the emulated driver.
 */
#define _GNU_SOURCE
#include "../../csrc/cuda_runtime/driver.h"
#include "../../csrc/ops/ops.h"
#include "../../csrc/tensor.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

static clipft_torch_abi real;
static void (*know_memory)(const void *begin, size_t bytes);
static void (*forget_memory)(void);

/* Bytes from the tensor's first element to its last. */
static size_t extent(AtenTensorHandle tensor)
{
    int64_t ndim, last = 0, size, stride;
    int32_t dtype;
    real.aoti_torch_get_dim(tensor, &ndim);
    real.aoti_torch_get_dtype(tensor, &dtype);
    for (int64_t d = 0; d < ndim; ++d) {
        real.aoti_torch_get_size(tensor, d, &size);
        real.aoti_torch_get_stride(tensor, d, &stride);
        if (size == 0) return 0;
        last += (size - 1) * stride;
    }
    const size_t item = dtype == real.aoti_torch_dtype_float64() || dtype == real.aoti_torch_dtype_int64()   ? 8
                        : dtype == real.aoti_torch_dtype_float32() || dtype == real.aoti_torch_dtype_int32() ? 4
                        : dtype == real.aoti_torch_dtype_int8() || dtype == real.aoti_torch_dtype_uint8()    ? 1
                                                                                                             : 2;
    return (size_t)(last + 1) * item;
}

static AOTITorchError get_data_ptr(AtenTensorHandle tensor, void **data)
{
    const AOTITorchError bad = real.aoti_torch_get_data_ptr(tensor, data);
    if (!bad) know_memory(*data, extent(tensor));
    return bad;
}

/* New memory is full of NaN. */
static AOTITorchError empty_strided(int64_t ndim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device,
                                    int32_t index, AtenTensorHandle *tensor)
{
    void *data;
    const char *limit = getenv("EMULATED_MEMORY");
    if (limit && ndim > 0 && sizes[0] * strides[0] > atoll(limit)) return 1;
    const AOTITorchError bad = real.aoti_torch_empty_strided(ndim, sizes, strides, dtype, device, index, tensor);
    if (!bad && !real.aoti_torch_get_data_ptr(*tensor, &data) && data) memset(data, 0xff, extent(*tensor));
    return bad;
}

static const char *what(void) { return "CUDA out of memory. Tried to allocate more than the test gives."; }
static AOTITorchError current_stream(int32_t index, void **stream) { return *stream = NULL, index != 0; }

/* A float32 copy, and a tensor over it. */
static AtenTensorHandle widened(AtenTensorHandle tensor, float **copy)
{
    clipft_tensor t = {.handle = tensor, .name = "factor"};
    AtenTensorHandle handle = NULL;
    real.aoti_torch_get_data_ptr(tensor, &t.data);
    real.aoti_torch_get_dtype(tensor, &t.dtype);
    for (int d = 0; d < 2; ++d) {
        real.aoti_torch_get_size(tensor, d, &t.size[d]);
        real.aoti_torch_get_stride(tensor, d, &t.stride[d]);
    }
    t.ndim = 2;
    clipft_view view;
    *copy = calloc((size_t)(t.size[0] * t.size[1]), sizeof **copy);
    clipft_tensor_view(&t, &view);
    clipft_view_pack(&view, *copy, t.size[1]);
    const int64_t strides[] = {t.size[1], 1};
    real.aoti_torch_create_tensor_from_blob(*copy, 2, t.size, strides, 0, real.aoti_torch_dtype_float32(),
                                            real.aoti_torch_device_type_cpu(), 0, &handle);
    return handle;
}

static AOTITorchError mm_dtype_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b, int32_t dtype)
{
    float *left_copy, *right_copy;
    if (dtype != real.aoti_torch_dtype_float32()) return 1;
    AtenTensorHandle left = widened(a, &left_copy), right = widened(b, &right_copy);
    const AOTITorchError bad = real.aoti_torch_cpu_addmm_out(out, out, left, right, 0.0, 1.0);
    real.aoti_torch_delete_tensor_object(left);
    real.aoti_torch_delete_tensor_object(right);
    free(left_copy), free(right_copy);
    return bad;
}

static AOTITorchError (*cpu_int_mm_out)(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b);

/* With the shapes and the layouts that torch takes on CUDA. */
static AOTITorchError int_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b)
{
    int64_t rows, depth, cols, stride;
    real.aoti_torch_get_size(a, 0, &rows);
    real.aoti_torch_get_size(a, 1, &depth);
    real.aoti_torch_get_size(b, 1, &cols);
    real.aoti_torch_get_stride(b, 0, &stride);
    return rows <= 16 || depth == 0 || depth % 8 || cols == 0 || cols % 8 || stride != 1 || cpu_int_mm_out(out, a, b);
}

static AOTITorchError (*cpu_copy)(AtenTensorHandle self, AtenTensorHandle src, int32_t non_blocking);

/* In the place of torch_abi.c's, by the linker's --wrap: the table is empty until an op asks for it, as in a new process. */
const char *__wrap_clipft_torch_cuda_resolve(void);
const char *__wrap_clipft_torch_cuda_resolve(void)
{
    clipft_torch_cuda = (clipft_torch_cuda_abi){
        .aoti_torch_get_current_cuda_stream = current_stream,
        .aoti_torch_cuda_addmm_out = real.aoti_torch_cpu_addmm_out,
        .aoti_torch_cuda_mm_dtype_out = mm_dtype_out,
        .aoti_torch_cuda__int_mm_out = int_mm_out,
        .aoti_torch_copy_ = cpu_copy,
        .torch_exception_get_what_without_backtrace = what,
    };
    return NULL;
}

#define OP_CUDA(name)                                                                                                                      \
    static void emulated_##name(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)                                            \
    {                                                                                                                                      \
        forget_memory();                                                                                                                   \
        clipft_cuda_##name(stack, num_inputs, num_outputs);                                                                                \
    }
#include "../../csrc/ops/ops_cuda.inc"
#undef OP_CUDA

#define API __attribute__((visibility("default")))

/* Both return NULL, or what is wrong. */
API const char *emulated_pretend(const char *libtorch)
{
    const char *missing = clipft_torch_resolve(libtorch);
    void *library = dlopen(libtorch, RTLD_NOW | RTLD_NOLOAD);
    *(void **)&cpu_int_mm_out = dlsym(library, "aoti_torch_cpu__int_mm_out");
    *(void **)&cpu_copy = dlsym(library, "aoti_torch_copy_");
    real = clipft_torch;
    clipft_torch.aoti_torch_get_data_ptr = get_data_ptr;
    clipft_torch.aoti_torch_empty_strided = empty_strided;
    clipft_torch.aoti_torch_device_type_cuda = clipft_torch.aoti_torch_device_type_cpu;
    return missing;
}

API const char *emulated_register(const char *driver)
{
    TorchLibraryHandle definitions = NULL, cpu = NULL;
    void *library = dlopen(driver, RTLD_NOW);
    if (!library) return dlerror();
    *(void **)&know_memory = dlsym(library, "emulated_know_memory");
    *(void **)&forget_memory = dlsym(library, "emulated_forget_memory");
    AOTITorchError bad = real.aoti_torch_library_init_def("clipft_emulated", __FILE__, __LINE__, &definitions);
    bad = bad ? bad : clipft_ops_define(definitions);
    bad = bad ? bad : real.aoti_torch_library_init_impl("clipft_emulated", "CPU", __FILE__, __LINE__, &cpu);
#define OP_CUDA(name) bad = bad ? bad : real.torch_library_impl(cpu, #name, emulated_##name, CLIPFT_TORCH_BUILD_VERSION);
#include "../../csrc/ops/ops_cuda.inc"
#undef OP_CUDA
    return bad ? "the emulated ops could not be registered" : NULL;
}

/* As an older torch, or one that exports only what it promises. */
API void emulated_has_optional(int has)
{
    clipft_torch_cuda.aoti_torch_cuda_mm_dtype_out = has ? mm_dtype_out : NULL;
    clipft_torch_cuda.aoti_torch_cuda__int_mm_out = has ? int_mm_out : NULL;
    clipft_torch_cuda.torch_exception_get_what_without_backtrace = has ? what : NULL;
}

API const char *emulated_problem(int device) { return clipft_cuda_problem(device, CLIPFT_CUDA_FILES); }
