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

/* To prepare something once. */
typedef struct attempt {
    _Atomic state state; /* set last */
    bool busy;           /* it failed for a reason that may pass */
    char problem[CLIPFT_CUDA_PROBLEM];
} attempt;

typedef struct device {
    attempt itself, files[CLIPFT_CUDA_FILES];
    clipft_cuda_target_gpu gpu;
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

static bool problem(attempt *a, const char *what, const char *detail)
{
    snprintf(a->problem, sizeof a->problem, "%s: %s", what, detail);
    return false;
}

static bool succeeds(attempt *a, const char *what, clipft_cuda_result result)
{
    if (result == OUT_OF_MEMORY || (result >= FIRST_OF_CAPTURE && result <= LAST_OF_CAPTURE)) a->busy = true;
    return !result || problem(a, what, error_text(result));
}

static bool open_driver(attempt *a)
{
    const char *missing = NULL;
    if (cuda.cuInit) return true;
    void *library = dlopen(CLIPFT_LIBCUDA, RTLD_NOW);
    if (!library) return problem(a, "there is no CUDA driver", dlerror());
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
        return problem(a, "the CUDA driver is too old, it lacks", missing);
    }
    if (!succeeds(a, "the CUDA driver does not start", table.cuInit(0))) {
        dlclose(library);
        return false;
    }
    cuda = table;
    return true;
}

static const char *const file_names[] = {
#define CUDA_FILE(name) #name,
#define CUDA_KERNEL(file, name, args)
#include "kernels.inc"
#undef CUDA_FILE
#undef CUDA_KERNEL
};

clipft_cuda_file clipft_cuda_file_named(const char *name)
{
    int file = 0;
    while (file < CLIPFT_CUDA_FILES && strcmp(name, file_names[file]) != 0) ++file;
    return (clipft_cuda_file)file;
}

static bool find_device_code(attempt *a, char *folder, size_t size)
{
    return (clipft_cuda_folder(folder, size) ||
            problem(a, "clipft's device code was not found", "the package's folder cuda is missing; install clipft again")) &&
           clipft_cuda_check_device_code(folder, a->problem, sizeof a->problem);
}

static bool load_kernels(device *d, int file)
{
    attempt *a = &d->files[file];
    char folder[4096];
    CUmodule module = NULL;
    CUcontext popped;
    char *image = find_device_code(a, folder, sizeof folder)
                      ? clipft_cuda_cubin(folder, file_names[file], &d->gpu, a->problem, sizeof a->problem)
                      : NULL;
    if (!image) return false;
    bool ok = succeeds(a, "the GPU cannot be used", cuda.cuCtxPushCurrent_v2(d->context));
    if (ok) {
        ok = succeeds(a, "the CUDA driver does not load the kernels", cuda.cuModuleLoadData(&module, image));
#define CUDA_FILE(name)
#define CUDA_KERNEL(of, name, args)                                                                                                        \
    if (file == CLIPFT_CUDA_FILE_##of)                                                                                                     \
        ok = ok && succeeds(a, "the kernel " #name " is missing in " #of ".cu",                                                            \
                            cuda.cuModuleGetFunction(&d->functions[CLIPFT_CUDA_##name], module, #name));
#include "kernels.inc"
#undef CUDA_FILE
#undef CUDA_KERNEL
        cuda.cuCtxPopCurrent_v2(&popped);
    }
    free(image);
    return ok;
}

static bool prepare(device *d, int ordinal)
{
    attempt *a = &d->itself;
    CUdevice id;
    int l2 = 0;
    char folder[4096];
    if (!find_device_code(a, folder, sizeof folder)) return false;
    const char *missing = clipft_torch_cuda_resolve();
    if (missing) return problem(a, "this torch cannot be used with CUDA, it lacks", missing);
    if (!open_driver(a)) return false;
    if (!succeeds(a, "the CUDA driver does not know the GPU", cuda.cuDeviceGet(&id, ordinal)) ||
        !succeeds(a, "the GPU does not tell its capability", cuda.cuDeviceGetAttribute(&d->gpu.major, CAPABILITY_MAJOR, id)) ||
        !succeeds(a, "the GPU does not tell its capability", cuda.cuDeviceGetAttribute(&d->gpu.minor, CAPABILITY_MINOR, id)) ||
        !succeeds(a, "the GPU does not tell its cache", cuda.cuDeviceGetAttribute(&l2, L2_CACHE_SIZE, id)) ||
        !succeeds(a, "the CUDA driver does not tell its version", cuda.cuDriverGetVersion(&d->gpu.driver)) ||
        !succeeds(a, "the GPU cannot be used", cuda.cuDevicePrimaryCtxRetain(&d->context, id)))
        return false;
    d->l2_bytes = l2;
    return true;
}

/* NULL once `make` has succeeded, or what it says. */
static const char *settle(attempt *a, bool (*make)(device *d, int which), device *d, int which)
{
    state found = atomic_load_explicit(&a->state, memory_order_acquire);
    if (found == UNTRIED) {
        pthread_mutex_lock(&lock);
        found = atomic_load_explicit(&a->state, memory_order_relaxed);
        if (found == UNTRIED) {
            a->busy = false;
            found = make(d, which) ? READY : a->busy ? UNTRIED : UNUSABLE;
            atomic_store_explicit(&a->state, found, memory_order_release);
        }
        pthread_mutex_unlock(&lock);
    }
    if (found == UNTRIED) /* a text that no other thread's attempt writes over */
        return "the GPU had no memory, or was capturing a graph, when they were to be loaded; the next call tries again. Call once before "
               "capturing";
    return found == READY ? NULL : a->problem;
}

const char *clipft_cuda_problem(int32_t ordinal, clipft_cuda_file file)
{
    if (ordinal < 0 || ordinal >= CLIPFT_CUDA_DEVICES) return "clipft knows GPUs 0 to 63 only";
    device *d = &devices[ordinal];
    const bool is_loss = file == CLIPFT_CUDA_FILE_contrastive || file == CLIPFT_CUDA_FILE_sigmoid;
    const char *found = settle(&d->itself, prepare, d, ordinal);
    for (int k = 0; !found && k < CLIPFT_CUDA_FILES; ++k)
        if (file == CLIPFT_CUDA_FILES || (int)file == k || (is_loss && k == CLIPFT_CUDA_FILE_losses))
            found = settle(&d->files[k], load_kernels, d, k);
    return found;
}

int64_t clipft_cuda_l2_bytes(int32_t ordinal) { return devices[ordinal].l2_bytes; }

int clipft_cuda_capability(int32_t ordinal) { return 10 * devices[ordinal].gpu.major + devices[ordinal].gpu.minor; }

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
