// A processor of which the kernels know nothing. Included before everything else: the system's own headers, which must
// know, are read first.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#undef __x86_64__
#undef __SSE2__
#undef __AVX2__
#undef __FMA__
#undef __aarch64__
