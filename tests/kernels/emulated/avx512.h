// The kernels' AVX-512 without AVX-512: what they use of it, in plain loops as Intel's manual defines it. Included
// before everything else; processors with AVX2 and FMA run the result.
#pragma once

#include <immintrin.h>  // before the macros below, which its own headers would take at their word

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1

namespace emulated {

// The 512 bits as numbers of type T, and back.
template <class T>
struct Lanes {
  static constexpr int kCount = 64 / sizeof(T);
  T at[kCount];

  Lanes() = default;
  template <class V>
  explicit Lanes(const V& v) {
    static_assert(sizeof(V) == 64);
    std::memcpy(at, &v, 64);
  }
  template <class V>
  operator V() const {
    V v;
    static_assert(sizeof(V) == 64);
    std::memcpy(&v, at, 64);
    return v;
  }
};

template <class T, class F>
inline Lanes<T> each(F f) {
  Lanes<T> r;
  for (int i = 0; i < Lanes<T>::kCount; i++) r.at[i] = f(i);
  return r;
}
template <class T, class V, class F>
inline Lanes<T> map(const V& v, F f) {
  const Lanes<T> a(v);
  return each<T>([&](int i) { return f(a.at[i]); });
}
template <class T, class V, class W, class F>
inline Lanes<T> map(const V& v, const W& w, F f) {
  const Lanes<T> a(v), b(w);
  return each<T>([&](int i) { return f(a.at[i], b.at[i]); });
}
// Bit i of the result is f of element i of both.
template <class T, class V, class W, class F>
inline uint64_t mask(const V& v, const W& w, F f) {
  const Lanes<T> a(v), b(w);
  uint64_t found = 0;
  for (int i = 0; i < Lanes<T>::kCount; i++) found |= uint64_t(f(a.at[i], b.at[i]) ? 1 : 0) << i;
  return found;
}
// Elements of `on` where the mask has a bit, of `off` elsewhere.
template <class T, class V, class W>
inline Lanes<T> choose(uint64_t k, const V& on, const W& off) {
  const Lanes<T> a(on), b(off);
  return each<T>([&](int i) { return k >> i & 1 ? a.at[i] : b.at[i]; });
}

// ---- moving ----------------------------------------------------------------------------------------------------

template <class T>
inline __m512i set1(T x) {
  return each<T>([=](int) { return x; });
}
inline __m512 set1_ps(float x) {
  return each<float>([=](int) { return x; });
}
template <class T, class... Rest>
inline __m512i set_in_order(Rest... values) {
  const T at[] = {static_cast<T>(values)...};
  static_assert(sizeof at == 64);
  return each<T>([&](int i) { return at[i]; });
}
template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void storeu(void* p, __m512i v) { std::memcpy(p, &v, 64); }
inline __m512 broadcast_f32x8(__m256 v) {
  float at[8];
  std::memcpy(at, &v, sizeof at);
  return each<float>([&](int i) { return at[i % 8]; });
}
template <class T>
inline Lanes<T> permutexvar(__m512i index, const Lanes<T>& v) {
  const Lanes<std::make_unsigned_t<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>> k(index);
  return each<T>([&](int i) { return v.at[k.at[i] % Lanes<T>::kCount]; });
}
// Of the elements of a and those of b after them.
template <class T, class Index>
inline Lanes<T> permutex2var(const Lanes<T>& a, __m512i index, const Lanes<T>& b) {
  const Lanes<Index> k(index);
  constexpr int n = Lanes<T>::kCount;
  return each<T>([&](int i) {
    const int j = static_cast<int>(k.at[i] % (2 * n));
    return j < n ? a.at[j] : b.at[j - n];
  });
}
inline __m512 permutexvar_ps(__m512i index, __m512 v) { return permutexvar(index, Lanes<float>(v)); }
inline __m512i permutexvar_epi32(__m512i index, __m512i v) { return permutexvar(index, Lanes<int32_t>(v)); }
inline __m512i permutexvar_epi64(__m512i index, __m512i v) { return permutexvar(index, Lanes<int64_t>(v)); }
inline __m512 permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  return permutex2var<float, uint32_t>(Lanes<float>(a), index, Lanes<float>(b));
}
inline __m512i permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
  return permutex2var<int16_t, uint16_t>(Lanes<int16_t>(a), index, Lanes<int16_t>(b));
}
inline __m512i gather(__m512i index, const void* table, int scale) {
  return map<int32_t>(index, [=](int32_t i) {
    int32_t x;
    std::memcpy(&x, static_cast<const char*>(table) + int64_t{i} * scale, sizeof x);
    return x;
  });
}
// To half the width with saturation, in quarters: of each the elements of a, then those of b.
template <class From, class To>
inline __m512i pack(__m512i v, __m512i w) {
  const Lanes<From> a(v), b(w);
  constexpr int quarter = Lanes<From>::kCount / 4;
  constexpr From least = std::is_signed_v<To> ? static_cast<From>(-(1 << (8 * sizeof(To) - 1))) : From{0};
  constexpr From most = static_cast<From>((1 << (8 * sizeof(To) - (std::is_signed_v<To> ? 1 : 0))) - 1);
  return each<To>([&](int i) {
    const int q = i / (2 * quarter), j = i % (2 * quarter);
    const From x = j < quarter ? a.at[q * quarter + j] : b.at[q * quarter + j - quarter];
    return static_cast<To>(x < least ? least : x > most ? most : x);
  });
}
template <class From, class To, class V>
inline __m512i widen(V v) {
  From at[64 / sizeof(To)];
  static_assert(sizeof at <= sizeof v);
  std::memcpy(at, &v, sizeof at);
  return each<To>([&](int i) { return static_cast<To>(at[i]); });
}
template <class From, class To, class V>
inline V truncate(__m512i v) {
  const Lanes<From> a(v);
  V r = {};
  To at[Lanes<From>::kCount];
  for (int i = 0; i < Lanes<From>::kCount; i++) at[i] = static_cast<To>(a.at[i]);
  std::memcpy(&r, at, sizeof at);
  return r;
}

