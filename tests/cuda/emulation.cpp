// The emulated machine: memory with its shadow, fibers, launches.
#include "emulation.h"
#include "machine.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <ucontext.h>
#include <unordered_map>
#include <utility>
#include <vector>

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
// ---- faults ----

namespace {
struct Fault {
    std::string text;
};

std::string fault_text;
const char *kernel_name;

[[noreturn]] void fault(const std::string &what)
{
    char where[160];
    snprintf(where, sizeof where, " (kernel %s, block %u, %u, thread %u)", kernel_name, blockIdx.x, blockIdx.y, threadIdx.x);
    throw Fault{what + where};
}

// ---- threads ----

enum State { RUNNABLE, AT_BLOCK, AT_WARP, DONE };
constexpr size_t STACK = 64 * 1024;

struct Thread {
    State state;
    bool started;
    uint64_t given[2]; // to a shuffle, in turns
    unsigned shuffles;
    ucontext_t context;
    jmp_buf at;
};

std::vector<Thread> threads;
std::vector<char> stacks;
jmp_buf scheduler;
unsigned current;
uint32_t block_number, block_meetings;
std::vector<uint32_t> warp_meetings;
void (*kernel_body)(const void *);
const void *kernel_args;

// ---- memory ----

// Who did something to an element, and how often its block and its warp had met by then.
struct Access {
    uint64_t block : 24, thread : 10, block_meetings : 12, warp_meetings : 18;
};

struct Shadow {
    uint32_t epoch = 0; // of the launch; what is older does not count
    bool written = false;
    uint8_t readers = 0;
    Access write, read[2];
};

uint32_t epoch;

Access now() { return {block_number, current, block_meetings, warp_meetings[current / 32]}; }

bool ordered(const Access &before, const Access &after)
{
    if (before.block != after.block) return false;
    if (before.thread == after.thread || before.block_meetings < after.block_meetings) return true;
    return before.thread / 32 == after.thread / 32 && before.warp_meetings < after.warp_meetings;
}

void note(Shadow &cell, bool write, const char *memory, long long index)
{
    const Access access = now();
    if (cell.epoch != epoch) cell.epoch = epoch, cell.written = false, cell.readers = 0;
    const char *race = cell.written && !ordered(cell.write, access) ? (write ? "two writes" : "a write and a read") : nullptr;
    for (unsigned k = 0; write && k < cell.readers; ++k)
        if (!ordered(cell.read[k], access)) race = "a read and a write";
    if (race) fault(std::string("race: ") + race + " of element " + std::to_string(index) + " of " + memory + " memory without a barrier");
    if (write) {
        cell.written = true, cell.write = access, cell.readers = 0;
    } else if (cell.readers < 2 && !(cell.readers == 1 && cell.read[0].thread == access.thread && cell.read[0].block == access.block)) {
        cell.read[cell.readers++] = access; // the first of two threads, and
    } else {
        cell.read[cell.readers - 1] = access; // the last
    }
}
} // namespace

struct Region {
    const char *begin, *end;
    size_t element = 0;
    uint32_t element_epoch = 0;
    std::vector<Shadow> shadow;
};

namespace {
std::map<const char *, Region> regions; // by end
struct SharedShadow {
    uint32_t epoch = 0, block = 0; // of another block nothing is left
    std::vector<Shadow> cells;
};

std::unordered_map<const void *, SharedShadow> shared_shadow;

Region &region_of(const void *pointer)
{
    static const void *last_pointer[64];
    static Region *last_region[64];
    static uint32_t last_epoch[64];
    const size_t slot = ((uintptr_t)pointer >> 4) % 64;
    if (last_pointer[slot] == pointer && last_epoch[slot] == epoch) return *last_region[slot];
    const auto found = regions.upper_bound((const char *)pointer);
    if (found == regions.end() || found->second.begin > (const char *)pointer) fault("out of bounds: a pointer into no allocation");
    last_pointer[slot] = pointer, last_region[slot] = &found->second, last_epoch[slot] = epoch;
    return found->second;
}
} // namespace

void access_global(const void *pointer, long long index, size_t size, bool write)
{
    Region &region = region_of(pointer);
    const char *at = (const char *)pointer + index * (long long)size;
    if (at < region.begin || at + size > region.end)
        fault("out of bounds: element " + std::to_string(index) + " of " +
              std::to_string((region.end - (const char *)pointer) / (long)size));
    if ((uintptr_t)at % size != 0) fault("misaligned: element " + std::to_string(index) + " of " + std::to_string(size) + " bytes");
    if (region.element_epoch != epoch) region.element_epoch = epoch, region.element = size;
    if (region.element != size) fault("memory accessed as elements of two sizes");
    const size_t cell = (size_t)(at - region.begin) / size;
    if (region.shadow.size() <= cell) region.shadow.resize((size_t)(region.end - region.begin) / size);
    note(region.shadow[cell], write, "global", index);
}

