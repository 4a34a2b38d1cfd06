// What the emulated driver and torch's side ask of the emulated machine.
#ifndef CLIPFT_EMULATED_MACHINE_H
#define CLIPFT_EMULATED_MACHINE_H

#include "emulation.h"

namespace emulation {
// Runs body(args) as a kernel. NULL, or the first fault.
const char *launch(const char *name, void (*body)(const void *), const void *args, Index grid, unsigned size);

// Memory that pointers may point into: what overlaps is one allocation, seen through several views.
void know_memory(const void *begin, size_t bytes);
void forget_memory();
} // namespace emulation

#endif
