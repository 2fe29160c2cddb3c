// One byte an element with the peers' map of 256 values. The formulas are in codec.py; every bit is the reference's.
//
// Finding the nearest of 256 values takes one look-up: the upper bits of a magnitude number a bin so narrow that at
// most one threshold between two codes lies in it, and the bin's entry has the code below and how far away the
// threshold is.
#pragma once

#include "optwatch/kernels/cpu/mathematics.h"

namespace optwatch::OPTWATCH_ISA {

constexpr int kDynamicBlock = 256;
constexpr int kDecades = 7;

// The fp32 number of these bits, which is normal and at most 1.
constexpr float number_of(uint32_t pattern) {
  float x = static_cast<float>((pattern & 0x7fffff) | 0x800000);
  for (int exponent = 150 - static_cast<int>(pattern >> 23); exponent > 0; exponent--) x *= 0.5f;
  return x;
}

// The values of a map that are not negative, in ascending order.
template <bool second_moment>
struct DynamicValues {
  static constexpr int kCount = second_moment ? 256 : 129;
  float value[kCount] = {};

  constexpr DynamicValues() {
    constexpr float kPowers[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    int count = 1;
    for (int decade = 0; decade < kDecades; decade++) {
      const int parts = 1 << (decade + second_moment);
      for (int k = 0; k < parts; k++) value[count++] = kPowers[decade] * ((edge(k, parts) + edge(k + 1, parts)) / 2);
    }
    value[count] = 1;
  }
  // Of [0.1, 1] cut into equal parts, counted from the nearer end and rounded once.
  static constexpr float edge(int k, int parts) {
    const double step = (1.0f - 0.1f) / static_cast<float>(parts);
    return static_cast<float>(k < (parts + 1) / 2 ? 0.1f + step * k : 1 - step * (parts - k));
  }
};

// The number of a magnitude's value in DynamicValues, by the magnitude's bits.
template <bool second_moment>
struct DynamicBins {
  static constexpr int kShift = second_moment ? 16 : 17;  // bits of a magnitude beside the number of its bin
  // A power of two below the first threshold; a second moment takes no code below 1.
  static constexpr uint32_t kFirst = static_cast<uint32_t>(127 - (second_moment ? 21 : 22)) << 23;
  static constexpr int kCount = ((0x3f800000 - kFirst) >> kShift) + 1;
  int32_t entry[kCount] = {};

  // From which magnitude on the next value is taken depends on the sign: ties go upwards.
  constexpr explicit DynamicBins(bool negative) {
    constexpr DynamicValues<second_moment> values;
    int code = second_moment;
    uint32_t threshold = threshold_above(values.value, code, negative);
    for (int bin = 0; bin < kCount; bin++) {
      const uint32_t first = kFirst + (static_cast<uint32_t>(bin) << kShift), last = first + (1u << kShift);
      while (threshold <= first) threshold = threshold_above(values.value, ++code, negative);
      const uint32_t missing = threshold < last ? last - threshold : 0;
      entry[bin] = (code << kShift) + static_cast<int32_t>(missing);
    }
  }
  // The first magnitude, as bits, that is taken for the value after this one, as codec.py compares in fp32.
  static constexpr uint32_t threshold_above(const float* values, int code, bool negative) {
    if (code + 1 == DynamicValues<second_moment>::kCount - negative) return ~0u;  // there is 1, but no -1
    const float low = values[code], high = values[code + 1], half = (high - low) * 0.5f;
    uint32_t below = kFirst - (1u << 23), from = 0x3f800000;  // the first does not reach it, the second does
    while (from - below > 1) {
      const uint32_t middle = below + (from - below) / 2;
      const float x = number_of(middle);
      const bool reached = negative ? high - x < half : x - low >= half;
      (reached ? from : below) = middle;
    }
    return from;
  }
};

template <bool second_moment>
struct DynamicTables {
  static constexpr int kZero = second_moment ? 0 : 127;
  static constexpr int kSigns = second_moment ? 1 : 2;
  float value[256] = {};
  int32_t bins[kSigns * DynamicBins<second_moment>::kCount] = {};  // of positive magnitudes, then of negative ones

