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
#define FIND(result, name, parameters)                                                                                                     \
    found.object = dlsym(library, #name);                                                                                                  \
    clipft_torch.name = (result(*) parameters)found.function;
#define REQUIRE(result, name, parameters)                                                                                                  \
    FIND(result, name, parameters)                                                                                                         \
    if (!found.object && !missing) missing = #name;
    CLIPFT_TORCH_FUNCTIONS(REQUIRE)
    CLIPFT_TORCH_OPTIONAL_FUNCTIONS(FIND)
#undef FIND
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
#define FIND(result, name, parameters)                                                                                                     \
    found.object = dlsym(library, #name); /* finds what lies in libtorch_cpu as well, on which the library depends */                      \
    table.name = (result(*) parameters)found.function;
    CLIPFT_TORCH_CUDA_FUNCTIONS(REQUIRE)
    CLIPFT_TORCH_CUDA_OPTIONAL_FUNCTIONS(FIND)
#undef FIND
#undef REQUIRE
    dlclose(library);
    if (!missing) clipft_torch_cuda = table;
    return missing;
}

const char *clipft_torch_cuda_what(void)
{
    return clipft_torch_cuda.torch_exception_get_what_without_backtrace ? clipft_torch_cuda.torch_exception_get_what_without_backtrace()
                                                                        : NULL;
}

bool clipft_torch_product(const char *op, const char *overload, AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b, int32_t dtype)
{
    const AtenTensorHandle tensors[] = {a, b, out};
    StableIValue stack[4];
    int count = 0;
    for (int k = 0; k < 3; ++k) {
        AtenTensorHandle own; /* the dispatcher keeps those that it gets */
        if (clipft_torch.aoti_torch_new_tensor_handle(tensors[k], &own)) return false;
        if (k == 2 && dtype >= 0) stack[count++] = (StableIValue)dtype;
        stack[count++] = (StableIValue)(uintptr_t)own;
    }
    if (clipft_torch.torch_call_dispatcher(op, overload, stack, CLIPFT_TORCH_BUILD_VERSION)) return false;
    return !clipft_torch.aoti_torch_delete_tensor_object((AtenTensorHandle)(uintptr_t)stack[0]);
}
