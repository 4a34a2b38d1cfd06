/* The ops' entries, from ops.inc and ops_cuda.inc. */
#ifndef CLIPFT_OPS_H
#define CLIPFT_OPS_H

#include "../torch_abi.h"

#define OP(name, schema, cpu) void cpu(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs);
#include "ops.inc"
#undef OP

#define OP_CUDA(name, entry) void entry(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs);
#include "ops_cuda.inc"
#undef OP_CUDA

#endif
