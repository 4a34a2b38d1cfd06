/* Weights as the dot products read them: see clipft_int8_header. */
#include "../common/sizes.h"
#include "../table.h"
#include "int8.h"

#include <string.h>

enum { MAGIC = 0x38746e69 /* "int8" */, SUM_BYTES = CLIPFT_INT8_PANEL * sizeof(int32_t) };

static int64_t panels_of(int64_t out) { return clipft_divide_up(out, CLIPFT_INT8_PANEL); }

int64_t clipft_int8_panel_bytes(const clipft_int8_dot *dot, int64_t in) { return clipft_round_up(in, dot->depth) * CLIPFT_INT8_PANEL; }

int64_t clipft_int8_panel_marks(int64_t panel_bytes) { return clipft_divide_up(panel_bytes / CLIPFT_INT8_PANEL, 64); }

int64_t clipft_int8_packed_size(int64_t out, int64_t in)
{
    const int64_t bytes = clipft_int8_panel_bytes(clipft_kernel_table.int8.dot, in);
    return (int64_t)sizeof(clipft_int8_header) + panels_of(out) * (bytes + SUM_BYTES + clipft_int8_panel_marks(bytes));
}

const int8_t *clipft_int8_panels(const uint8_t *packed) { return (const int8_t *)packed + sizeof(clipft_int8_header); }

const uint8_t *clipft_int8_sums(const uint8_t *packed, int64_t out, int64_t panel_bytes)
{
    return packed + sizeof(clipft_int8_header) + panels_of(out) * panel_bytes;
}

const uint8_t *clipft_int8_marks(const uint8_t *packed, int64_t out, int64_t panel_bytes)
{
    return clipft_int8_sums(packed, out, panel_bytes) + panels_of(out) * SUM_BYTES;
}

/* Channels whose weights lie side by side: a quad at a time. */
static void pack_rows(const clipft_int8_weights *weights, int8_t *panel, int32_t *sums)
{
    const clipft_int8_weights w = *weights; /* which a byte that is written might be a part of */
    for (int64_t c = 0; c < w.out; ++c) {
        const int8_t *row = w.data + c * w.row_stride;
        int32_t sum = 0;
        int64_t k = 0;
        for (; k < w.in; ++k) sum += row[k];
        for (k = 0; k + 4 <= w.in; k += 4) memcpy(panel + k * CLIPFT_INT8_PANEL + 4 * c, row + k, 4);
        for (; k < w.in; ++k) panel[k / 4 * 4 * CLIPFT_INT8_PANEL + 4 * c + k % 4] = row[k];
        sums[c] += sum;
    }
}

/* A whole panel of channels that lie side by side, as those of a transpose do: four of their rows become a line of quads. */
static void pack_columns(const clipft_int8_weights *weights, int8_t *panel, int32_t *sums)
{
    const clipft_int8_weights w = *weights;
    int32_t sum[CLIPFT_INT8_PANEL] = {0};
    for (int64_t k = 0; k < w.in; k += 4) {
        int8_t rows[4][CLIPFT_INT8_PANEL] = {0}, line[4 * CLIPFT_INT8_PANEL];
        for (int64_t d = 0; d < 4 && k + d < w.in; ++d) memcpy(rows[d], w.data + (k + d) * w.col_stride, sizeof rows[d]);
        for (int c = 0; c < CLIPFT_INT8_PANEL; ++c)
            for (int d = 0; d < 4; ++d) line[4 * c + d] = rows[d][c];
        for (int c = 0; c < CLIPFT_INT8_PANEL; ++c) sum[c] += rows[0][c] + rows[1][c] + rows[2][c] + rows[3][c];
        memcpy(panel + k * CLIPFT_INT8_PANEL, line, sizeof line);
    }
    for (int c = 0; c < CLIPFT_INT8_PANEL; ++c) sums[c] += sum[c];
}

void clipft_int8_pack_quads(const clipft_int8_weights *weights, int8_t *panel, int32_t *sums)
{
    const clipft_int8_weights w = *weights;
    if (w.col_stride == 1) {
        pack_rows(&w, panel, sums);
        return;
    }
    if (w.row_stride == 1 && w.out == CLIPFT_INT8_PANEL) {
        pack_columns(&w, panel, sums);
        return;
    }
    for (int64_t c = 0; c < w.out; ++c)
        for (int64_t k = 0; k < w.in; ++k) {
            const int8_t value = w.data[c * w.row_stride + k * w.col_stride];
            panel[k / 4 * 4 * CLIPFT_INT8_PANEL + 4 * c + k % 4] = value;
            sums[c] += value;
        }
}

