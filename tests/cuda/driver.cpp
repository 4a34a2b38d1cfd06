// An emulated libcuda: one GPU, whose kernels are cuda/*.cu compiled for the CPU. EMULATED_CAPABILITY=90 says what it claims to be,
// EMULATED_CACHE how large its L2 cache is (small, so that small cases have many tiles).
#include "machine.h"

#include "../../csrc/cuda_runtime/driver.h"
#include "../../cuda/args.h"

#include <cstdlib>
#include <string>
#include <utility>

#define CUDA_FILE(name)
#define CUDA_KERNEL(file, name, args) extern "C" void name(clipft_cuda_##args##_args);
#include "../../csrc/cuda_runtime/kernels.inc"
#undef CUDA_KERNEL

struct CUfunc_st {
    const char *file, *name;
    void (*body)(const void *);
    long launches;
};

static CUfunc_st functions[] = {
#define CUDA_KERNEL(file, name, args) {#file, #name, [](const void *a) { name(*static_cast<const clipft_cuda_##args##_args *>(a)); }, 0},
#include "../../csrc/cuda_runtime/kernels.inc"
};

struct CUmod_st {
    std::string file;
};
struct CUctx_st {
    int current; // how often it was pushed
};

static CUctx_st context;
static const char *fault;

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

static int setting(const char *name, int otherwise)
{
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

#define API extern "C" __attribute__((visibility("default")))

// Of the kernels whose names begin so.
API long emulated_launches(const char *prefix)
{
    long sum = 0;
    for (const CUfunc_st &f : functions)
        if (!strncmp(f.name, prefix, strlen(prefix))) sum += f.launches;
    return sum;
}

API void emulated_know_memory(const void *begin, size_t bytes) { emulation::know_memory(begin, bytes); }
API void emulated_forget_memory() { emulation::forget_memory(); }

API int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
API int cuDriverGetVersion(int *version) { return *version = setting("EMULATED_DRIVER", 13000), SUCCESS; }
API int cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : 101; }
API int cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice) { return *out = &context, SUCCESS; }
API int cuCtxPushCurrent_v2(CUcontext pushed) { return ++pushed->current, SUCCESS; }
API int cuCtxPopCurrent_v2(CUcontext *popped) { return --(*popped = &context)->current < 0 ? INVALID_CONTEXT : SUCCESS; }

API int cuGetErrorString(int error, const char **text)
{
    *text = error == LAUNCH_FAILED ? fault : error == 101 ? "invalid device ordinal" : "emulated error";
    return SUCCESS;
}

API int cuDeviceGetAttribute(int *value, int attribute, CUdevice)
{
    const int capability = setting("EMULATED_CAPABILITY", 90);
    *value = attribute == 38 ? setting("EMULATED_CACHE", 2 * 128 * 128 * 4) : attribute == 75 ? capability / 10 : capability % 10;
    return attribute == 38 || attribute == 75 || attribute == 76 ? SUCCESS : INVALID_VALUE;
}

// The emulated NVRTC's machine code is "emulated <file>". EMULATED_BUSY is what the first module is refused with.
API int cuModuleLoadData(CUmodule *module, const void *image)
{
    const std::string text = static_cast<const char *>(image);
    static int busy = setting("EMULATED_BUSY", SUCCESS);
    if (!context.current) return INVALID_CONTEXT;
    if (busy) return std::exchange(busy, SUCCESS);
    if (text.rfind("emulated ", 0) != 0) return INVALID_IMAGE;
    *module = new CUmod_st{text.substr(9)};
    return SUCCESS;
}

API int cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    for (CUfunc_st &f : functions)
        if (module->file == f.file && !strcmp(name, f.name)) return *function = &f, SUCCESS;
    return NOT_FOUND;
}

API int cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                       unsigned block_z, unsigned, CUstream, void **parameters, void **extra)
{
    if (!context.current) return INVALID_CONTEXT;
    if (block_y != 1 || block_z != 1 || extra) return INVALID_VALUE;
    ++function->launches;
    fault = emulation::launch(function->name, function->body, parameters[0], {grid_x, grid_y, grid_z}, block_x);
    return fault ? LAUNCH_FAILED : SUCCESS;
}
