#define _GNU_SOURCE /* dladdr */
#include "driver.h"

#include "../torch_abi.h"
#include "compile.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* The tests build this file with a driver of their own. */
#ifndef CLIPFT_LIBCUDA
#define CLIPFT_LIBCUDA "libcuda.so.1"
#endif

/* CUresult: what may pass. A module is not loaded while any stream of the process captures a graph. */
enum { OUT_OF_MEMORY = 2, FIRST_OF_CAPTURE = 900, LAST_OF_CAPTURE = 908 };

/* CUdevice_attribute */
enum { L2_CACHE_SIZE = 38, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };

typedef enum state { UNTRIED, READY, UNUSABLE } state;

typedef struct device {
    _Atomic state state; /* set last */
    bool busy;           /* preparing failed for a reason that may pass */
    char problem[CLIPFT_CUDA_PROBLEM];
    CUcontext context; /* the primary one, torch's */
    CUfunction functions[CLIPFT_CUDA_KERNELS];
    int64_t l2_bytes;
} device;

static device devices[CLIPFT_CUDA_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static clipft_cuda_api cuda;

static const char *error_text(clipft_cuda_result result)
{
    const char *text = NULL;
    return cuda.cuGetErrorString && !cuda.cuGetErrorString(result, &text) && text ? text : "an unknown error of the CUDA driver";
}

static bool problem(device *d, const char *what, const char *detail)
{
    snprintf(d->problem, sizeof d->problem, "%s: %s", what, detail);
    return false;
}

static bool succeeds(device *d, const char *what, clipft_cuda_result result)
{
    if (result == OUT_OF_MEMORY || (result >= FIRST_OF_CAPTURE && result <= LAST_OF_CAPTURE)) d->busy = true;
    return !result || problem(d, what, error_text(result));
}

static bool open_driver(device *d)
{
    const char *missing = NULL;
    if (cuda.cuInit) return true;
    void *library = dlopen(CLIPFT_LIBCUDA, RTLD_NOW);
    if (!library) return problem(d, "there is no CUDA driver", dlerror());
    union {
        void *object;
        void (*function)(void);
    } found;
    clipft_cuda_api table = {0};
#define RESOLVE(name, parameters)                                                                                                          \
    found.object = dlsym(library, #name);                                                                                                  \
    if (!found.object && !missing) missing = #name;                                                                                        \
    table.name = (clipft_cuda_result(*) parameters)found.function;
    CLIPFT_CUDA_FUNCTIONS(RESOLVE)
#undef RESOLVE
    if (missing) {
        dlclose(library);
        return problem(d, "the CUDA driver is too old, it lacks", missing);
    }
    if (!succeeds(d, "the CUDA driver does not start", table.cuInit(0))) {
        dlclose(library);
        return false;
    }
    cuda = table;
    return true;
}

static bool load_file(device *d, const char *folder, const char *name, const clipft_cuda_target_gpu *gpu, CUmodule *module)
{
    char *image = clipft_cuda_cubin(folder, name, gpu, d->problem, sizeof d->problem);
    const bool ok = image && succeeds(d, "the CUDA driver does not load the kernels", cuda.cuModuleLoadData(module, image));
    free(image);
    return ok;
}

static bool find_device_code(device *d, char *folder, size_t size)
{
    return (clipft_cuda_folder(folder, size) ||
            problem(d, "clipft's device code was not found", "the package's folder cuda is missing; install clipft again")) &&
           clipft_cuda_check_device_code(folder, d->problem, sizeof d->problem);
}

static bool load_kernels(device *d, const char *folder, const clipft_cuda_target_gpu *gpu)
{
    CUmodule module = NULL;
    bool ok = true;
#define CUDA_FILE(name) ok = ok && load_file(d, folder, #name, gpu, &module);
#define CUDA_KERNEL(file, name, args)                                                                                                      \
    ok = ok && succeeds(d, "the kernel " #name " is missing in " #file ".cu",                                                              \
                        cuda.cuModuleGetFunction(&d->functions[CLIPFT_CUDA_##name], module, #name));
#include "kernels.inc"
#undef CUDA_FILE
#undef CUDA_KERNEL
    return ok;
}

static bool prepare(device *d, int32_t ordinal)
{
    clipft_cuda_target_gpu gpu = {0};
    CUdevice id;
    int l2 = 0;
    char folder[4096];
    if (!find_device_code(d, folder, sizeof folder)) return false;
    const char *missing = clipft_torch_cuda_resolve();
    if (missing) return problem(d, "this torch cannot be used with CUDA, it lacks", missing);
    if (!open_driver(d)) return false;
    if (!succeeds(d, "the CUDA driver does not know the GPU", cuda.cuDeviceGet(&id, ordinal)) ||
        !succeeds(d, "the GPU does not tell its capability", cuda.cuDeviceGetAttribute(&gpu.major, CAPABILITY_MAJOR, id)) ||
        !succeeds(d, "the GPU does not tell its capability", cuda.cuDeviceGetAttribute(&gpu.minor, CAPABILITY_MINOR, id)) ||
        !succeeds(d, "the GPU does not tell its cache", cuda.cuDeviceGetAttribute(&l2, L2_CACHE_SIZE, id)) ||
        !succeeds(d, "the CUDA driver does not tell its version", cuda.cuDriverGetVersion(&gpu.driver)) ||
        !succeeds(d, "the GPU cannot be used", cuda.cuDevicePrimaryCtxRetain(&d->context, id)) ||
        !succeeds(d, "the GPU cannot be used", cuda.cuCtxPushCurrent_v2(d->context)))
        return false;
    d->l2_bytes = l2;
    const bool ok = load_kernels(d, folder, &gpu);
    CUcontext popped;
    cuda.cuCtxPopCurrent_v2(&popped);
    return ok;
}

const char *clipft_cuda_problem(int32_t ordinal)
{
    if (ordinal < 0 || ordinal >= CLIPFT_CUDA_DEVICES) return "clipft knows GPUs 0 to 63 only";
    device *d = &devices[ordinal];
    state found = atomic_load_explicit(&d->state, memory_order_acquire);
    if (found == UNTRIED) {
        pthread_mutex_lock(&lock);
        found = atomic_load_explicit(&d->state, memory_order_relaxed);
        if (found == UNTRIED) {
            d->busy = false;
            found = prepare(d, ordinal) ? READY : d->busy ? UNTRIED : UNUSABLE;
            atomic_store_explicit(&d->state, found, memory_order_release);
        }
        pthread_mutex_unlock(&lock);
    }
    if (found == UNTRIED) /* a text that no other thread's attempt writes over */
        return "the GPU had no memory, or was capturing a graph, when they were to be loaded; the next call tries again. Call once before "
               "capturing";
    return found == READY ? NULL : d->problem;
}

int64_t clipft_cuda_l2_bytes(int32_t ordinal) { return devices[ordinal].l2_bytes; }

const char *clipft_cuda_launch(int32_t ordinal, void *stream, clipft_cuda_kernel kernel, int64_t blocks_x, int64_t blocks_y, int threads,
                               void *args)
{
    device *d = &devices[ordinal];
    void *parameters[] = {args};
    CUcontext popped;
    if (blocks_x <= 0 || blocks_y <= 0) return NULL;
    if (blocks_x > INT32_MAX || blocks_y > UINT16_MAX) return "more blocks than a grid can have";
    clipft_cuda_result result = cuda.cuCtxPushCurrent_v2(d->context);
    if (result) return error_text(result);
    result = cuda.cuLaunchKernel(d->functions[kernel], (unsigned)blocks_x, (unsigned)blocks_y, 1, (unsigned)threads, 1, 1, 0, stream,
                                 parameters, NULL);
    cuda.cuCtxPopCurrent_v2(&popped);
    return result ? error_text(result) : NULL;
}

bool clipft_cuda_folder(char *path, size_t size)
{
    static const char *const candidates[] = {"cuda", "../cuda"};
    Dl_info info;
    if (!dladdr(devices, &info) || !info.dli_fname) return false;
    const char *slash = strrchr(info.dli_fname, '/');
    for (size_t k = 0; k < sizeof candidates / sizeof *candidates; ++k) {
        struct stat entry;
        const int length = slash ? (int)(slash - info.dli_fname) : 1;
        const int n = snprintf(path, size, "%.*s/%s", length, slash ? info.dli_fname : ".", candidates[k]);
        if (n > 0 && (size_t)n < size && stat(path, &entry) == 0 && S_ISDIR(entry.st_mode)) return true;
    }
    return false;
}
