/* What every op on CUDA does: prepare the device, find torch's stream, take work space, launch kernels, multiply by cuBLAS through torch.
 * Every call only queues work on the stream. */
#ifndef CLIPFT_CUDA_RUNTIME_CALL_H
#define CLIPFT_CUDA_RUNTIME_CALL_H

#include "../../cuda/args.h"
#include "../kernels/common/sizes.h"
#include "../tensor.h"
#include "driver.h"

enum { CUDA_WORK = 16 };

typedef struct cuda_call {
    clipft_error *error;
    const clipft_tensor *beside; /* a tensor on the device */
    void *stream;
    clipft_tensor work[CUDA_WORK];
    int works;
} cuda_call;

/* For kernels of that file. Before anything is allocated, whose failure is told by what this finds in torch. `beside` outlives the call. */
bool cuda_begin(cuda_call *call, clipft_cuda_file file, const clipft_tensor *beside);
void cuda_end(cuda_call *call);

/* Work space on the device until cuda_end; NULL when there is none. */
void *cuda_work(cuda_call *call, int32_t dtype, int64_t count);

static inline int64_t cuda_blocks(int64_t items, int64_t per_block) { return clipft_divide_up(items, per_block); }

bool cuda_launch(cuda_call *call, clipft_cuda_kernel kernel, int64_t blocks_x, int64_t blocks_y, int threads, void *args);
/* Of four kernels, one a path of a matrix, in that order. */
static inline clipft_cuda_kernel cuda_by_path(clipft_cuda_kernel first, int path) { return (clipft_cuda_kernel)((int)first + path); }

/* A thread for each of `count` items. */
bool cuda_launch_items(cuda_call *call, clipft_cuda_kernel kernel, int64_t count, void *args);

/* c = a b; with `start`, a row that is added to every row; or, with `accumulate`, c += a b. All are of one dtype; or c is float32, a and b
 * are not, and neither is asked for. */
bool cuda_multiply(cuda_call *call, clipft_view c, const clipft_tensor *start, bool accumulate, clipft_view a, clipft_view b);

/* A view, or one without data, as the kernels take it. A target is contiguous. */
clipft_cuda_matrix cuda_matrix(const clipft_view *view);
clipft_cuda_target cuda_target(const clipft_view *view);

/* Records why a call of torch's failed. */
bool cuda_torch_failed(cuda_call *call, const char *what);

#endif
