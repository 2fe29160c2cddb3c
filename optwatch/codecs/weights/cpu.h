// How weights are kept: to nearest, stochastically, or with a correction beside them; codec.py has the formulas.
#pragma once

#include <type_traits>

#include "optwatch/kernels/cpu/bf16.h"
#include "optwatch/kernels/cpu/mathematics.h"

namespace optwatch::OPTWATCH_ISA {

// fp32: the step works on the parameter itself, unless the old weights are still needed.
inline const float* weight_load(const Part& part, int, float*) { return static_cast<const float*>(part.values); }
inline void weight_store(const Part& part, int n, const float* exact, const Note&) {
  if (part.values == exact) return;
  for (int i = 0; i < n; i += kWidth) store(static_cast<float*>(part.values) + i, load(exact + i));
}

inline const float* weight_widen(const Part& part, int n, float* scratch) { return widen(part.values, n, scratch); }
inline void weight_nearest(const Part& part, int n, const float* exact, const Note&) {
  uint16_t* out = static_cast<uint16_t*>(part.values);
  for (int i = 0; i < n; i += kWidth) store_narrow(out + i, to_nearest_bf16(load_bits(exact + i)));
}

inline void weight_stochastic(const Part& part, int n, const float* exact, const Note&) {
  uint16_t* out = static_cast<uint16_t*>(part.values);
  alignas(64) uint32_t random[kBlock / 2 + kPad];
  random_words(part.first, part.key, n, random);
  const uint16_t* numbers = reinterpret_cast<const uint16_t*>(random);
  for (int i = 0; i < n; i += kWidth) {
    const Int x = load_bits(exact + i), magnitude = x & ~kSignBit;
    const Int rounded = minimum((magnitude + load_narrow(numbers + i)) >> 16, splat(kLargestBf16Bits >> 16));
    const Mask finite = less(magnitude, splat(kInfinityBits));
    store_narrow(out + i, select(finite, rounded | ((x & kSignBit) >> 16), to_nearest_bf16(x)));
  }
}

// A bf16 and a correction of `bits` bits.
template <int bits>
struct Split {
  using Correction = std::conditional_t<bits == 8, int8_t, int16_t>;
  static constexpr int kLost = 16 - bits;

  static const float* load(const Part& part, int n, float* scratch) {
    const uint16_t* values = static_cast<const uint16_t*>(part.values);
    const Correction* corrections = static_cast<const Correction*>(part.correction);
    for (int i = 0; i < padded_length(n); i += kWidth) {
      const Int upper = load_narrow(values + i) << 16, correction = load_narrow(corrections + i) << kLost;
      // Only a zero that was written from outside is smaller than its correction.
      optwatch::OPTWATCH_ISA::store(scratch + i, upper + maximum(correction, -(upper & ~kSignBit)));
    }
    return scratch;
  }

  static void store(const Part& part, int n, const float* exact, const Note&) {
    uint16_t* values = static_cast<uint16_t*>(part.values);
    Correction* corrections = static_cast<Correction*>(part.correction);
    alignas(64) uint32_t random[kBlock / 2 + kPad];
    if constexpr (kLost) random_words(part.first, part.key, n, random);
    const uint16_t* numbers = reinterpret_cast<const uint16_t*>(random);
    for (int i = 0; i < n; i += kWidth) {
      const Int x = load_bits(exact + i);
      const Mask nan = less(splat(kInfinityBits), x & ~kSignBit);
      Int rounded = x;
      if constexpr (kLost) rounded = x + (load_narrow(numbers + i) >> kLost);
      rounded = select(nan, splat(kNanBits), rounded);
      store_narrow(values + i, (rounded + 0x8000) >> 16);
      store_narrow(corrections + i, rounded >> kLost);
    }
  }
};

constexpr float kNoLimit = __builtin_inff();
constexpr Codec codecs_weights[] = {
    {"native_float32", 32, 1, kBlock, true, weight_load, nullptr, weight_store, kNoLimit, nullptr},
    {"native_bfloat16", 16, 1, kBlock, false, weight_widen, nullptr, weight_nearest, kNoLimit, nullptr},
    {"stochastic_bfloat16", 16, 1, kBlock, false, weight_widen, nullptr, weight_stochastic, kNoLimit, nullptr, 0, true},
    {"split8", 16, 2, kBlock, false, Split<8>::load, nullptr, Split<8>::store, kNoLimit, nullptr, 1, true},
    {"split16", 16, 2, kBlock, false, Split<16>::load, nullptr, Split<16>::store, kNoLimit, nullptr, 2, false},
};

}  // namespace optwatch::OPTWATCH_ISA
