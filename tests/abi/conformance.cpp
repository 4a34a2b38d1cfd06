// Each prototype of csrc/torch_abi.h equals the one in torch's own headers. Compiles or does not: c++ -std=c++20 -fsyntax-only -I<torch>/include.
#include <cstdbool>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#define USE_CUDA // declares what libtorch_cuda has besides
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/c/shim.h>

namespace ours
{
#include "../../csrc/torch_abi.h"
}

// Both sides have opaque handles of their own: a pointer to any class counts as void *, to a pointer to one as void **.
template <class T> struct canon {
    using type = T;
};
template <class T>
    requires std::is_class_v<T>
struct canon<T *> {
    using type = void *;
};
template <class T>
    requires std::is_class_v<T>
struct canon<T **> {
    using type = void **;
};
template <class R, class... A> struct canon<R (*)(A...)> {
    using type = typename canon<R>::type (*)(typename canon<A>::type...);
};
template <class R, class... A> struct canon<R (*)(A...) noexcept> : canon<R (*)(A...)> {
};

#define CONFORMS(result, name, parameters)                                                                                                 \
    static_assert(std::is_same_v<canon<decltype(&::name)>::type, canon<decltype(ours::clipft_torch_abi::name)>::type>,                     \
                  #name ": csrc/torch_abi.h differs from torch");
CLIPFT_TORCH_FUNCTIONS(CONFORMS)

#undef CONFORMS
#define CONFORMS(result, name, parameters)                                                                                                 \
    static_assert(std::is_same_v<canon<decltype(&::name)>::type, canon<decltype(ours::clipft_torch_cuda_abi::name)>::type>,                \
                  #name ": csrc/torch_abi.h differs from torch");
CLIPFT_TORCH_CUDA_FUNCTIONS(CONFORMS)
