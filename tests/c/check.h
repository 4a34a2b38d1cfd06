/* The C tests' frame: counted checks, exact-size buffers that a sanitizer can watch, random numbers, and a host without torch. */
#ifndef CLIPFT_TEST_CHECK_H
#define CLIPFT_TEST_CHECK_H

#include "../../csrc/dispatch.h"
#include "../../csrc/kernels/common/host.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

extern int check_passed, check_failed;

/* |got - want| <= tolerance or equal, written so that NaN fails; both NaN passes. */
static inline void check_near(double got, double want, double tolerance, const char *what, int64_t size)
{
    if ((isnan(got) && isnan(want)) || got == want || fabs(got - want) <= tolerance) {
        ++check_passed;
    } else {
        ++check_failed;
        printf("FAILED %s [%s] size %lld: got %.9g, want %.9g, tolerance %.3g\n", what, clipft_isa_name(clipft_dispatch_isa()),
               (long long)size, got, want, tolerance);
    }
}

static inline void *check_alloc(int64_t n, size_t item)
{
    void *p = malloc((size_t)n * item + (n == 0));
    if (!p) abort();
    return p;
}

static inline float *floats(int64_t n) { return check_alloc(n, sizeof(float)); }
static inline double *doubles(int64_t n) { return check_alloc(n, sizeof(double)); }

/* Uniform in [-1, 1). */
static inline float uniform(void)
{
    static uint64_t state = 0x9e3779b97f4a7c15ULL;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (float)((double)(state >> 11) * 0x1p-52 - 1.0);
}

/* Sanitized code forms no FMA: scale * x is then rounded before a logsumexp is subtracted, which costs half an ulp of the logit. */
#ifdef CHECK_SEPARATE_ROUNDING
static const double product_rounding = 1.0;
#else
static const double product_rounding = 0.0;
#endif

/* Products by plain loops, ranges one after another. */
extern const clipft_host check_host;

void test_loss_rows(void);
void test_losses(void);
void test_convert(void);
void test_gemm(void);
void test_lora_rows(void);
void test_lora(void);
void test_int8_rows(void);
void test_int8(void);
void test_int8_lora(void);
void test_attention(void);

#endif
