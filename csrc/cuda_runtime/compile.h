/* Device code to machine code, by NVRTC, and kept on disk. */
#ifndef CLIPFT_CUDA_RUNTIME_COMPILE_H
#define CLIPFT_CUDA_RUNTIME_COMPILE_H

#include <stdbool.h>
#include <stddef.h>

typedef struct _nvrtcProgram *nvrtcProgram;
typedef int clipft_nvrtc_result; /* nvrtcResult; 0 is success */

#define CLIPFT_NVRTC_FUNCTIONS(X)                                                                                                          \
    X(nvrtcVersion, (int *major, int *minor))                                                                                              \
    X(nvrtcGetNumSupportedArchs, (int *count))                                                                                             \
    X(nvrtcGetSupportedArchs, (int *archs))                                                                                                \
    X(nvrtcCreateProgram,                                                                                                                  \
      (nvrtcProgram * program, const char *source, const char *name, int headers, const char *const *contents, const char *const *names))  \
    X(nvrtcCompileProgram, (nvrtcProgram program, int options, const char *const *option))                                                 \
    X(nvrtcGetProgramLogSize, (nvrtcProgram program, size_t * size))                                                                       \
    X(nvrtcGetProgramLog, (nvrtcProgram program, char *log))                                                                               \
    X(nvrtcGetCUBINSize, (nvrtcProgram program, size_t * size))                                                                            \
    X(nvrtcGetCUBIN, (nvrtcProgram program, char *image))                                                                                  \
    X(nvrtcDestroyProgram, (nvrtcProgram * program))

#define CLIPFT_NVRTC_MEMBER(name, parameters) clipft_nvrtc_result(*name) parameters;
typedef struct clipft_nvrtc_api {
    CLIPFT_NVRTC_FUNCTIONS(CLIPFT_NVRTC_MEMBER)
} clipft_nvrtc_api;
#undef CLIPFT_NVRTC_MEMBER

typedef struct clipft_cuda_target_gpu {
    int major, minor; /* compute capability */
    int driver;       /* version, as 13000 */
} clipft_cuda_target_gpu;

/* That the device code in the folder is what this C was compiled with, whose structs it shares: after an update of a source tree it may be
 * newer. Builds without CLIPFT_CUDA_DIGEST (the tests', which break device code on purpose) take any. */
bool clipft_cuda_check_device_code(const char *folder, char *problem, size_t problem_size);

/* The machine code (a cubin) of <folder>/<name>.cu for that GPU; free it. NULL with a sentence in `problem`.
 *
 * It is taken from the disk ($XDG_CACHE_HOME or ~/.cache, clipft/cuda) where the same source, options, NVRTC (to its patch release) and
 * driver made it before. A file there appears whole under a name that tells all of these, and is checked when read, so any number of
 * processes may use the folder at once; where it cannot be written, every process compiles. Only regular files of this user's are read, and
 * those unused for 90 days are removed when one is written. */
char *clipft_cuda_cubin(const char *folder, const char *name, const clipft_cuda_target_gpu *gpu, char *problem, size_t problem_size);

#endif
