/* What is made of ops.inc and ops_cuda.inc: for each op a struct of its arguments and one of its results, <name>_args and <name>_results,
 * whose members are the slots of a boxed call's stack, and the functions that torch calls. */
#ifndef CLIPFT_OPS_H
#define CLIPFT_OPS_H

#include "../tensor.h"

#include <string.h>

#define ARG(type, arg) clipft_slot_##type arg;
#define ARG_OR(type, arg, otherwise) clipft_slot_##type arg;
#define RESULT(type, result) clipft_slot_##type result;
#define RETURNS(type) clipft_slot_##type result;
#define OP(name, args, results)                                                                                                            \
    typedef struct name##_args {                                                                                                           \
        args                                                                                                                               \
    } name##_args;                                                                                                                         \
    typedef struct name##_results {                                                                                                        \
        results                                                                                                                            \
    } name##_results;                                                                                                                      \
    void clipft_op_##name(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs);
#include "ops.inc"
#undef OP
#undef ARG
#undef ARG_OR
#undef RESULT
#undef RETURNS

#define OP_CUDA(name) void clipft_cuda_##name(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs);
#include "ops_cuda.inc"
#undef OP_CUDA

/* Defines every op's schema in the library. */
AOTITorchError clipft_ops_define(TorchLibraryHandle library);

/* The function that torch calls, around
 *     void run_<name>(const <name>_args *args, <name>_results *results, clipft_error *error)
 * which takes every tensor out of its slot, whatever else happens. */
#define CLIPFT_ENTRY(function, name)                                                                                                       \
    void function(StableIValue *stack, uint64_t num_inputs, uint64_t num_outputs)                                                          \
    {                                                                                                                                      \
        clipft_error error = {.op = #name};                                                                                                \
        name##_results results = {0};                                                                                                      \
        name##_args args;                                                                                                                  \
        (void)num_inputs, (void)num_outputs;                                                                                               \
        memcpy(&args, stack, sizeof args);                                                                                                 \
        run_##name(&args, &results, &error);                                                                                               \
        clipft_throw(&error, __FILE__, __LINE__);                                                                                          \
        memcpy(stack, &results, sizeof results);                                                                                           \
    }
#define CLIPFT_CPU_ENTRY(name) CLIPFT_ENTRY(clipft_op_##name, name)
#define CLIPFT_CUDA_ENTRY(name) CLIPFT_ENTRY(clipft_cuda_##name, name)

#endif
