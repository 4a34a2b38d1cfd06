#include "cpu.h"

static const char *const names[CLIPFT_ISA_COUNT] = {"ref", "neon", "avx2", "avx512"};

const char *clipft_isa_name(clipft_isa isa) { return names[isa]; }

#if defined(__x86_64__)
#include <cpuid.h>

/* XCR0 bits that the operating system sets when it saves the registers: XMM | YMM, and opmask | ZMM_Hi256 | Hi16_ZMM beside them. */
enum { XCR0_AVX = 0x06, XCR0_AVX512 = 0xe6 };

static unsigned xcr0(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

bool clipft_cpu_has(clipft_isa isa)
{
    unsigned a, b, c, d, b7, saved;
    if (isa == CLIPFT_ISA_REF) return true;
    if (isa == CLIPFT_ISA_NEON) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
    if ((c & (bit_OSXSAVE | bit_FMA | bit_F16C)) != (bit_OSXSAVE | bit_FMA | bit_F16C)) return false;
    saved = xcr0();
    if (!__get_cpuid_count(7, 0, &a, &b7, &c, &d)) return false;
    if ((saved & XCR0_AVX) != XCR0_AVX || !(b7 & bit_AVX2)) return false;
    if (isa == CLIPFT_ISA_AVX2) return true;
    const unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return (saved & XCR0_AVX512) == XCR0_AVX512 && (b7 & avx512) == avx512;
}
#elif defined(__aarch64__)
bool clipft_cpu_has(clipft_isa isa) { return isa == CLIPFT_ISA_REF || isa == CLIPFT_ISA_NEON; }
#else
bool clipft_cpu_has(clipft_isa isa) { return isa == CLIPFT_ISA_REF; }
#endif

clipft_isa clipft_cpu_best(void)
{
    int isa = CLIPFT_ISA_COUNT - 1;
    while (!clipft_cpu_has((clipft_isa)isa)) --isa;
    return (clipft_isa)isa;
}
