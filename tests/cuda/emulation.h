// CUDA's words for plain C++, so that cuda/*.cu run on the CPU: g++ -include emulation.h -x c++ cuda/<name>.cu.
//
// A block's threads are fibers, run one after another from one point of waiting to the next: __syncthreads for the block, a shuffle for the
// warp. Every access to global or shared memory is checked: it must lie within the allocation that its pointer points into (see
// emulation.cpp), and must not race. Two accesses to an element, one of them a write, by two threads race unless the threads met in
// between: at a barrier of their block, or, within a warp, at a shuffle. Blocks never meet. The first fault ends the launch with a sentence
// that tells kernel, block and thread.
#ifndef CLIPFT_EMULATION_H
#define CLIPFT_EMULATION_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define CLIPFT_GLOBAL(type) emulation::Global<type>
#define KERNEL(...) extern "C" void
#define DEVICE static inline
#define DEVICE_MEMBER inline
#define SHARED(type, name, count) static emulation::Shared<type, count> name
#define NO_VALUE (-INFINITY)

struct Index {
    unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
// An allocation, with what was last done to each of its elements.
struct Region;

// Checks `index` (in elements of `size` bytes) relative to `pointer` and notes the access.
void access_global(const void *pointer, long long index, size_t size, bool write);
// The same for element `index` of `count` of a block's own memory, which `owner` names.
void access_shared(const void *owner, long long index, long long count, bool write);

// A fault unless four elements at once are aligned.
void check_quad(bool aligned);

void meet_block();
// Gives the lane's value, returns that of lane ^ mask once all 32 lanes have given theirs.
uint64_t meet_warp(uint64_t value, int mask);

// An element as it is read or written.
template <class T, class Note> class Element {
    T *element;
    Note note;

  public:
    Element(T *at, Note n) : element(at), note(n) {}
    operator T() const { return note(false), *element; }
    const Element &operator=(T value) const { return note(true), *element = value, *this; }
    const Element &operator=(const Element &other) const { return *this = (T)other; }
    const Element &operator+=(T value) const { return *this = (T) * this + value; }
};

// What a raw pointer is on a GPU: as large, and no more than it.
template <class T> class Global {
    T *pointer;

  public:
    auto operator[](long long index) const
    {
        T *base = pointer;
        if constexpr (std::is_const_v<T>)
            return access_global(base, index, sizeof(T), false), base[index];
        else
            return Element(base + index, [=](bool write) { access_global(base, index, sizeof(T), write); });
    }
    explicit operator bool() const { return pointer; }
    bool quad_at(long long index) const { return (uintptr_t)(pointer + index) % (4 * sizeof(T)) == 0; }
    using Item = std::remove_const_t<T>;
};

template <class T, long long Count> class Shared {
    T data[Count];

  public:
    auto operator[](long long index)
    {
        return Element(data + (index >= 0 && index < Count ? index : 0),
                       [=, this](bool write) { access_shared(this, index, Count, write); });
    }
    bool quad_at(long long index) const { return index % 4 == 0; }
    using Item = T;
};
} // namespace emulation

// Four elements at once, as common.cuh has them for a GPU: here one by one, so that each is checked.
struct Quad {
    unsigned word[4];
};

template <class From> static inline Quad read_quad(From &from, long long at)
{
    Quad quad = {};
    emulation::check_quad(from.quad_at(at));
    for (int k = 0; k < 4; ++k) {
        const typename std::remove_cv_t<From>::Item item = from[at + k];
        memcpy((char *)quad.word + k * sizeof item, &item, sizeof item);
    }
    return quad;
}

template <class To> static inline void write_quad(To &to, long long at, const Quad &quad)
{
    emulation::check_quad(to.quad_at(at));
    for (int k = 0; k < 4; ++k) {
        typename std::remove_cv_t<To>::Item item;
        memcpy(&item, (const char *)quad.word + k * sizeof item, sizeof item);
        to[at + k] = item;
    }
}

static inline void __syncwarp() { emulation::meet_warp(0, 0); }

static inline void __syncthreads() { emulation::meet_block(); }

template <class T> static inline T __shfl_xor_sync(unsigned, T value, int mask)
{
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = emulation::meet_warp(bits, mask);
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T> static inline T __shfl_sync(unsigned mask, T value, int lane)
{
    return __shfl_xor_sync(mask, value, (int)(threadIdx.x % 32) ^ lane);
}

// A GPU's own instructions, which make zero of what is below 2^-126.
static inline float flushed(float value) { return std::fabs(value) < 0x1p-126f ? 0.0f : value; }
static inline float exp2_fast(float x) { return flushed(exp2f(x)); }
static inline float reciprocal(float x) { return flushed(1.0f / x); }

static inline unsigned __float_as_uint(float value)
{
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float __uint_as_float(unsigned bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32, by the fragments of the PTX manual: what a lane holds of A lies in row g (words 0
// and 2) or g + 8, columns 2t and 2t + 1 (words 0 and 1) or 8 more; of B in column g and those rows; of the sum in row g or g + 8, columns
// 2t, 2t + 1.
static inline void mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    static unsigned given[32][32][6]; // by warp and lane
    auto &warp = given[threadIdx.x / 32];
    const unsigned lane = threadIdx.x % 32;
    memcpy(warp[lane], a, sizeof a), memcpy(warp[lane] + 4, b, sizeof b);
    emulation::meet_warp(0, 0);
    const auto element = [&](unsigned line, unsigned depth, unsigned word) { // of A's row, or of B's column, in that word
        const unsigned bits = warp[4 * line + depth % 8 / 2][word] >> 16 * (depth % 2) << 16;
        return __uint_as_float(bits);
    };
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4, col = 2 * (lane % 4) + i % 2;
        for (unsigned depth = 0; depth < 16; ++depth)
            sum[i] += element(row, depth, i / 2 + 2 * (depth / 8)) * element(col, depth, 4 + depth / 8);
    }
    emulation::meet_warp(0, 0);
}

extern "C" void clipft_float16_to_float(const uint16_t *src, float *dst, int64_t n); // csrc/kernels/common/convert.c
extern "C" void clipft_float_to_float16(const float *src, uint16_t *dst, int64_t n);

static inline float float16_to_float(unsigned short bits)
{
    float value;
    clipft_float16_to_float(&bits, &value, 1);
    return value;
}

static inline unsigned short float_to_float16(float value)
{
    unsigned short bits;
    clipft_float_to_float16(&value, &bits, 1);
    return bits;
}

#endif
