/* Float weights as int8 codes. */
#include "../table.h"
#include "int8.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { GRAIN = 16 }; /* channels that a thread takes at least */

typedef struct quantize_job {
    clipft_view w;
    int8_t *codes;
    float *scale;
} quantize_job;

/* -> its scale, NaN of one with what is not finite. */
static float quantize_channel(const float *w, int64_t in, int8_t *codes)
{
    const clipft_int8_kernels *kernels = &clipft_kernel_table.int8;
    clipft_range range = {0};
    kernels->row_range(w, in, &range);
    const float step = fmaxf(-range.low, range.high) / 127.0F, scale = step > 0.0F ? fmaxf(step, FLT_MIN) : 1.0F;
    if (isnan(range.bad)) {
        memset(codes, 0, (size_t)in);
        return NAN;
    }
    kernels->row_codes(w, in, scale, codes);
    return scale;
}

static void quantize_channels(int64_t begin, int64_t end, void *ctx)
{
    const quantize_job *job = ctx;
    for (int64_t j = begin; j < end; ++j)
        job->scale[j] = quantize_channel(clipft_view_floats(&job->w, j, 0), job->w.cols, job->codes + j * job->w.cols);
}

bool clipft_int8_quantize(const clipft_host *host, const clipft_view *w, int8_t *codes, float *scale)
{
    quantize_job job = {*w, codes, scale};
    return host->parallel_for(0, w->rows, GRAIN, quantize_channels, &job);
}