// ---- integers --------------------------------------------------------------------------------------------------

template <class T>
inline __m512i larger(__m512i a, __m512i b) {
  return map<T>(a, b, [](T x, T y) { return x < y ? y : x; });
}
template <class T>
inline __m512i smaller(__m512i a, __m512i b) {
  return map<T>(a, b, [](T x, T y) { return y < x ? y : x; });
}
template <class T>
inline __m512i sub(__m512i a, __m512i b) {
  return map<T>(a, b, [](T x, T y) { return static_cast<T>(x - y); });
}
template <class T>
inline __m512i mask_sub(__m512i otherwise, uint64_t k, __m512i a, __m512i b) {
  return choose<T>(k, sub<T>(a, b), otherwise);
}
inline __m512i mulhi_epu16(__m512i a, __m512i b) {
  return map<uint16_t>(a, b, [](uint32_t x, uint32_t y) { return static_cast<uint16_t>(x * y >> 16); });
}
template <class T>
inline __m512i shift_right(__m512i a, unsigned by) {
  return map<T>(a, [=](T x) { return static_cast<T>(x >> by); });
}
inline __m512i slli_epi64(__m512i a, unsigned by) {
  return map<uint64_t>(a, [=](uint64_t x) { return x << by; });
}
inline __m512i or_bits(__m512i a, __m512i b) {
  return map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x | y; });
}
inline __m512i xor_bits(__m512i a, __m512i b) {
  return map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x ^ y; });
}
template <class T>
inline uint64_t less(__m512i a, __m512i b) {
  return mask<T>(a, b, [](T x, T y) { return x < y; });
}
inline __mmask16 cmpeq_epi32(__m512i a, __m512i b) {
  return static_cast<__mmask16>(mask<int32_t>(a, b, [](int32_t x, int32_t y) { return x == y; }));
}
inline __mmask16 test_epi32(__m512i a, __m512i b) {
  return static_cast<__mmask16>(mask<int32_t>(a, b, [](int32_t x, int32_t y) { return (x & y) != 0; }));
}

// ---- floating point --------------------------------------------------------------------------------------------
// What an instruction is told by a constant is a parameter of the template, and what is not emulated does not compile.

