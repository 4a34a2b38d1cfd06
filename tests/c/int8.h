/* What the tests of the int8 kernels and of the driver over them share. */
#ifndef CLIPFT_TEST_INT8_H
#define CLIPFT_TEST_INT8_H

#include "../../csrc/kernels/int8/int8.h"
#include "check.h"

#include <float.h>
#include <string.h>

static const double u = 0x1p-24;
#define COUNT(array) (int)(sizeof(array) / sizeof *(array))

static inline int pick(int low, int high) { return low + (int)((uniform() * 0.5F + 0.5F) * (float)(high - low + 1)); }

static inline void check_same(const void *got, const void *want, size_t bytes, const char *what, int64_t size)
{
    check_near(memcmp(got, want, bytes) != 0, 0.0, 0.0, what, size);
}

/* A random matrix with room between its rows or, transposed, its columns. */
static inline clipft_view make_view(int64_t rows, int64_t cols, bool transposed, clipft_float_kind kind)
{
    const int64_t ld = transposed ? rows + 1 : cols + 3;
    clipft_view v = {check_alloc((transposed ? cols : rows) * ld, 4), rows, cols, transposed ? 1 : ld, transposed ? ld : 1, kind};
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j) {
            const float value = uniform() + 0.3F;
            clipft_view_write(&v, i, j, 1, &value);
        }
    return v;
}

static inline double held(const clipft_view *v, int64_t i, int64_t j)
{
    float x;
    clipft_view_read(v, i, j, 1, &x);
    return (double)x;
}

/* Levels of a row by the definition; false where it holds what is not finite. */
static inline bool row_levels(const clipft_view *x, int64_t i, double *level, double *scale)
{
    float low = 0.0F, high = 0.0F;
    for (int64_t j = 0; j < x->cols; ++j) {
        const float v = (float)held(x, i, j);
        if (!isfinite(v)) return false;
        low = fminf(low, v), high = fmaxf(high, v);
    }
    const float step = fmaxf(high / 127.0F - low / 127.0F, FLT_MIN), inverse = 1.0F / step;
    const double zero = -nearbyint((double)(float)((double)low * (double)inverse));
    for (int64_t j = 0; j < x->cols; ++j) {
        const double q = nearbyint((double)(float)(held(x, i, j) * (double)inverse)) + zero;
        level[j] = (q > 127 ? 127 : q < 0 ? 0 : q) - zero;
    }
    *scale = (double)step;
    return true;
}

static inline double exponent_of_tanh(double v) { return sqrt(8.0 / acos(-1.0)) * (v + 0.044715 * v * v * v); }

static inline double activated(double v, clipft_activation activation)
{
    if (activation == CLIPFT_QUICK_GELU) return v / (1.0 + exp(-1.702 * v));
    if (activation == CLIPFT_GELU) return 0.5 * v * erfc(-v * sqrt(0.5));
    if (activation == CLIPFT_GELU_TANH) return v / (1.0 + exp(-exponent_of_tanh(v)));
    return v;
}

/* Four roundings before the activation, whose slope is at most 1.13; then quick_gelu's exponential (2 u and u |t| for its argument's
 * rounding), gelu_tanh's (5 u |t|, as far as the exponential counts beside 1), or gelu's erfc, whose formula errs by 0.75e-7 |v| and is
 * evaluated with a few roundings of numbers below 1. */
static inline double tolerance(double v, double size, clipft_activation activation)
{
    const double before = 4.0 * u * size * 1.13;
    if (activation == CLIPFT_QUICK_GELU) return before + u * (8.0 + 4.0 * fabs(v)) * fabs(activated(v, activation)) + 1e-36;
    if (activation == CLIPFT_GELU_TANH) {
        const double t = exponent_of_tanh(v);
        return before + u * (8.0 + 5.0 * fabs(t) / (1.0 + exp(t))) * fabs(activated(v, activation)) + 1e-36;
    }
    return activation == CLIPFT_GELU ? before + (1e-7 + 8.0 * u) * fabs(v) : before;
}

#endif
