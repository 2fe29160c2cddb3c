// What the translation units that run passes share: the choice of an instruction set, and threads.
#pragma once

#include <cstddef>

#include "tables.h"

#define OPTWATCH_API extern "C" __attribute__((visibility("default")))

namespace optwatch {

// The instruction set of this name, or null if this processor does not run it.
const Isa* find_isa(const char* name);

// Runs `work(argument)` on at most so many of torch's threads, or on this one where there is only one part of work.
void in_parallel(void (*work)(void*), void* argument, int threads, size_t parts);

}  // namespace optwatch
