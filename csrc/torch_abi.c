#define _GNU_SOURCE /* dladdr */
#include "torch_abi.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

clipft_torch_abi clipft_torch;
clipft_torch_cuda_abi clipft_torch_cuda;

/* ISO C has no cast from an object pointer to a function pointer; POSIX gives dlsym's result this meaning. */
typedef union symbol {
    void *object;
    void (*function)(void);
} symbol;

const char *clipft_torch_resolve(const char *path)
{
    const char *missing = NULL;
    symbol found;
    void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!library) return path;
#define RESOLVE(result, name, parameters)                                                                                                  \
    found.object = dlsym(library, #name);                                                                                                  \
    if (!found.object && !missing) missing = #name;                                                                                        \
    clipft_torch.name = (result(*) parameters)found.function;
    CLIPFT_TORCH_FUNCTIONS(RESOLVE)
#undef RESOLVE
    dlclose(library); /* drops our reference; torch keeps its own for the life of the process */
    return missing;
}

bool clipft_torch_library(const char *name, char *path, size_t size)
{
    Dl_info info;
    symbol known = {.function = (void (*)(void))clipft_torch.aoti_torch_check};
    if (!dladdr(known.object, &info) || !info.dli_fname) return false;
    const char *slash = strrchr(info.dli_fname, '/');
    const int folder = slash ? (int)(slash - info.dli_fname) : 0;
    const int n = snprintf(path, size, "%.*s/%s", folder, info.dli_fname, name);
    return n > 0 && (size_t)n < size;
}

static void *open_libtorch_cuda(void)
{
    char path[4096];
    return clipft_torch_library("libtorch_cuda.so", path, sizeof path) ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : NULL;
}

bool clipft_torch_has_cuda(void)
{
    void *library = open_libtorch_cuda();
    if (library) dlclose(library);
    return library != NULL;
}

const char *clipft_torch_cuda_resolve(void)
{
    const char *missing = NULL;
    symbol found;
    if (clipft_torch_cuda.aoti_torch_get_current_cuda_stream) return NULL;
    void *library = open_libtorch_cuda();
    if (!library) return "libtorch_cuda.so";
    clipft_torch_cuda_abi table = {0};
#define RESOLVE(result, name, parameters)                                                                                                  \
    found.object = dlsym(library, #name); /* finds what lies in libtorch_cpu as well, on which the library depends */                      \
    if (!found.object && !missing) missing = #name;                                                                                        \
    table.name = (result(*) parameters)found.function;
    CLIPFT_TORCH_CUDA_FUNCTIONS(RESOLVE)
#undef RESOLVE
    dlclose(library);
    if (!missing) clipft_torch_cuda = table;
    return missing;
}
