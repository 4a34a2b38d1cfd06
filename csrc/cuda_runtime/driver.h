/* The kernels of cuda/ on a GPU: found, compiled and loaded at first use, launched on torch's stream.
 *
 * Nothing of CUDA is linked or needed to build. libcuda and NVRTC are opened at run time; a device that cannot be used has a sentence that
 * says why. A device is prepared once, and so is each file of kernels, when an op wants it: under a lock, and used without one from
 * then on. */
#ifndef CLIPFT_CUDA_RUNTIME_DRIVER_H
#define CLIPFT_CUDA_RUNTIME_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef int CUdevice;
typedef int clipft_cuda_result; /* CUresult; 0 is success */

/* X(name, parameters): the functions of libcuda, and NVRTC's. tests/abi/cuda_conformance.cpp asserts that they equal CUDA's own. */
#define CLIPFT_CUDA_FUNCTIONS(X)                                                                                                           \
    X(cuInit, (unsigned flags))                                                                                                            \
    X(cuDriverGetVersion, (int *version))                                                                                                  \
    X(cuGetErrorString, (clipft_cuda_result error, const char **text))                                                                     \
    X(cuDeviceGet, (CUdevice * device, int ordinal))                                                                                       \
    X(cuDeviceGetAttribute, (int *value, int attribute, CUdevice device))                                                                  \
    X(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                                                                    \
    X(cuCtxPushCurrent_v2, (CUcontext context))                                                                                            \
    X(cuCtxPopCurrent_v2, (CUcontext * context))                                                                                           \
    X(cuModuleLoadData, (CUmodule * module, const void *image))                                                                            \
    X(cuModuleGetFunction, (CUfunction * function, CUmodule module, const char *name))                                                     \
    X(cuLaunchKernel, (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,         \
                       unsigned block_z, unsigned shared_bytes, CUstream stream, void **parameters, void **extra))

#define CLIPFT_CUDA_MEMBER(name, parameters) clipft_cuda_result(*name) parameters;
typedef struct clipft_cuda_api {
    CLIPFT_CUDA_FUNCTIONS(CLIPFT_CUDA_MEMBER)
} clipft_cuda_api;
#undef CLIPFT_CUDA_MEMBER

typedef enum clipft_cuda_file {
#define CUDA_FILE(name) CLIPFT_CUDA_FILE_##name,
#define CUDA_KERNEL(file, name, args)
#include "kernels.inc"
#undef CUDA_FILE
#undef CUDA_KERNEL
    CLIPFT_CUDA_FILES
} clipft_cuda_file;

typedef enum clipft_cuda_kernel {
#define CUDA_FILE(name)
#define CUDA_KERNEL(file, name, args) CLIPFT_CUDA_##name,
#include "kernels.inc"
#undef CUDA_FILE
#undef CUDA_KERNEL
    CLIPFT_CUDA_KERNELS
} clipft_cuda_kernel;

enum { CLIPFT_CUDA_DEVICES = 64, CLIPFT_CUDA_PROBLEM = 1024 };

/* Prepares the device if it is not yet, and compiles and loads the kernels of that file (and of losses.cu, for those of either loss), or of
 * all: CLIPFT_CUDA_FILES. NULL, or why it cannot run them: a sentence that stays as it is for the life of the process. */
const char *clipft_cuda_problem(int32_t device, clipft_cuda_file file);

/* The file of that name, or CLIPFT_CUDA_FILES. */
clipft_cuda_file clipft_cuda_file_named(const char *name);

/* Of a prepared device: bytes of its L2 cache, and its compute capability, 90 for sm_90. */
int64_t clipft_cuda_l2_bytes(int32_t device);
int clipft_cuda_capability(int32_t device);

/* Launches a kernel of one struct of arguments on a prepared device. NULL, or what the driver says. */
const char *clipft_cuda_launch(int32_t device, void *stream, clipft_cuda_kernel kernel, int64_t blocks_x, int64_t blocks_y, int threads,
                               void *args);

/* The device code's folder, as installed or in a source tree; false when neither is there. */
bool clipft_cuda_folder(char *path, size_t size);

#endif
