#include "torch_abi.h"

#include <dlfcn.h>

clipft_torch_abi clipft_torch;

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
