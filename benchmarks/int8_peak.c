/* The most int8 operations (two a multiply-add) that the cores do a second: independent dot products in registers, one thread a core.
 * cc -O2 -march=native -pthread int8_peak.c && ./a.out THREADS */
#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { ROUNDS = 20000000, THREADS = 256 };

/* PRODUCTS: vectors of them in a step. */
#if defined(__AVX512VNNI__)
enum { CHAINS = 12, PRODUCTS = 1 };
typedef __m512i vec;
static inline vec step(vec sum, vec x, vec w) { return _mm512_dpbusd_epi32(sum, x, w); }
static inline vec fill(int v) { return _mm512_set1_epi32(v); }
#elif defined(__AVXVNNI__)
enum { CHAINS = 12, PRODUCTS = 1 };
typedef __m256i vec;
static inline vec step(vec sum, vec x, vec w) { return _mm256_dpbusd_avx_epi32(sum, x, w); }
static inline vec fill(int v) { return _mm256_set1_epi32(v); }
#else /* two products at once, as weights that are not too large allow */
enum { CHAINS = 8, PRODUCTS = 2 };
typedef __m256i vec;
static inline vec step(vec sum, vec x, vec w)
{
    const vec first = _mm256_maddubs_epi16(x, w), second = _mm256_maddubs_epi16(w, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1)));
}
static inline vec fill(int v) { return _mm256_set1_epi32(v); }
#endif

static void *work(void *out)
{
    vec sum[CHAINS], x = fill(rand()), w = fill(rand());
#pragma GCC unroll 16 /* every loop over the chains, or they live in memory */
    for (int c = 0; c < CHAINS; ++c) sum[c] = fill(c);
    for (long i = 0; i < ROUNDS; ++i)
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; ++c) {
            sum[c] = step(sum[c], x, w);
            /* The compiler may neither fold the rounds nor, without VNNI, take the product of x and w out of the loop. */
            __asm__ volatile("" : "+v"(sum[c]), "+v"(x));
        }
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) ((vec *)out)[c] = sum[c];
    return NULL;
}

int main(int argc, char **argv)
{
    static vec results[THREADS][CHAINS];
    pthread_t thread[THREADS];
    struct timespec a, b;
    const int n = argc > 1 ? atoi(argv[1]) : 1;
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int i = 0; i < n; ++i) pthread_create(&thread[i], NULL, work, results[i]);
    for (int i = 0; i < n; ++i) pthread_join(thread[i], NULL);
    clock_gettime(CLOCK_MONOTONIC, &b);
    const double seconds = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
    printf("%.1f\n", 2e-9 * (double)sizeof(vec) * PRODUCTS * CHAINS * ROUNDS * n / seconds);
    return 0;
}
