/* Arithmetic on sizes, which are not negative. */
#ifndef CLIPFT_SIZES_H
#define CLIPFT_SIZES_H

#include <stdint.h>

static inline int64_t clipft_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t clipft_divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
static inline int64_t clipft_round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

#endif
