/* A [rows, cols] matrix of any float dtype and strides, read and written in float32 a piece of a row at a time. */
#ifndef CLIPFT_VIEWS_H
#define CLIPFT_VIEWS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum clipft_float_kind { CLIPFT_FLOAT32, CLIPFT_BFLOAT16, CLIPFT_FLOAT16 } clipft_float_kind;

typedef struct clipft_view {
    void *data;
    int64_t rows, cols, row_stride, col_stride;
    clipft_float_kind kind;
} clipft_view;

/* Address of element (row, col) of a float32 view. */
static inline float *clipft_view_floats(const clipft_view *view, int64_t row, int64_t col)
{
    return (float *)view->data + row * view->row_stride + col * view->col_stride;
}

/* Whether rows can be used in place. */
static inline bool clipft_view_plain(const clipft_view *view) { return view->kind == CLIPFT_FLOAT32 && view->col_stride == 1; }

/* dst[0 .. n) = elements (row, col ..). */
void clipft_view_read(const clipft_view *view, int64_t row, int64_t col, int64_t n, float *dst);
/* Elements (row, col ..) = src[0 .. n), rounded to nearest even. */
void clipft_view_write(const clipft_view *view, int64_t row, int64_t col, int64_t n, const float *src);

/* dst[i][j] = view[i][j], rows `stride` apart, zeros up to there. */
void clipft_view_pack(const clipft_view *view, float *dst, int64_t stride);

/* Rows begin .. end - 1. */
static inline clipft_view clipft_view_rows(clipft_view v, int64_t begin, int64_t end)
{
    const ptrdiff_t item = v.kind == CLIPFT_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
    return (clipft_view){(char *)v.data + item * begin * v.row_stride, end - begin, v.cols, v.row_stride, v.col_stride, v.kind};
}

static inline clipft_view clipft_view_transposed(clipft_view v)
{
    return (clipft_view){v.data, v.cols, v.rows, v.col_stride, v.row_stride, v.kind};
}

#endif
