// Logarithm, exponential, cube root and random numbers for the codecs: exponent bits and short minimax polynomials,
// fitted for the smallest relative error (Lawson's iteratively reweighted least squares).
#pragma once

#include "simd.h"
#include "tables.h"

namespace optwatch::OPTWATCH_ISA {

constexpr int32_t kSignBit = INT32_MIN;
constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int32_t kLargestBf16Bits = 0x7f7f0000;
constexpr float kSmallestNormal = 0x1p-126f;

OPTWATCH_INLINE Float absolute(Float x) { return as_float(bits(x) & ~kSignBit); }

// log2(1 + t) / t on [0, 1): relative error 1.9e-7, so log2 is exact at 1 and monotonic for all that matters.
OPTWATCH_INLINE Float log2_over_t(Float t) {
  Float p = fma(splat(-0.0123194748f), t, splat(0.0636079036f));
  p = fma(p, t, splat(-0.1553519f));
  p = fma(p, t, splat(0.256009747f));
  p = fma(p, t, splat(-0.353394843f));
  p = fma(p, t, splat(0.4800637f));
  p = fma(p, t, splat(-0.721310089f));
  return fma(p, t, splat(1.44269476f));
}

// For positive normal x.
OPTWATCH_INLINE Float log2(Float x) {
#if defined(__AVX512F__)
  const Float exponent = (Float)_mm512_getexp_ps((__m512)x);
  const Float mantissa = (Float)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
#else
  const Float exponent = to_float((bits(x) >> 23) - 127);
  const Float mantissa = as_float((bits(x) & 0x007fffff) | 0x3f800000);
#endif
  const Float t = mantissa - 1.0f;
  return fma(log2_over_t(t), t, exponent);
}

// 2**x for 0 <= x < 127: relative error 1e-7, exact for integers.
OPTWATCH_INLINE Float exp2_positive(Float x) {
#if defined(__AVX512F__)
  const Float whole = (Float)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Int whole_bits = truncate(x + 0.5f);
  const Float whole = to_float(whole_bits);
#endif
  const Float t = x - whole;  // in [-0.5, 0.5]
  Float p = fma(splat(0.00132647273f), t, splat(0.00967151279f));
  p = fma(p, t, splat(0.0555073374f));
  p = fma(p, t, splat(0.240222421f));
  p = fma(p, t, splat(0.693146978f));
  p = fma(p, t, splat(1.0f));
#if defined(__AVX512F__)
  return (Float)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return as_float(bits(p) + (whole_bits << 23));
#endif
}

// 127 * cbrt(q) for 0 <= q <= 1: relative error 5e-7. Dividing the exponent by -3 gives z = q**(-1/3) to 3.5 %;
// cbrt(q) = q * z*z * (q * z**3)**(-2/3), and the last factor is a polynomial of something near 1.
OPTWATCH_INLINE Float cbrt_times_127(Float q) {
  const Float z = as_float(nearest(fma(to_float(bits(q)), splat(-1.0f / 3.0f), splat(1419919360.0f))));
  const Float square = q * z * z;
  const Float t = square * z;
  Float p = fma(splat(127 * 0.449470276f), t, splat(127 * -2.29729886f));
  p = fma(p, t, splat(127 * 4.75068266f));
  p = fma(p, t, splat(127 * -5.0740017f));
  p = fma(p, t, splat(127 * 3.17114757f));
  return square * p;
}

// The random words of the element pairs of a block, as optwatch/kernels/random.py defines them. Read as 16-bit
// numbers they are in the order of the elements, on a little-endian machine.
OPTWATCH_INLINE void random_words(int64_t first, Key key, int n, uint32_t* out) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  Word lane;
  for (int i = 0; i < kWidth; i++) lane[i] = static_cast<uint32_t>(i);
  const uint64_t pair = static_cast<uint64_t>(first) >> 1;  // a block never crosses a multiple of 2**32 pairs
  uint32_t base = static_cast<uint32_t>(pair) + key.k0 + static_cast<uint32_t>(pair >> 32) * 0x9E3779B9u;
  for (int i = 0; i < (n + 1) / 2; i += kWidth, base += kWidth) {  // an odd last element has a pair, too
    Word x = lane + base;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= key.k1;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    store(out + i, x);
  }
}

}  // namespace optwatch::OPTWATCH_ISA
