// One byte an element: cube roots for signed slots, logarithms for second moments. The formulas are in codec.py; here
// is how they are reached without a cube root, a division or an exponential per element.
#pragma once

#include "optwatch/kernels/cpu/mathematics.h"

namespace optwatch::OPTWATCH_ISA {

// ---- cubic -----------------------------------------------------------------------------------------------------

constexpr int kCubicBlock = 128;
constexpr float kCubicUnit = 1.0 / (127.0 * 127.0 * 127.0);

OPTWATCH_INLINE uint16_t* cubic_scales(const Part& part) {
  return static_cast<uint16_t*>(part.buffers[1]) + part.first / kCubicBlock;
}

OPTWATCH_INLINE float cubic_scale(const Part& part, int index) { return as_float(cubic_scales(part)[index] << 16); }

inline const float* cubic_load(const Part& part, int n, float* scratch) {
  const int8_t* codes = static_cast<const int8_t*>(part.values);
  for (int start = 0; start < n; start += kCubicBlock) {
    const Float unit = splat(cubic_scale(part, start / kCubicBlock) * kCubicUnit);
    const int stop = start + kCubicBlock < n ? start + kCubicBlock : n;
    for (int i = start; i < stop; i += kWidth) {
      const Float code = to_float(load_narrow(codes + i));
      store(scratch + i, code * code * code * unit);
    }
  }
  return scratch;
}

inline float cubic_limit(const Part& part, int index) {
  // A block too small to tell apart has scale 0: its values underflow, they are not cut off.
  const float scale = cubic_scale(part, index);
  return scale > 0 ? scale : __builtin_inff();
}

inline void cubic_store(const Part& part, int n, const float* exact) {
  int8_t* codes = static_cast<int8_t*>(part.values);
  for (int start = 0; start < n; start += kCubicBlock) {
    const int stop = start + kCubicBlock < n ? start + kCubicBlock : n;
    Int most{};  // bit patterns of magnitudes order like integers, NaN above infinity above the rest
    for (int i = start; i < stop; i += kWidth) most = maximum(most, load_bits(exact + i) & ~kSignBit);
    const int32_t top = largest(most);
    int32_t scale = (top + 0xffff) & ~0xffff;
    if (scale > kLargestBf16Bits) scale = kLargestBf16Bits;
    if (top >= kInfinityBits) scale = 0x7fc00000;
    if (top < bits(kSmallestNormal)) scale = 0;
    cubic_scales(part)[start / kCubicBlock] = static_cast<uint16_t>(scale >> 16);
    if (top >= kInfinityBits || scale == 0) {
      std::memset(codes + start, 0, static_cast<size_t>(stop - start));
      continue;
    }
    const Float inverse = splat(1.0f / as_float(scale));
    for (int i = start; i < stop; i += kWidth) {
      const Float x = load(exact + i);
      const Float code = cbrt_times_127(absolute(x) * inverse) + 0.5f;
      store_narrow(codes + i, truncate(as_float(bits(code) | (bits(x) & kSignBit))));
    }
  }
}

// ---- logarithmic -----------------------------------------------------------------------------------------------

constexpr int kLogBlock = 256;
constexpr float kSmallestStep = 0x1p-12f;
constexpr float kLn2 = 0.693147180559945f;

OPTWATCH_INLINE float* log_grid(const Part& part, int index) {
  return static_cast<float*>(part.buffers[1]) + 2 * (part.first / kLogBlock + index);
}

inline const float* log_load(const Part& part, int n, float* scratch) {
  const uint8_t* codes = static_cast<const uint8_t*>(part.values);
  for (int start = 0; start < n; start += kLogBlock) {
    const float* grid = log_grid(part, start / kLogBlock);
    const Float lowest = splat(grid[0]), step = splat(grid[1]);
    const int stop = start + kLogBlock < n ? start + kLogBlock : n;
#if defined(__AVX512F__)
    // With code = 16 h + l the value is lowest * 2**(16 h * step) times 2**((l - 1) * step): two tables of sixteen
    // entries, looked up by permutation, in place of an exponential per element.
    const Float lane = count_up();
    const __m512 coarse = (__m512)(lowest * exp2_positive(lane * 16.0f * step));
    const __m512 fine = (__m512)exp2_positive((lane - 1.0f) * step);
    for (int i = start; i < stop; i += kWidth) {
      const __m512i code = (__m512i)load_narrow(codes + i);
      const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(code, 4), coarse);
      const __m512 low = _mm512_permutexvar_ps(code, fine);  // reads the lower four bits only
      _mm512_storeu_ps(scratch + i, _mm512_maskz_mul_ps(_mm512_test_epi32_mask(code, code), high, low));
    }
#else
    for (int i = start; i < stop; i += kWidth) {
      const Int code = load_narrow(codes + i);
      const Float value = lowest * exp2_positive((to_float(code) - 1.0f) * step);
      store(scratch + i, select(equal(code, Int{}), Float{}, value));
    }
#endif
  }
  return scratch;
}

