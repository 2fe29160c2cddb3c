// Logarithm, exponential, cube root and random numbers for the codecs: exponent bits and short minimax polynomials,
// fitted for the smallest relative error (Lawson's iteratively reweighted least squares).
#pragma once

#include "packs.h"
#include "tables.h"

namespace optwatch::OPTWATCH_ISA {

constexpr int32_t kSignBit = INT32_MIN;
constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int32_t kNanBits = 0x7fc00000;
constexpr int32_t kLargestBf16Bits = 0x7f7f0000;
constexpr float kLargestBf16 = 0x1.fep127f;
constexpr float kSmallestNormal = 0x1p-126f;

OPTWATCH_INLINE Float absolute(Float x) { return as_float(bits(x) & ~kSignBit); }

// Elements of the codec's block that starts at `start` of n.
OPTWATCH_INLINE int length_of(int start, int block, int n) { return n - start < block ? n - start : block; }

// The largest magnitude, collected vector by vector: bit patterns without sign order like integers, NaN above infinity
// above the rest.
struct Magnitude {
  Int most{};

  OPTWATCH_INLINE void add(Float x) { most = maximum(most, bits(x) & ~kSignBit); }
};

OPTWATCH_INLINE int32_t largest_magnitude(const float* x, int n) {
  Magnitude found;
  for (int i = 0; i < n; i += kWidth) found.add(load(x + i));
  return largest(found.most);
}

// For positive normal x: exact at powers of two; the relative error of log2(1 + t) is 1.3e-6 on [0, 1).
template <int size>
OPTWATCH_INLINE Floats<size> log2(const Floats<size>& x) {
#if defined(__AVX512F__)
  const auto exponent = each(x, [](Float a) { return (Float)_mm512_getexp_ps((__m512)a); });
  const auto mantissa =
      each(x, [](Float a) { return (Float)_mm512_getmant_ps((__m512)a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src); });
#else
  const auto exponent = each(x, [](Float a) { return to_float((bits(a) >> 23) - 127); });
  const auto mantissa = each(x, [](Float a) { return as_float((bits(a) & 0x007fffff) | 0x3f800000); });
#endif
  const auto t = mantissa - 1.0f;
  const auto p =
      polynomial(t, 0.0204011866f, -0.0957975646f, 0.21528458f, -0.339089059f, 0.47766839f, -0.721159476f, 1.44269321f);
  return fma(p, t, exponent);
}

// 2**x for -0.5 <= x < 127: relative error 1e-7, exact for integers.
template <int size>
OPTWATCH_INLINE Floats<size> exp2(const Floats<size>& x) {
#if defined(__AVX512F__)
  const auto whole = each(
      x, [](Float a) { return (Float)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); });
#else
  const auto whole_bits = each(x, [](Float a) { return truncate(a + 0.5f); });
  const auto whole = each(whole_bits, [](Int a) { return to_float(a); });
#endif
  const auto p = polynomial(x - whole, 0.00132647273f, 0.00967151279f, 0.0555073374f, 0.240222421f, 0.693146978f, 1.0f);
#if defined(__AVX512F__)
  return each(p, whole, [](Float a, Float n) { return (Float)_mm512_scalef_ps((__m512)a, (__m512)n); });
#else
  return each(p, whole_bits, [](Float a, Int n) { return as_float(bits(a) + (n << 23)); });
#endif
}

// 127 * cbrt(|q|) for |q| <= 1, to 1e-5: a thousandth of a code for the largest. What would be below 1/2, which int8
// stores as 0, counts as that.
template <int size>
OPTWATCH_INLINE Floats<size> cbrt_times_127(const Floats<size>& q) {
  constexpr float kLeast = 0.125 / (127.0 * 127.0 * 127.0);
#if defined(__AVX512F__)
  // cbrt(2**e * m) = 2**(e / 3) * cbrt(m): a table with 31 + e as its index, which is the lower five bits of the
  // exponent as stored, and a polynomial on [1, 2).
  alignas(64) static constexpr float kPowers[32] = {
      0.0984374657f, 0.124023438f, 0.156259745f, 0.196874931f, 0.248046875f, 0.312519491f, 0.393749863f, 0.49609375f,
      0.625038981f,  0.787499726f, 0.9921875f,   1.25007796f,  1.57499945f,  1.984375f,    2.50015593f,  3.1499989f,
      3.96875f,      5.00031185f,  6.29999781f,  7.9375f,      10.0006237f,  12.5999956f,  15.875f,      20.0012474f,
      25.1999912f,   31.75f,       40.0024948f,  50.3999825f,  63.5f,        80.0049896f,  100.799965f,  127.0f,
  };
  const __m512 low = _mm512_load_ps(kPowers), high = _mm512_load_ps(kPowers + 16);
  const auto inside = each(q, [](Float a) { return (Float)_mm512_range_ps((__m512)a, _mm512_set1_ps(kLeast), 0xb); });
  const auto power = each(
      inside, [=](Float a) { return (Float)_mm512_permutex2var_ps(low, _mm512_srli_epi32((__m512i)a, 23), high); });
  const auto mantissa =
      each(inside, [](Float a) { return (Float)_mm512_getmant_ps((__m512)a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero); });
  return power * polynomial(mantissa, -0.0106039044f, 0.0860913694f, -0.300611615f, 0.718153954f, 0.506979346f);
#else
  // Dividing the exponent by -3 gives z = q**(-1/3) to 3.5 %, around a factor that suits the polynomial best;
  // cbrt(q) = q * z*z * (q * z**3)**(-2/3), and the last factor is a polynomial of something near 1.
  const auto a = each(q, [](Float x) { return maximum(absolute(x), splat(kLeast)); });
  const auto exponent = fma(each(a, [](Float x) { return to_float(bits(x)); }), -1.0f / 3.0f, 1419502976.0f);
  const auto z = each(exponent, [](Float x) { return as_float(nearest(x)); });
  const auto square = a * z * z;
  return square * polynomial(square * z, -88.5366821f, 333.08725f, -485.347015f, 367.795654f);
#endif
}

// The random words of the element pairs of a block, as optwatch/kernels/random.py defines them. Read as 16-bit
// numbers they are in the order of the elements, on a little-endian machine.
OPTWATCH_INLINE void random_words(int64_t first, Key key, int n, uint32_t* out) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  const uint64_t pair = static_cast<uint64_t>(first) >> 1;  // a block never crosses a multiple of 2**32 pairs
  const uint32_t base = static_cast<uint32_t>(pair) + key.k0 + static_cast<uint32_t>(pair >> 32) * 0x9E3779B9u;
  Word counter;
  for (int i = 0; i < kWidth; i++) counter[i] = base + static_cast<uint32_t>(i);
  const Word mixed = splat(key.k1 ^ (key.k1 >> 15));
  for (int i = 0; i < (n + 1) / 2; i += kWidth, counter += kWidth) {  // an odd last element has a pair, too
    Word x = counter;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= (x >> 15) ^ mixed;  // what x ^= k1, x ^= x >> 15 gives, in two instructions of three operands
    x *= 0x846ca68bu;
    x ^= x >> 16;
    store(out + i, x);
  }
}

}  // namespace optwatch::OPTWATCH_ISA
