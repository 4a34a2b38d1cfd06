// Each prototype of csrc/torch_abi.h equals the one in torch's own headers. Compiles or does not: c++ -std=c++20 -fsyntax-only
// -I<torch>/include.
#include <cstdbool>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#define USE_CUDA // declares what libtorch_cuda has besides
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/version.h>

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
#define CLIPFT_TORCH_SINCE_2_13(function)
#else
#define CLIPFT_TORCH_SINCE_2_13(function) function
#endif
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 11
#define CLIPFT_TORCH_SINCE_2_11(function)
#else
#define CLIPFT_TORCH_SINCE_2_11(function) function
#endif

namespace ours {
#include "../../csrc/torch_abi.h"
}

#include "canon.h"

#define CONFORMS(result, name, parameters)                                                                                                 \
    static_assert(std::is_same_v<canon<decltype(&::name)>::type, canon<decltype(ours::clipft_torch_abi::name)>::type>,                     \
                  #name ": csrc/torch_abi.h differs from torch");
CLIPFT_TORCH_FUNCTIONS(CONFORMS)
CLIPFT_TORCH_OPTIONAL_FUNCTIONS(CONFORMS)

#undef CONFORMS
#define CONFORMS(result, name, parameters)                                                                                                 \
    static_assert(std::is_same_v<canon<decltype(&::name)>::type, canon<decltype(ours::clipft_torch_cuda_abi::name)>::type>,                \
                  #name ": csrc/torch_abi.h differs from torch");
CLIPFT_TORCH_CUDA_FUNCTIONS(CONFORMS)
CLIPFT_TORCH_CUDA_OPTIONAL_FUNCTIONS(CONFORMS)

// csrc/tensor.c names devices by these.
static_assert((int)c10::DeviceType::CPU == 0 && (int)c10::DeviceType::CUDA == 1 && (int)c10::DeviceType::HIP == 6 &&
              (int)c10::DeviceType::XLA == 9 && (int)c10::DeviceType::XPU == 12 && (int)c10::DeviceType::MPS == 13 &&
              (int)c10::DeviceType::Meta == 14 && (int)c10::DeviceType::HPU == 15 && (int)c10::DeviceType::MTIA == 19 &&
              (int)c10::DeviceType::PrivateUse1 == 20);