void check_quad(bool aligned)
{
    if (!aligned) fault("misaligned: four elements at once");
}

void access_shared(const void *owner, long long index, long long count, bool write)
{
    SharedShadow &shadow = shared_shadow[owner];
    if (index < 0 || index >= count)
        fault("out of bounds: element " + std::to_string(index) + " of " + std::to_string(count) + " in shared memory");
    if (shadow.epoch != epoch || shadow.block != block_number) shadow = {epoch, block_number, std::vector<Shadow>((size_t)count)};
    Shadow &cell = shadow.cells[(size_t)index];
    if (!write && !cell.written) fault("shared memory read before it was written");
    note(cell, write, "shared", index);
}

// ---- fibers ----

namespace {
std::string escaped; // a fault cannot be thrown through a fiber's end

void wait_as(State state)
{
    Thread &me = threads[current];
    me.state = state;
    if (_setjmp(me.at) == 0) _longjmp(scheduler, 1);
}

void fiber()
{
    try {
        kernel_body(kernel_args);
    } catch (const Fault &f) {
        escaped = f.text;
    }
    threads[current].state = DONE;
    _longjmp(scheduler, 1);
}

void run_thread(unsigned index)
{
    Thread &thread = threads[index];
    current = index;
    threadIdx = {index, 0, 0};
    thread.state = RUNNABLE;
    if (_setjmp(scheduler) == 0) {
        if (thread.started) _longjmp(thread.at, 1);
        thread.started = true;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = stacks.data() + index * STACK;
        thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, fiber, 0);
        setcontext(&thread.context);
    }
    if (!escaped.empty()) throw Fault{std::exchange(escaped, {})};
}

unsigned count(unsigned first, unsigned last, State state)
{
    return (unsigned)std::count_if(threads.begin() + first, threads.begin() + last, [&](const Thread &t) { return t.state == state; });
}

// Runs a warp until its threads wait for the block or are done.
void run_warp(unsigned first, unsigned last)
{
    for (;;) {
        for (unsigned k = first; k < last; ++k)
            if (threads[k].state == RUNNABLE) run_thread(k);
        const unsigned waiting = count(first, last, AT_WARP);
        if (waiting == 0) return;
        if (waiting != last - first) fault("a shuffle that not all lanes of the warp take part in");
        ++warp_meetings[first / 32];
        for (unsigned k = first; k < last; ++k) threads[k].state = RUNNABLE;
    }
}

void run_block(unsigned size)
{
    for (Thread &t : threads) t.state = RUNNABLE, t.started = false, t.shuffles = 0;
    block_meetings = 0;
    warp_meetings.assign(size / 32, 0);
    for (;;) {
        for (unsigned first = 0; first < size; first += 32) run_warp(first, first + 32);
        const unsigned waiting = count(0, size, AT_BLOCK), done = count(0, size, DONE);
        if (done == size) return;
        if (waiting + done != size || done > 0) fault("a barrier that not all threads of the block reach");
        ++block_meetings;
        for (Thread &t : threads) t.state = RUNNABLE;
    }
}
} // namespace

void meet_block() { wait_as(AT_BLOCK); }

uint64_t meet_warp(uint64_t value, int mask)
{
    const unsigned me = current, turn = threads[me].shuffles++ % 2;
    threads[me].given[turn] = value;
    wait_as(AT_WARP);
    return threads[me ^ (unsigned)mask].given[turn];
}

// ---- what the emulated driver and torch's side call ----

const char *launch(const char *name, void (*body)(const void *), const void *args, Index grid, unsigned size)
{
    kernel_name = name, kernel_body = body, kernel_args = args;
    gridDim = grid, blockDim = {size, 1, 1};
    ++epoch;
    threads.resize(size);
    stacks.resize(size * STACK);
    try {
        if (size == 0 || size % 32 != 0 || size > 1024 || grid.x == 0 || grid.y == 0 || grid.z != 1) fault("a launch of no valid size");
        for (blockIdx = {0, 0, 0}; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                block_number = blockIdx.y * grid.x + blockIdx.x;
                run_block(size);
            }
        return nullptr;
    } catch (const Fault &f) {
        fault_text = f.text;
        return fault_text.c_str();
    }
}

void know_memory(const void *begin, size_t bytes)
{
    const char *first = (const char *)begin, *last = first + bytes;
    if (bytes == 0) return;
    auto next = regions.upper_bound(first);
    while (next != regions.end() && next->second.begin < last) { // views of one tensor
        first = std::min(first, next->second.begin), last = std::max(last, next->second.end);
        next = regions.erase(next);
    }
    regions.emplace(last, Region{first, last, 0, 0, {}});
    ++epoch;
}

void forget_memory()
{
    regions.clear();
    ++epoch;
}
} // namespace emulation
