#include "views.h"

#include "convert.h"

#include <string.h>

/* Rows of 16-bit floats are converted this many at a time where their elements do not lie together. */
enum { PIECE = 64 };

static void widen(clipft_float_kind kind, const uint16_t *src, float *dst, int64_t n)
{
    if (kind == CLIPFT_BFLOAT16)
        clipft_bfloat16_to_float(src, dst, n);
    else
        clipft_float16_to_float(src, dst, n);
}

static void narrow(clipft_float_kind kind, const float *src, uint16_t *dst, int64_t n)
{
    if (kind == CLIPFT_BFLOAT16)
        clipft_float_to_bfloat16(src, dst, n);
    else
        clipft_float_to_float16(src, dst, n);
}

void clipft_view_read(const clipft_view *view, int64_t row, int64_t col, int64_t n, float *dst)
{
    const int64_t first = row * view->row_stride + col * view->col_stride, step = view->col_stride;
    if (view->kind == CLIPFT_FLOAT32) {
        const float *src = (const float *)view->data + first;
        if (step == 1)
            memcpy(dst, src, (size_t)n * sizeof *dst);
        else
            for (int64_t j = 0; j < n; ++j) dst[j] = src[j * step];
        return;
    }
    const uint16_t *src = (const uint16_t *)view->data + first;
    if (step == 1) {
        widen(view->kind, src, dst, n);
        return;
    }
    for (int64_t j = 0; j < n; j += PIECE) {
        uint16_t piece[PIECE];
        const int64_t m = n - j < PIECE ? n - j : PIECE;
        for (int64_t k = 0; k < m; ++k) piece[k] = src[(j + k) * step];
        widen(view->kind, piece, dst + j, m);
    }
}

void clipft_view_write(const clipft_view *view, int64_t row, int64_t col, int64_t n, const float *src)
{
    const int64_t first = row * view->row_stride + col * view->col_stride, step = view->col_stride;
    if (view->kind == CLIPFT_FLOAT32) {
        float *dst = (float *)view->data + first;
        if (step == 1)
            memcpy(dst, src, (size_t)n * sizeof *dst);
        else
            for (int64_t j = 0; j < n; ++j) dst[j * step] = src[j];
        return;
    }
    uint16_t *dst = (uint16_t *)view->data + first;
    if (step == 1) {
        narrow(view->kind, src, dst, n);
        return;
    }
    for (int64_t j = 0; j < n; j += PIECE) {
        uint16_t piece[PIECE];
        const int64_t m = n - j < PIECE ? n - j : PIECE;
        narrow(view->kind, src + j, piece, m);
        for (int64_t k = 0; k < m; ++k) dst[(j + k) * step] = piece[k];
    }
}

/* Along whichever side of the view lies together in memory. */
void clipft_view_pack(const clipft_view *view, float *dst, int64_t stride)
{
    const int64_t rows = view->rows, cols = view->cols;
    if (view->col_stride == 1 || view->row_stride != 1) {
        for (int64_t i = 0; i < rows; ++i) clipft_view_read(view, i, 0, cols, dst + i * stride);
    } else {
        const clipft_view columns = clipft_view_transposed(*view);
        for (int64_t i0 = 0; i0 < rows; i0 += PIECE) {
            float piece[PIECE];
            const int64_t m = rows - i0 < PIECE ? rows - i0 : PIECE;
            for (int64_t j = 0; j < cols; ++j) {
                clipft_view_read(&columns, j, i0, m, piece);
                for (int64_t i = 0; i < m; ++i) dst[(i0 + i) * stride + j] = piece[i];
            }
        }
    }
    for (int64_t i = 0; i < rows; ++i) memset(dst + i * stride + cols, 0, (size_t)(stride - cols) * sizeof *dst);
}
