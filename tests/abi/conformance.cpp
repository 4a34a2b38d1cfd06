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

#include "canon.h"

#define CONFORMS(result, name, parameters)                                                                                                 \
    static_assert(std::is_same_v<canon<decltype(&::name)>::type, canon<decltype(ours::clipft_torch_abi::name)>::type>,                     \
                  #name ": csrc/torch_abi.h differs from torch");
CLIPFT_TORCH_FUNCTIONS(CONFORMS)

#undef CONFORMS
#define CONFORMS(result, name, parameters)                                                                                                 \
    static_assert(std::is_same_v<canon<decltype(&::name)>::type, canon<decltype(ours::clipft_torch_cuda_abi::name)>::type>,                \
                  #name ": csrc/torch_abi.h differs from torch");
CLIPFT_TORCH_CUDA_FUNCTIONS(CONFORMS)
