// One byte an element in e4m3. The formulas are in codec.py; every bit is the reference's.
#pragma once

#include "optwatch/kernels/cpu/mathematics.h"

namespace optwatch::OPTWATCH_ISA {

constexpr int kFp8Block = 256;
constexpr float kLargestFp8 = 448;
constexpr float kSmallestNormalFp8 = 0x1p-6f;  // below it values are 2**-9 apart
constexpr float kFinestFp8 = 0x1p-117f;        // smallest scale
// The upper bits of an fp32 number, three of its mantissa with them, less this are those of the same number in e4m3.
constexpr int kFp8Exponents = (127 - 7) << 3;
constexpr int kFp8Shift = 20;
constexpr int kLargestFp8Code = 0x7e, kFp8Nan = 0x7f;

OPTWATCH_INLINE float& fp8_scale(const Part& part, int index) {
  return static_cast<float*>(part.buffers[1])[part.first / kFp8Block + index];
}

OPTWATCH_INLINE Float fp8_value(Int code) {
  const Int magnitude = code & 0x7f;
  // Where the exponent is 0 there is no leading one: it is put in, and taken off as a number.
  const Int shifted = magnitude << kFp8Shift;
  const Float normal = as_float(shifted + (kFp8Exponents << kFp8Shift));
  const Float small = as_float(shifted + bits(kSmallestNormalFp8)) - kSmallestNormalFp8;
  const Float value = select(less(magnitude, splat(8)), small, normal);
  const Float number = select(equal(magnitude, splat(kFp8Nan)), splat(__builtin_nanf("")), value);
  return as_float(bits(number) | (code & 0x80) << 24);
}

inline const float* fp8_load(const Part& part, int n, float* scratch) {
  const uint8_t* codes = static_cast<const uint8_t*>(part.values);
  for (int start = 0, k = 0; start < n; start += kFp8Block, k++) {
    const float scale = fp8_scale(part, k);
    in_packs(length_of(start, kFp8Block, n), [=](int i, auto size) {
      const auto code = load_integers<size.value>(codes + start + i);
      store(scratch + start + i, each(code, fp8_value) * scale);
    });
  }
  return scratch;
}

// The scale of a block with the largest magnitude `top`, which is written; 0 where all codes are 0.
OPTWATCH_INLINE float fp8_rescale(const Part& part, int index, int32_t top) {
  float scale = as_float(top) / kLargestFp8;
  if (scale < kFinestFp8) scale = kFinestFp8;
  const bool empty = top == 0, finite = top < kInfinityBits;
  fp8_scale(part, index) = empty ? 0 : finite ? scale : __builtin_nanf("");
  return empty || !finite ? 0 : scale;
}

// Numbers of [0, 448] to nearest, ties to even; the sign is that of `x`.
struct Fp8Nearest {
  OPTWATCH_INLINE Int operator()(Float x, Int) const {
    const Int pattern = bits(x) & ~kSignBit, even = (pattern >> kFp8Shift) & 1;
    const Int normal = ((pattern + 0x7ffff + even) >> kFp8Shift) - kFp8Exponents;
    const Int small = nearest(as_float(pattern) * 0x1p9f);
    const Int code = select(less(as_float(pattern), splat(kSmallestNormalFp8)), small, normal);
    return code | (bits(x) >> 24 & 0x80);
  }
};

// Up with the probability that keeps the expected value; zero only what is zero.
struct Fp8Stochastic {
  OPTWATCH_INLINE Int operator()(Float x, Int random) const {
    const Int rounded = ((bits(x) + (random << 4)) >> kFp8Shift) - kFp8Exponents;
    const Int normal = minimum(rounded, splat(kLargestFp8Code));
    const Int small = maximum(truncate(x * 0x1p9f + to_float(random) * 0x1p-16f), splat(1));
    const Int code = select(less(x, splat(kSmallestNormalFp8)), small, normal);
    return select(less(Float{}, x), code, Int{});
  }
};

template <class Rounding>
OPTWATCH_INLINE void fp8_encode(const Part& part, int n, const float* exact, const uint16_t* random) {
  uint8_t* codes = static_cast<uint8_t*>(part.values);
  for (int start = 0, k = 0; start < n; start += kFp8Block, k++) {
    const int length = length_of(start, kFp8Block, n);
    const float scale = fp8_rescale(part, k, largest_magnitude(exact + start, length));
    if (scale == 0) {
      std::memset(codes + start, 0, static_cast<size_t>(length));
      continue;
    }
    in_packs(length, [=](int i, auto size) {
      const auto x = each(load_pack<size.value>(exact + start + i), [=](Float a) {
        return maximum(minimum(a / splat(scale), splat(kLargestFp8)), splat(-kLargestFp8));
      });
      const auto numbers = random ? load_integers<size.value>(random + start + i) : Pack<Int, size.value>{};
      const auto code = each(x, numbers, Rounding{});
      for (int j = 0; j < size.value; j++) store_narrow(codes + start + i + j * kWidth, code.v[j]);
    });
  }
}

inline void fp8_store(const Part& part, int n, const float* exact, const Note&) {
  fp8_encode<Fp8Nearest>(part, n, exact, nullptr);
}

inline void fp8_store_stochastic(const Part& part, int n, const float* exact, const Note&) {
  alignas(64) uint32_t random[kBlock / 2 + kPad];
  random_words(part.first, part.key, n, random);
  fp8_encode<Fp8Stochastic>(part, n, exact, reinterpret_cast<const uint16_t*>(random));
}

inline float fp8_limit(const Part&, int) { return __builtin_inff(); }

constexpr Codec codecs_fp8[] = {
    {"fp8", 8, 2, kFp8Block, false, fp8_load, nullptr, fp8_store, __builtin_inff(), fp8_limit},
    {"fp8_stochastic", 8, 2, kFp8Block, false, fp8_load, nullptr, fp8_store_stochastic, __builtin_inff(), fp8_limit},
};

}  // namespace optwatch::OPTWATCH_ISA