void clipft_int8_unpack_quads(const int8_t *panel, int64_t channels, int64_t in, int8_t *w)
{
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < in; ++k) w[c * in + k] = panel[k / 4 * 4 * CLIPFT_INT8_PANEL + 4 * c + k % 4];
}

typedef struct pack_job {
    const clipft_int8_weights *w;
    const clipft_int8_dot *dot;
    uint8_t *packed;
} pack_job;

/* Of a transpose, whose panels share cache lines, so much depth of all panels at a time as the L1 cache holds the lines of. */
static int64_t step_of(const pack_job *job)
{
    enum { STEP = 32 };
    return job->dot->layout == CLIPFT_INT8_QUADS && job->w->row_stride == 1 ? STEP : job->w->in;
}

static void pack_panels(int64_t begin, int64_t end, void *ctx)
{
    const pack_job *job = ctx;
    const clipft_int8_weights *w = job->w;
    const int64_t bytes = clipft_int8_panel_bytes(job->dot, w->in), step = step_of(job), marked = clipft_int8_panel_marks(bytes);
    uint8_t *all_sums = job->packed + (clipft_int8_sums(job->packed, w->out, bytes) - job->packed);
    uint8_t *marks = job->packed + (clipft_int8_marks(job->packed, w->out, bytes) - job->packed);
    int8_t *panels = (int8_t *)job->packed + sizeof(clipft_int8_header);
    int32_t sums[CLIPFT_INT8_PANEL];
    memset(panels + begin * bytes, 0, (size_t)((end - begin) * bytes));
    memset(all_sums + begin * SUM_BYTES, 0, (size_t)((end - begin) * SUM_BYTES));
    memset(marks + begin * marked, 0, (size_t)((end - begin) * marked));
    for (int64_t k = 0; k < w->in; k += step)
        for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t first = panel * CLIPFT_INT8_PANEL;
            const clipft_int8_weights part = {w->data + first * w->row_stride + k * w->col_stride,
                                              clipft_min(CLIPFT_INT8_PANEL, w->out - first), clipft_min(step, w->in - k), w->row_stride,
                                              w->col_stride};
            uint8_t *own = all_sums + panel * SUM_BYTES;
            memcpy(sums, own, sizeof sums);
            job->dot->pack(&part, panels + panel * bytes + k * CLIPFT_INT8_PANEL, sums);
            memcpy(own, sums, sizeof sums);
        }
    for (int64_t panel = begin; job->dot->mark && panel < end; ++panel)
        job->dot->mark(panels + panel * bytes, bytes / CLIPFT_INT8_PANEL, marks + panel * marked);
}

bool clipft_int8_pack(const clipft_host *host, const clipft_int8_weights *w, uint8_t *packed)
{
    pack_job job = {w, clipft_kernel_table.int8.dot, packed};
    const clipft_int8_header header = {.magic = MAGIC, .out = w->out, .in = w->in, .layout = job.dot->layout};
    memcpy(packed, &header, sizeof header);
    return host->parallel_for(0, panels_of(w->out), 4, pack_panels, &job);
}

typedef struct unpack_job {
    const clipft_int8_dot *dot;
    const uint8_t *packed;
    clipft_int8_header header;
    int8_t *w;
} unpack_job;

static void unpack_panels(int64_t begin, int64_t end, void *ctx)
{
    const unpack_job *job = ctx;
    const int64_t bytes = clipft_int8_panel_bytes(job->dot, job->header.in);
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * CLIPFT_INT8_PANEL;
        job->dot->unpack(clipft_int8_panels(job->packed) + panel * bytes, clipft_min(CLIPFT_INT8_PANEL, job->header.out - first),
                         job->header.in, job->w + first * job->header.in);
    }
}

bool clipft_int8_unpack(const clipft_host *host, const uint8_t *packed, int8_t *w)
{
    unpack_job job = {.dot = clipft_kernel_table.int8.dot, .packed = packed, .w = w};
    memcpy(&job.header, packed, sizeof job.header);
    return host->parallel_for(0, panels_of(job.header.out), 4, unpack_panels, &job);
}

bool clipft_int8_packed(const uint8_t *packed, int64_t size, clipft_int8_header *header)
{
    if (size < (int64_t)sizeof *header) return false;
    memcpy(header, packed, sizeof *header); /* it may lie anywhere */
    if (header->magic != MAGIC || header->layout != (int64_t)clipft_kernel_table.int8.dot->layout) return false;
    if (header->out <= 0 || header->out > CLIPFT_INT8_MAX_OUT || header->in <= 0 || header->in > CLIPFT_INT8_MAX_IN) return false;
    return clipft_int8_packed_size(header->out, header->in) == size;
}
