// bfloat16 is the upper half of an fp32: what the state codec and the element type share.
#pragma once

#include "simd.h"
#include "tables.h"

namespace optwatch::OPTWATCH_ISA {

OPTWATCH_INLINE const float* widen(const void* values, int n, float* scratch) {
  const uint16_t* in = static_cast<const uint16_t*>(values);
  for (int i = 0; i < padded_length(n); i += kWidth) store(scratch + i, load_narrow(in + i) << 16);
  return scratch;
}

// The bits of an fp32 to those of a bf16, to nearest, ties to even; a NaN stays one.
OPTWATCH_INLINE Int to_nearest_bf16(Int x) {
  const Int rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
  const Mask nan = less(splat(0x7f800000), x & 0x7fffffff);
  return select(nan, (x >> 16) | 0x40, rounded);
}

}  // namespace optwatch::OPTWATCH_ISA
