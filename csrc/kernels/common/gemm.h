/* Float products of the losses' tiles: c = a b or c += a b, views of any strides.
 *
 * b is cut into blocks of CLIPFT_GEMM_DEPTH rows and packed once for all threads, as panels of CLIPFT_GEMM_PANEL columns, [depth, panel]
 * each, the last one filled with zeros. Each thread then packs a few rows of a at a time into the L1 cache and runs them along all panels,
 * which stay in L2: see gemm_simd.h. Sums over a block are kept in registers, so results do not depend on the number of threads. */
#ifndef CLIPFT_GEMM_H
#define CLIPFT_GEMM_H

#include "host.h"

/* a.cols > 0, c.col_stride 1. False when memory ran out or the host's threads failed. */
bool clipft_gemm(const clipft_host *host, clipft_matrix c, clipft_matrix a, clipft_matrix b, bool accumulate);

/* Element (k, i) of `to` [m.cols, width] is element (i, k) of m, which has at most `width` rows; the rest is zero. */
void clipft_gemm_pack(int64_t width, clipft_matrix m, float *to);

#endif
