/* A float32 matrix in memory. Matrices are row-major where nothing else is said; sizes are int64_t; comments give shapes as [rows, cols].
 */
#ifndef CLIPFT_MATRIX_H
#define CLIPFT_MATRIX_H

#include <stdint.h>

/* A view: element (i, j) lies at data[i * row_stride + j * col_stride]. */
typedef struct clipft_matrix {
    float *data;
    int64_t rows, cols, row_stride, col_stride;
} clipft_matrix;

static inline clipft_matrix clipft_transposed(clipft_matrix m)
{
    return (clipft_matrix){m.data, m.cols, m.rows, m.col_stride, m.row_stride};
}

/* Rows begin .. end - 1. */
static inline clipft_matrix clipft_rows(clipft_matrix m, int64_t begin, int64_t end)
{
    return (clipft_matrix){m.data + begin * m.row_stride, end - begin, m.cols, m.row_stride, m.col_stride};
}

#endif