  constexpr DynamicTables() {
    constexpr DynamicValues<second_moment> values;
    for (int code = 0; code < 256; code++)
      value[code] = code < kZero ? -values.value[kZero - code] : values.value[code - kZero];
    for (int sign = 0; sign < kSigns; sign++) {
      const DynamicBins<second_moment> found(sign == 1);
      for (int i = 0; i < found.kCount; i++) bins[sign * found.kCount + i] = found.entry[i];
    }
  }
};

template <bool second_moment>
constexpr DynamicTables<second_moment> kDynamicTables{};

OPTWATCH_INLINE float& dynamic_absmax(const Part& part, int index) {
  return static_cast<float*>(part.buffers[1])[part.first / kDynamicBlock + index];
}

template <bool second_moment>
inline const float* dynamic_load(const Part& part, int n, float* scratch) {
  const uint8_t* codes = static_cast<const uint8_t*>(part.values);
  for (int start = 0, k = 0; start < n; start += kDynamicBlock, k++) {
    const float absmax = dynamic_absmax(part, k);
    in_packs(length_of(start, kDynamicBlock, n), [=](int i, auto size) {
      const auto code = load_integers<size.value>(codes + start + i);
      store(scratch + start + i,
            each(code, [](Int c) { return gather(kDynamicTables<second_moment>.value, c); }) * absmax);
    });
  }
  for (int i = n; i % kPad; i++) scratch[i] = 0;  // padding is bytes of 0, which is no code for zero
  return scratch;
}

// The code of x, which is at most 1; `exact`, whose sign and zero count, is x before it was divided.
template <bool second_moment>
OPTWATCH_INLINE Int dynamic_code(Float x, Float exact) {
  using Bins = DynamicBins<second_moment>;
  const Int first = splat(static_cast<int32_t>(Bins::kFirst));
  const Int above = maximum(bits(x) & ~kSignBit, first) - first;
  const Int negative = bits(x) >> 31;
  Int bin = above >> Bins::kShift;
  if constexpr (!second_moment) bin += negative & Bins::kCount;
  const Int found =
      (gather(kDynamicTables<second_moment>.bins, bin) + (above & ((1 << Bins::kShift) - 1))) >> Bins::kShift;
  if constexpr (second_moment) return select(less(Float{}, exact), found, Int{});
  return (found ^ negative) - negative + DynamicTables<false>::kZero;
}

template <bool second_moment>
inline void dynamic_store(const Part& part, int n, const float* exact, const Note&) {
  uint8_t* codes = static_cast<uint8_t*>(part.values);
  for (int start = 0, k = 0; start < n; start += kDynamicBlock, k++) {
    const int length = length_of(start, kDynamicBlock, n);
    int32_t top = largest_magnitude(exact + start, length);
    if (second_moment && top > 0 && top < bits(kSmallestNormal)) top = bits(kSmallestNormal);
    const bool empty = top < bits(kSmallestNormal), finite = top < kInfinityBits;
    dynamic_absmax(part, k) = empty ? 0 : finite ? as_float(top) : __builtin_nanf("");
    if (empty || !finite) {
      std::memset(codes + start, DynamicTables<second_moment>::kZero, static_cast<size_t>(length));
      continue;
    }
    in_packs(length, [=](int i, auto size) {
      const auto x = load_pack<size.value>(exact + start + i);
      const auto code = each(x, [=](Float a) { return dynamic_code<second_moment>(a / splat(as_float(top)), a); });
      for (int j = 0; j < size.value; j++) store_narrow(codes + start + i + j * kWidth, code.v[j]);
    });
  }
}

inline float dynamic_limit(const Part&, int) { return __builtin_inff(); }

constexpr Codec codecs_int8_dynamic[] = {
    {"int8_dynamic_signed", 8, 2, kDynamicBlock, false, dynamic_load<false>, nullptr, dynamic_store<false>,
     __builtin_inff(), dynamic_limit},
    {"int8_dynamic_unsigned", 8, 2, kDynamicBlock, false, dynamic_load<true>, nullptr, dynamic_store<true>,
     __builtin_inff(), dynamic_limit},
};

}  // namespace optwatch::OPTWATCH_ISA