inline __m512 mul_ps(__m512 a, __m512 b) {
  return map<float>(a, b, [](float x, float y) { return x * y; });
}
inline __m512 maskz_mul_ps(__mmask16 k, __m512 a, __m512 b) { return choose<float>(k, mul_ps(a, b), set1_ps(0)); }
// The second operand where either is NaN, or where both are zero.
inline __m512 max_ps(__m512 a, __m512 b) {
  return map<float>(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline __m512 min_ps(__m512 a, __m512 b) {
  return map<float>(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Lanes<float> x(a), y(b), z(c);
  return each<float>([&](int i) { return __builtin_fmaf(x.at[i], y.at[i], z.at[i]); });
}
inline __m512 mask3_fmadd_ps(__m512 a, __m512 b, __m512 c, __mmask16 k) {
  return choose<float>(k, fmadd_ps(a, b, c), c);
}
inline __m512 sqrt_ps(__m512 a) {
  return map<float>(a, [](float x) { return std::sqrt(x); });
}
template <int predicate>
inline __mmask16 cmp_ps(__m512 a, __m512 b) {
  static_assert(predicate == _CMP_LT_OQ || predicate == _CMP_EQ_OQ);
  return static_cast<__mmask16>(
      mask<float>(a, b, [](float x, float y) { return predicate == _CMP_LT_OQ ? x < y : x == y; }));
}
// What does not fit is the least integer.
inline int32_t to_integer(float x) { return x >= -0x1p31f && x < 0x1p31f ? static_cast<int32_t>(x) : INT32_MIN; }
inline __m512i cvttps_epi32(__m512 a) {
  const Lanes<float> x(a);
  return each<int32_t>([&](int i) { return to_integer(x.at[i]); });
}
inline __m512i cvtps_epi32(__m512 a) {
  const Lanes<float> x(a);
  return each<int32_t>([&](int i) { return to_integer(std::nearbyint(x.at[i])); });
}
template <int how>
inline __m512 roundscale_ps(__m512 a) {
  static_assert((how & ~_MM_FROUND_NO_EXC) == _MM_FROUND_TO_NEAREST_INT);
  return map<float>(a, [](float x) { return std::nearbyint(x); });
}
template <int how>
inline __m512 reduce_ps(__m512 a) {
  static_assert((how & ~_MM_FROUND_NO_EXC) == _MM_FROUND_TO_NEG_INF);
  return map<float>(a, [](float x) {
    const float rest = std::isinf(x) ? 0.0f : x - std::floor(x);
    return rest == 0 && !std::isinf(x) ? -0.0f : rest;  // as a difference is when it is rounded down
  });
}
inline __m512 getexp_ps(__m512 a) {
  return map<float>(a, [](float x) { return std::logb(x); });
}
template <int interval, int sign>
inline __m512 getmant_ps(__m512 a) {
  static_assert(interval == _MM_MANT_NORM_1_2);
  static_assert(sign == _MM_MANT_SIGN_src || sign == _MM_MANT_SIGN_zero);
  return map<float>(a, [](float x) {
    int exponent;
    const float size = x == 0 || std::isinf(x) ? 1.0f : 2 * std::frexp(std::fabs(x), &exponent);
    return sign == _MM_MANT_SIGN_zero ? size : std::copysign(size, x);
  });
}
// The larger magnitude, without a sign; of a number and NaN, the number.
template <int how>
inline __m512 range_ps(__m512 a, __m512 b) {
  static_assert(how == 0xb);
  return map<float>(a, b, [](float x, float y) { return std::fmax(std::fabs(x), std::fabs(y)); });
}
inline float scaled(float x, float n) {
  if (std::isnan(n)) return std::isnan(x) ? x : n;
  if (std::isinf(n) && std::isnan(x)) return n > 0 ? n : 0.0f;  // unlike a product
  if (std::isinf(n) && (n > 0 ? x == 0 : std::isinf(x))) return NAN;
  return std::ldexp(x, static_cast<int>(std::fmin(std::fmax(std::floor(n), -999.0f), 999.0f)));
}
inline __m512 scalef_ps(__m512 a, __m512 b) { return map<float>(a, b, scaled); }
// To 14 bits, as near as that allows.
inline float roughly(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isfinite(x)) bits = (bits + 0x100) & ~uint32_t{0x1ff};
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline __m512 rcp14_ps(__m512 a) {
  return map<float>(a, [](float x) { return roughly(1 / x); });
}
inline __m512 rsqrt14_ps(__m512 a) {
  return map<float>(a, [](float x) { return roughly(1 / std::sqrt(x)); });
}

}  // namespace emulated

#undef _mm512_setr_epi32
#undef _mm512_setr_epi64
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_epi8 emulated::set1<int8_t>
#define _mm512_set1_epi16 emulated::set1<int16_t>
#define _mm512_set1_epi32 emulated::set1<int32_t>
#define _mm512_setr_epi32 emulated::set_in_order<int32_t>
#define _mm512_setr_epi64 emulated::set_in_order<int64_t>
#define _mm512_load_si512 emulated::load<__m512i>
#define _mm512_loadu_si512 emulated::load<__m512i>
#define _mm512_load_ps emulated::load<__m512>
#define _mm512_loadu_ps emulated::load<__m512>
#define _mm512_storeu_si512 emulated::storeu
#define _mm512_broadcast_f32x8 emulated::broadcast_f32x8
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#define _mm512_permutexvar_epi32 emulated::permutexvar_epi32
#define _mm512_permutexvar_epi64 emulated::permutexvar_epi64
#define _mm512_permutex2var_ps emulated::permutex2var_ps
#define _mm512_permutex2var_epi16 emulated::permutex2var_epi16
#define _mm512_i32gather_epi32 emulated::gather
#define _mm512_packs_epi32 emulated::pack<int32_t, int16_t>
#define _mm512_packs_epi16 emulated::pack<int16_t, int8_t>
#define _mm512_packus_epi16 emulated::pack<int16_t, uint8_t>
#define _mm512_cvtepi8_epi32 emulated::widen<int8_t, int32_t>
#define _mm512_cvtepu8_epi32 emulated::widen<uint8_t, int32_t>
#define _mm512_cvtepi16_epi32 emulated::widen<int16_t, int32_t>
#define _mm512_cvtepu16_epi32 emulated::widen<uint16_t, int32_t>
#define _mm512_cvtepu8_epi64 emulated::widen<uint8_t, int64_t>
#define _mm512_cvtepi32_epi8 emulated::truncate<int32_t, int8_t, __m128i>
#define _mm512_cvtepi32_epi16 emulated::truncate<int32_t, int16_t, __m256i>
#define _mm512_cvtepi64_epi8 emulated::truncate<int64_t, int8_t, __m128i>
#define _mm512_max_epi32 emulated::larger<int32_t>
#define _mm512_max_epu32 emulated::larger<uint32_t>
#define _mm512_max_epu8 emulated::larger<uint8_t>
#define _mm512_min_epi32 emulated::smaller<int32_t>
#define _mm512_min_epu32 emulated::smaller<uint32_t>
#define _mm512_sub_epi16 emulated::sub<uint16_t>
#define _mm512_mask_sub_epi16 emulated::mask_sub<uint16_t>
#define _mm512_mask_sub_epi32 emulated::mask_sub<uint32_t>
#define _mm512_mulhi_epu16 emulated::mulhi_epu16
#define _mm512_srli_epi32 emulated::shift_right<uint32_t>
#define _mm512_srli_epi64 emulated::shift_right<uint64_t>
#define _mm512_slli_epi64 emulated::slli_epi64
#define _mm512_or_si512 emulated::or_bits
#define _mm512_xor_si512 emulated::xor_bits
#define _mm512_cmplt_epi32_mask emulated::less<int32_t>
#define _mm512_cmplt_epu16_mask emulated::less<uint16_t>
#define _mm512_cmpeq_epi32_mask emulated::cmpeq_epi32
#define _mm512_test_epi32_mask emulated::test_epi32
#define _mm512_mask_blend_ps(k, off, on) __m512(emulated::choose<float>(k, on, off))
#define _mm512_mask_blend_epi32(k, off, on) __m512i(emulated::choose<int32_t>(k, on, off))
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_maskz_mul_ps emulated::maskz_mul_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_mask3_fmadd_ps emulated::mask3_fmadd_ps
#define _mm512_sqrt_ps emulated::sqrt_ps
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::cmp_ps<predicate>(a, b)
#define _mm512_cvttps_epi32 emulated::cvttps_epi32
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_roundscale_ps(a, how) emulated::roundscale_ps<how>(a)
#define _mm512_reduce_ps(a, how) emulated::reduce_ps<how>(a)
#define _mm512_getexp_ps emulated::getexp_ps
#define _mm512_getmant_ps(a, interval, sign) emulated::getmant_ps<interval, sign>(a)
#define _mm512_range_ps(a, b, how) emulated::range_ps<how>(a, b)
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_rcp14_ps emulated::rcp14_ps
#define _mm512_rsqrt14_ps emulated::rsqrt14_ps