inline float log_limit(const Part&, int) { return __builtin_inff(); }  // the grid ends at the largest value

// The base-2 logarithm of a block's range, q >= 1; one lane of the vectors' own, so that the ends of the grid fit it.
OPTWATCH_INLINE float log2_scalar(float q) { return log2(splat(q))[0]; }

inline void log_store(const Part& part, int n, const float* exact) {
  uint8_t* codes = static_cast<uint8_t*>(part.values);
  alignas(64) uint32_t random[kBlock / 2 + kPad];
  random_words(part.first, part.key, n, random);
  const uint16_t* numbers = reinterpret_cast<const uint16_t*>(random);
  for (int start = 0; start < n; start += kLogBlock) {
    const int stop = start + kLogBlock < n ? start + kLogBlock : n;
    Int most{};
    Word least = splat(UINT32_MAX);
    for (int i = start; i < stop; i += kWidth) {
      const Int x = load_bits(exact + i) & ~kSignBit;
      most = maximum(most, x);
      least = minimum(least, reinterpret_cast<Word>(x - 1));  // zero becomes the largest word
    }
    const int32_t top = largest(most);
    float* grid = log_grid(part, start / kLogBlock);
    if (top == 0 || top >= kInfinityBits) {
      grid[0] = grid[1] = top ? __builtin_nanf("") : 0.0f;
      std::memset(codes + start, top ? 1 : 0, static_cast<size_t>(stop - start));
      continue;
    }
    const float high = top < bits(kSmallestNormal) ? kSmallestNormal : as_float(top);
    float low = as_float(static_cast<int32_t>(smallest(least) + 1));
    if (low < kSmallestNormal) low = kSmallestNormal;
    if (low < high * 0x1p-126f) low = high * 0x1p-126f;
    const float inverse = 1.0f / low;
    float step = log2_scalar(high * inverse) * (1.0f / 254.0f);
    if (!(step > kSmallestStep)) step = kSmallestStep;
    grid[0] = low;
    grid[1] = step;

    // p(f) = (2**(f*step) - 1) / (2**step - 1) as a cubic that is exact at 0 and 1; step < 0.5, so the neglected
    // terms stay below 3e-5.
    const float a = step * kLn2;
    const float c1 = 1.0f / (1.0f + a * (1.0f / 2 + a * (1.0f / 6 + a * (1.0f / 24 + a * (1.0f / 120)))));
    const float c2 = c1 * a * 0.5f;
    const Float p1 = splat(c1), p2 = splat(c2), p3 = splat(1.0f - c1 - c2);
    const Float lowest = splat(low), per_low = splat(inverse), per_step = splat(1.0f / step);
    for (int i = start; i < stop; i += kWidth) {
      const Float v = load(exact + i);
      const Float position = log2(maximum(v, lowest) * per_low) * per_step;
      const Float below = minimum(floor_positive(position), splat(253.0f));
      const Float f = position - below;
      const Float p = fma(fma(p3, f, p2), f, p1);
      // 1 + below + (number + 0.5 < p * 65536) in one sum: its fraction overflows exactly where the bound is met.
      const Float number = to_float(load_narrow(numbers + i));
      const Float sum = fma(number, splat(-0x1p-16f), fma(p, f, below + (2.0f - 0x1p-17f)));
      const Int code = truncate(minimum(sum, splat(255.5f)));
      store_narrow(codes + i, select(equal(bits(v), Int{}), Int{}, code));
    }
  }
}

constexpr Codec codecs_int8[] = {
    {"int8_cubic", 1, 2, kCubicBlock, false, cubic_load, cubic_store, cubic_limit},
    {"int8_log", 1, 2, kLogBlock, false, log_load, log_store, log_limit},
};

}  // namespace optwatch::OPTWATCH_ISA
