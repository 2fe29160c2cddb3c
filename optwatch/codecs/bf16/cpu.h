// bfloat16: to nearest for signed slots, stochastic for second moments.
#pragma once

#include "optwatch/kernels/cpu/bf16.h"
#include "optwatch/kernels/cpu/mathematics.h"

namespace optwatch::OPTWATCH_ISA {

inline const float* bf16_load(const Part& part, int n, float* scratch) { return widen(part.values, n, scratch); }

inline float bf16_limit(const Part&, int) { return kLargestBf16; }

// Finite values beyond the range become the largest finite one.
inline void bf16_store(const Part& part, int n, const float* exact, const Note&) {
  uint16_t* out = static_cast<uint16_t*>(part.values);
  const Float largest = splat(as_float(kLargestBf16Bits));
  for (int i = 0; i < n; i += kWidth) {
    const Float x = load(exact + i);
    const Int magnitude = bits(x) & ~kSignBit;
    const Int sign = bits(x) & kSignBit;
    // Integer order is the order of magnitudes, with NaN and infinity above everything that is cut off.
    const Mask beyond = both(less(bits(largest), magnitude), less(magnitude, splat(kInfinityBits)));
    store_narrow(out + i, to_nearest_bf16(select(beyond, bits(largest) | sign, bits(x))));
  }
}

inline void bf16_store_stochastic(const Part& part, int n, const float* exact, const Note&) {
  uint16_t* out = static_cast<uint16_t*>(part.values);
  alignas(64) uint32_t random[kBlock / 2 + kPad];
  random_words(part.first, part.key, n, random);
  const uint16_t* numbers = reinterpret_cast<const uint16_t*>(random);
  for (int i = 0; i < n; i += kWidth) {
    const Int x = load_bits(exact + i);
    const Int magnitude = x & ~kSignBit;
    Int rounded = (x + load_narrow(numbers + i)) >> 16;
    rounded = select(less(splat(kLargestBf16Bits >> 16), rounded), splat(kLargestBf16Bits >> 16), rounded);
    const Mask finite = less(magnitude, splat(kInfinityBits));
    const Int as_is = (x >> 16) | select(less(splat(kInfinityBits), magnitude), splat(0x40), splat(0));
    store_narrow(out + i, select(finite, rounded, as_is));
  }
}

constexpr Codec codecs_bf16[] = {
    {"bf16", 16, 1, kBlock, false, bf16_load, nullptr, bf16_store, kLargestBf16, bf16_limit},
    {"bf16_stochastic", 16, 1, kBlock, false, bf16_load, nullptr, bf16_store_stochastic, kLargestBf16, bf16_limit},
};

}  // namespace optwatch::OPTWATCH_ISA
