#include "cpu.h"

static const char *const names[CLIPFT_ISA_COUNT] = {"ref",      "neon",   "neon_dot",    "neon_i8mm", "avx2",
                                                    "avx_vnni", "avx512", "avx512_vnni", "amx"};

const char *clipft_isa_name(clipft_isa isa) { return names[isa]; }

#if defined(__x86_64__)
#include <cpuid.h>

/* XCR0 bits that the operating system sets when it saves the registers: XMM | YMM, opmask | ZMM_Hi256 | Hi16_ZMM beside them, and
 * TILECFG | TILEDATA. */
enum { XCR0_AVX = 0x06, XCR0_AVX512 = 0xe6, XCR0_AMX = 0x60000 };

static unsigned xcr0(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

/* Of a sub-leaf of leaf 7: zero where the CPU lacks it. */
typedef struct features {
    unsigned eax, ebx, ecx, edx;
} features;

static features leaf7(unsigned subleaf)
{
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || a < subleaf) return (features){0};
    if (!__get_cpuid_count(7, subleaf, &a, &b, &c, &d)) return (features){0};
    return (features){a, b, c, d};
}

static bool has_avx2(void)
{
    const unsigned needed = bit_OSXSAVE | bit_FMA;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return false;
    return (xcr0() & XCR0_AVX) == XCR0_AVX && (leaf7(0).ebx & bit_AVX2);
}

static bool has_avx512(void)
{
    const unsigned needed = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return has_avx2() && (xcr0() & XCR0_AVX512) == XCR0_AVX512 && (leaf7(0).ebx & needed) == needed;
}

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* The tiles are 8 KiB more to save a thread, which Linux (5.16 and later) wants to be asked for, once a process; forks have it too. */
static bool may_use_tiles(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA */
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#else
static bool may_use_tiles(void) { return false; }
#endif

static bool has_amx(void)
{
    const unsigned needed = 1U << 24 | 1U << 25; /* leaf 7, EDX: AMX-TILE, AMX-INT8 */
    return has_avx512() && (xcr0() & XCR0_AMX) == XCR0_AMX && (leaf7(0).edx & needed) == needed && may_use_tiles();
}

bool clipft_cpu_is_amd(void)
{
    unsigned a, b = 0, c = 0, d = 0;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
}

bool clipft_cpu_has(clipft_isa isa)
{
    enum { AVX_VNNI = 1U << 4 }; /* leaf 7, sub-leaf 1, EAX */
    if (isa == CLIPFT_ISA_REF) return true;
    if (isa == CLIPFT_ISA_AVX2) return has_avx2();
    if (isa == CLIPFT_ISA_AVX_VNNI) return has_avx2() && (leaf7(1).eax & AVX_VNNI);
    if (isa == CLIPFT_ISA_AVX512) return has_avx512();
    if (isa == CLIPFT_ISA_AMX) return has_amx();
    return isa == CLIPFT_ISA_AVX512_VNNI && has_avx512() && (leaf7(0).ecx & bit_AVX512VNNI);
}
#elif defined(__aarch64__)
#if defined(__APPLE__)
#include <sys/sysctl.h>

static bool has(const char *feature)
{
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, NULL, 0) == 0 && value;
}

static bool has_dot(void) { return has("hw.optional.arm.FEAT_DotProd"); }
static bool has_i8mm(void) { return has("hw.optional.arm.FEAT_I8MM"); }
#else
#include <sys/auxv.h>

/* Linux's bits, by value: older headers lack the second. */
static bool has_dot(void) { return getauxval(AT_HWCAP) & 1UL << 20; }
static bool has_i8mm(void) { return getauxval(AT_HWCAP2) & 1UL << 13; }
#endif

bool clipft_cpu_has(clipft_isa isa)
{
    if (isa == CLIPFT_ISA_NEON_DOT) return has_dot();
    if (isa == CLIPFT_ISA_NEON_I8MM) return has_dot() && has_i8mm();
    return isa == CLIPFT_ISA_REF || isa == CLIPFT_ISA_NEON;
}
#else
bool clipft_cpu_has(clipft_isa isa) { return isa == CLIPFT_ISA_REF; }
#endif

#if !defined(__x86_64__)
bool clipft_cpu_is_amd(void) { return false; }
#endif
