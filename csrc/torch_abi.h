/* The functions of LibTorch that clipft calls, declared by us.
 *
 * LibTorch exports a stable C ABI, but its headers (torch/csrc/stable/c/shim.h, torch/csrc/inductor/aoti_torch/c/shim.h) are C++. So the
 * prototypes stand here once, in an X-macro list, and are resolved when clipft is imported from the libtorch that torch has loaded:
 * building needs no torch, and one wheel serves every torch from the floor on. tests/abi/conformance.cpp asserts that each prototype equals
 * torch's own. */
#ifndef CLIPFT_TORCH_ABI_H
#define CLIPFT_TORCH_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The oldest torch that exports every function below that is not optional; and the version whose way of passing values is spoken here, as
 * torch encodes it (major << 56 | minor << 48). */
#define CLIPFT_TORCH_FLOOR_MAJOR 2
#define CLIPFT_TORCH_FLOOR_MINOR 10
#define CLIPFT_TORCH_FLOOR "2.10"
#define CLIPFT_TORCH_BUILD_VERSION (((uint64_t)2 << 56) | ((uint64_t)10 << 48))

typedef struct AtenTensorOpaque *AtenTensorHandle;
typedef struct TorchLibraryOpaque *TorchLibraryHandle;
typedef int32_t AOTITorchError; /* 0 is success */
typedef uint64_t StableIValue;  /* one slot of a boxed call's stack */

/* A slot by its type in the op's schema. */
typedef struct clipft_slot_Tensor {
    StableIValue bits;
} clipft_slot_Tensor;
typedef struct clipft_slot_float {
    StableIValue bits;
} clipft_slot_float;
typedef struct clipft_slot_int {
    StableIValue bits;
} clipft_slot_int;
typedef struct clipft_slot_bool {
    StableIValue bits;
} clipft_slot_bool;

typedef void (*clipft_boxed_fn)(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs);
typedef void (*clipft_range_fn)(int64_t begin, int64_t end, void *ctx);

/* NAME(X, dtype) for each element type that clipft uses or names in a message. */
#define CLIPFT_TORCH_DTYPES(X, NAME)                                                                                                       \
    NAME(X, float32)                                                                                                                       \
    NAME(X, float64)                                                                                                                       \
    NAME(X, bfloat16)                                                                                                                      \
    NAME(X, float16)                                                                                                                       \
    NAME(X, int64)                                                                                                                         \
    NAME(X, int32)                                                                                                                         \
    NAME(X, int16)                                                                                                                         \
    NAME(X, int8)                                                                                                                          \
    NAME(X, uint8)                                                                                                                         \
    NAME(X, bool)                                                                                                                          \
    NAME(X, complex64)                                                                                                                     \
    NAME(X, complex128)

#define CLIPFT_TORCH_DTYPE_GETTER(X, dtype) X(int32_t, aoti_torch_dtype_##dtype, (void))

/* X(result, name, parameters) */
#define CLIPFT_TORCH_FUNCTIONS(X)                                                                                                          \
    X(AOTITorchError, aoti_torch_library_init_def, (const char *ns, const char *file, uint32_t line, TorchLibraryHandle *ret))             \
    X(AOTITorchError, aoti_torch_library_init_impl,                                                                                        \
      (const char *ns, const char *key, const char *file, uint32_t line, TorchLibraryHandle *ret))                                         \
    X(AOTITorchError, aoti_torch_library_def, (TorchLibraryHandle self, const char *schema))                                               \
    X(AOTITorchError, torch_library_impl, (TorchLibraryHandle self, const char *name, clipft_boxed_fn fn, uint64_t build_version))         \
    X(void, aoti_torch_check, (bool cond, const char *func, const char *file, uint32_t line, const char *msg))                             \
    X(AOTITorchError, torch_parallel_for, (int64_t begin, int64_t end, int64_t grain_size, clipft_range_fn fn, void *ctx))                 \
    X(AOTITorchError, torch_get_num_threads, (uint32_t * out_num_threads))                                                                 \
    X(AOTITorchError, aoti_torch_new_tensor_handle, (AtenTensorHandle tensor, AtenTensorHandle * ret))                                     \
    X(AOTITorchError, aoti_torch_delete_tensor_object, (AtenTensorHandle tensor))                                                          \
    X(AOTITorchError, aoti_torch_get_data_ptr, (AtenTensorHandle tensor, void **ret))                                                      \
    X(AOTITorchError, aoti_torch_get_dim, (AtenTensorHandle tensor, int64_t * ret))                                                        \
    X(AOTITorchError, aoti_torch_get_size, (AtenTensorHandle tensor, int64_t d, int64_t * ret))                                            \
    X(AOTITorchError, aoti_torch_get_stride, (AtenTensorHandle tensor, int64_t d, int64_t * ret))                                          \
    X(AOTITorchError, aoti_torch_get_dtype, (AtenTensorHandle tensor, int32_t * ret))                                                      \
    X(AOTITorchError, aoti_torch_get_device_type, (AtenTensorHandle tensor, int32_t * ret))                                                \
    X(AOTITorchError, aoti_torch_get_device_index, (AtenTensorHandle tensor, int32_t * ret))                                               \
    X(AOTITorchError, aoti_torch_empty_strided,                                                                                            \
      (int64_t ndim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device_type, int32_t device_index,               \
       AtenTensorHandle *ret))                                                                                                             \
    X(AOTITorchError, aoti_torch_create_tensor_from_blob,                                                                                  \
      (void *data, int64_t ndim, const int64_t *sizes, const int64_t *strides, int64_t storage_offset, int32_t dtype, int32_t device_type, \
       int32_t device_index, AtenTensorHandle *ret))                                                                                       \
    X(AOTITorchError, torch_call_dispatcher, (const char *op, const char *overload, StableIValue *stack, uint64_t build_version))          \
    X(int32_t, aoti_torch_device_type_cpu, (void))                                                                                         \
    X(int32_t, aoti_torch_device_type_cuda, (void))                                                                                        \
    CLIPFT_TORCH_DTYPES(X, CLIPFT_TORCH_DTYPE_GETTER)

