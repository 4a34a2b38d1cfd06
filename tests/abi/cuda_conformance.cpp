// Each prototype of csrc/cuda_runtime/driver.h and compile.h, and each attribute number, equals the one in CUDA's own headers. Compiles or
// does not: c++ -std=c++20 -fsyntax-only -I<CUDA>/include.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <cuda.h>
#include <nvrtc.h>

namespace ours {
#include "../../csrc/cuda_runtime/compile.h"
#include "../../csrc/cuda_runtime/driver.h"
} // namespace ours

#include "canon.h"

// Result codes are enumerations there, int here.
template <class T>
requires std::is_enum_v<T>
struct canon<T> {
    using type = int;
};

#define CONFORMS_TO(api, name)                                                                                                             \
    static_assert(std::is_same_v<canon<decltype(&::name)>::type, canon<decltype(ours::api::name)>::type>, #name ": csrc differs from "     \
                                                                                                                "CUDA");
#define DRIVER(name, parameters) CONFORMS_TO(clipft_cuda_api, name)
#define NVRTC(name, parameters) CONFORMS_TO(clipft_nvrtc_api, name)
CLIPFT_CUDA_FUNCTIONS(DRIVER)
CLIPFT_NVRTC_FUNCTIONS(NVRTC)

// csrc/cuda_runtime/driver.c
static_assert(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE == 38 && CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == 75 &&
              CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == 76);
