/* Weights as the dot products read them: see clipft_int8_header. */
#include "../loss/tiles.h"
#include "int8.h"

#include <string.h>

enum { MAGIC = 0x38746e69 /* "int8" */ };

static int64_t panels_of(int64_t out) { return (out + CLIPFT_INT8_PANEL - 1) / CLIPFT_INT8_PANEL; }

int64_t clipft_int8_panel_bytes(int64_t in) { return (in + 3) / 4 * 4 * CLIPFT_INT8_PANEL; }

int64_t clipft_int8_packed_size(int64_t out, int64_t in)
{
    return (int64_t)sizeof(clipft_int8_header) +
           panels_of(out) * (clipft_int8_panel_bytes(in) + CLIPFT_INT8_PANEL * (int64_t)sizeof(int32_t));
}

const int8_t *clipft_int8_weights(const uint8_t *packed) { return (const int8_t *)packed + sizeof(clipft_int8_header); }

const uint8_t *clipft_int8_sums(const uint8_t *packed, int64_t out, int64_t in)
{
    return packed + sizeof(clipft_int8_header) + panels_of(out) * clipft_int8_panel_bytes(in);
}

typedef struct pack_job {
    const int8_t *w;
    int64_t out, in, row_stride, col_stride;
    uint8_t *packed;
} pack_job;

static void pack_panels(int64_t begin, int64_t end, void *ctx)
{
    const pack_job *job = ctx;
    const int64_t bytes = clipft_int8_panel_bytes(job->in);
    for (int64_t panel = begin; panel < end; ++panel) {
        int8_t *to = (int8_t *)job->packed + sizeof(clipft_int8_header) + panel * bytes;
        int32_t sums[CLIPFT_INT8_PANEL] = {0};
        memset(to, 0, (size_t)bytes);
        for (int64_t c = 0; c < clipft_min(CLIPFT_INT8_PANEL, job->out - panel * CLIPFT_INT8_PANEL); ++c) {
            const int8_t *row = job->w + (panel * CLIPFT_INT8_PANEL + c) * job->row_stride;
            for (int64_t k = 0; k < job->in; ++k) {
                const int8_t value = row[k * job->col_stride];
                to[k / 4 * 4 * CLIPFT_INT8_PANEL + 4 * c + k % 4] = value;
                sums[c] += value;
            }
        }
        memcpy(job->packed + (clipft_int8_sums(job->packed, job->out, job->in) - job->packed) + panel * (int64_t)sizeof sums, sums,
               sizeof sums);
    }
}

bool clipft_int8_pack(const clipft_host *host, const int8_t *w, int64_t out, int64_t in, int64_t row_stride, int64_t col_stride,
                      uint8_t *packed)
{
    pack_job job = {w, out, in, row_stride, col_stride, packed};
    const clipft_int8_header header = {.magic = MAGIC, .out = out, .in = in};
    memcpy(packed, &header, sizeof header);
    return host->parallel_for(0, panels_of(out), 4, pack_panels, &job);
}

bool clipft_int8_packed(const uint8_t *packed, int64_t size, clipft_int8_header *header)
{
    if (size < (int64_t)sizeof *header) return false;
    memcpy(header, packed, sizeof *header); /* it may lie anywhere */
    if (header->magic != MAGIC || header->out <= 0 || header->out > CLIPFT_INT8_MAX_OUT) return false;
    if (header->in <= 0 || header->in > CLIPFT_INT8_MAX_IN) return false;
    return clipft_int8_packed_size(header->out, header->in) == size;
}