/* NULL where torch lacks them, and what then? These are generated for torch's own compiler and promised to nobody: our GEMM. */
#define CLIPFT_TORCH_OPTIONAL_FUNCTIONS(X)                                                                                                 \
    X(AOTITorchError, aoti_torch_cpu_addmm_out,                                                                                            \
      (AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1, AtenTensorHandle mat2, double beta, double alpha))

/* The same for CUDA tensors. Most come from libtorch_cuda, which a CPU build lacks, so nothing looks for them before such a tensor comes.
 */
#define CLIPFT_TORCH_CUDA_FUNCTIONS(X)                                                                                                     \
    X(AOTITorchError, aoti_torch_get_current_cuda_stream, (int32_t device_index, void **ret_stream))                                       \
    X(AOTITorchError, aoti_torch_cuda_addmm_out,                                                                                           \
      (AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1, AtenTensorHandle mat2, double beta, double alpha))              \
    X(AOTITorchError, aoti_torch_copy_, (AtenTensorHandle self, AtenTensorHandle src, int32_t non_blocking))

/* Optional as well. The dispatcher calls the first two by name, but not addmm, which takes scalars: without it plain torch does all.
 * Errors have no text. */
#define CLIPFT_TORCH_CUDA_OPTIONAL_FUNCTIONS(X)                                                                                            \
    X(AOTITorchError, aoti_torch_cuda__int_mm_out, (AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2))                   \
    CLIPFT_TORCH_SINCE_2_11(X(AOTITorchError, aoti_torch_cuda_mm_dtype_out,                                                                \
                              (AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat2, int32_t out_dtype)))                    \
    CLIPFT_TORCH_SINCE_2_13(X(const char *, torch_exception_get_what_without_backtrace, (void)))

/* tests/abi looks for no prototypes in the headers of a torch that lacks the functions. */
#ifndef CLIPFT_TORCH_SINCE_2_11
#define CLIPFT_TORCH_SINCE_2_11(function) function
#define CLIPFT_TORCH_SINCE_2_13(function) function
#endif

#define CLIPFT_TORCH_MEMBER(result, name, parameters) result(*name) parameters;
typedef struct clipft_torch_abi {
    CLIPFT_TORCH_FUNCTIONS(CLIPFT_TORCH_MEMBER)
    CLIPFT_TORCH_OPTIONAL_FUNCTIONS(CLIPFT_TORCH_MEMBER)
} clipft_torch_abi;

typedef struct clipft_torch_cuda_abi {
    CLIPFT_TORCH_CUDA_FUNCTIONS(CLIPFT_TORCH_MEMBER)
    CLIPFT_TORCH_CUDA_OPTIONAL_FUNCTIONS(CLIPFT_TORCH_MEMBER)
} clipft_torch_cuda_abi;
#undef CLIPFT_TORCH_MEMBER

/* Filled by clipft_torch_resolve; read-only afterwards. */
extern clipft_torch_abi clipft_torch;

/* clipft_dtype_float32() and so on: torch's numbers. */
#define CLIPFT_TORCH_DTYPE_NUMBER(X, dtype)                                                                                                \
    static inline int32_t clipft_dtype_##dtype(void) { return clipft_torch.aoti_torch_dtype_##dtype(); }
CLIPFT_TORCH_DTYPES(, CLIPFT_TORCH_DTYPE_NUMBER)
#undef CLIPFT_TORCH_DTYPE_NUMBER

/* Filled by clipft_torch_cuda_resolve. */
extern clipft_torch_cuda_abi clipft_torch_cuda;

/* Resolves every function from the already loaded library at `path`. Returns NULL, or what is missing: the name of the first function that
 * is not optional and that the library lacks, or `path` itself when it is not loaded. */
const char *clipft_torch_resolve(const char *path);

/* Whether torch was built for CUDA: its libtorch_cuda is loaded. */
bool clipft_torch_has_cuda(void);

/* Resolves the functions for CUDA tensors once. NULL, or the name of the first that is missing. */
const char *clipft_torch_cuda_resolve(void);

/* torch's text of the last error in this thread, of a call about CUDA tensors; NULL where torch hands out none (before 2.13 it writes them
 * to standard error). */
const char *clipft_torch_cuda_what(void);

/* out = a b, by the name of one of torch's ops: (a, b, *, out), or (a, b, dtype, *, out) where dtype is not negative. */
bool clipft_torch_product(const char *op, const char *overload, AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b,
                          int32_t dtype);

/* Writes "<folder of torch's libraries>/<name>"; false when it does not fit. */
bool clipft_torch_library(const char *name, char *path, size_t size);

#endif
