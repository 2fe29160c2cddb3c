// One vector of fp32 or 32-bit integers, as wide as the instruction set has them. GCC's and Clang's vector types give
// the arithmetic; the few operations that they lack, or compile badly, are written out for each instruction set.
// Everything lies in a namespace of the instruction set, so that no two translation units share a function that was
// compiled with different flags.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define OPTWATCH_INLINE inline __attribute__((always_inline))
#define OPTWATCH_INLINE_BODY __attribute__((always_inline))  // of a lambda
#define OPTWATCH_RARE inline __attribute__((noinline, cold))

namespace optwatch::OPTWATCH_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Float __attribute__((vector_size(4 * kWidth)));
typedef int32_t Int __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Word __attribute__((vector_size(4 * kWidth)));

OPTWATCH_INLINE Float splat(float x) { return x - Float{}; }
OPTWATCH_INLINE Int splat(int32_t x) { return x - Int{}; }
OPTWATCH_INLINE Word splat(uint32_t x) { return x - Word{}; }

template <class V, class T>
OPTWATCH_INLINE V load_as(const T* p) {
  V v;
  static_assert(sizeof(V) % sizeof(T) == 0);
  std::memcpy(&v, p, sizeof v);
  return v;
}
OPTWATCH_INLINE Float load(const float* p) { return load_as<Float>(p); }
OPTWATCH_INLINE Int load_bits(const float* p) { return load_as<Int>(p); }
template <class V>
OPTWATCH_INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

OPTWATCH_INLINE Int bits(Float x) { return reinterpret_cast<Int>(x); }
OPTWATCH_INLINE Float as_float(Int x) { return reinterpret_cast<Float>(x); }

OPTWATCH_INLINE Float to_float(Int x) { return __builtin_convertvector(x, Float); }

// A comparison's result and what is done with it.
#if defined(__AVX512F__)
typedef __mmask16 Mask;
OPTWATCH_INLINE Mask less(Int a, Int b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
OPTWATCH_INLINE Mask less(Float a, Float b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
OPTWATCH_INLINE Mask equal(Int a, Int b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
OPTWATCH_INLINE Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
OPTWATCH_INLINE Mask both(Mask a, Mask b) { return a & b; }
OPTWATCH_INLINE Mask but_not(Mask a, Mask b) { return a & static_cast<Mask>(~b); }
OPTWATCH_INLINE Float select(Mask m, Float a, Float b) { return _mm512_mask_blend_ps(m, (__m512)b, (__m512)a); }
OPTWATCH_INLINE Int select(Mask m, Int a, Int b) { return (Int)_mm512_mask_blend_epi32(m, (__m512i)b, (__m512i)a); }
// Adds one where the mask is set.
OPTWATCH_INLINE Int count(Int n, Mask m) {
  return (Int)_mm512_mask_sub_epi32((__m512i)n, m, (__m512i)n, _mm512_set1_epi32(-1));
}
#else
typedef Int Mask;
OPTWATCH_INLINE Mask less(Int a, Int b) { return a < b; }
OPTWATCH_INLINE Mask less(Float a, Float b) { return a < b; }
OPTWATCH_INLINE Mask equal(Int a, Int b) { return a == b; }
OPTWATCH_INLINE Mask equal(Float a, Float b) { return a == b; }
OPTWATCH_INLINE Mask both(Mask a, Mask b) { return a & b; }
OPTWATCH_INLINE Mask but_not(Mask a, Mask b) { return a & ~b; }
OPTWATCH_INLINE Float select(Mask m, Float a, Float b) { return as_float((m & bits(a)) | (~m & bits(b))); }
OPTWATCH_INLINE Int select(Mask m, Int a, Int b) { return (m & a) | (~m & b); }
OPTWATCH_INLINE Int count(Int n, Mask m) { return n - m; }
#endif

// a * b + c, rounded once where the instruction set can. Code whose last bit matters must not use it: it spells out
// its products and sums, which are never contracted.
OPTWATCH_INLINE Float fma(Float a, Float b, Float c) {
#if defined(__AVX512F__)
  return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Float)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

OPTWATCH_INLINE Float sqrt(Float x) {
#if defined(__AVX512F__)
  return (Float)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Float)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Float)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (Float)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < kWidth; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// A square root to 2e-7 for x >= 0, infinity and NaN included, where that is faster than the exact one: the statistics
// need no more. Below the normal range it is as if x were multiplied by something near 1.
OPTWATCH_INLINE Float sqrt_nearly(Float x) {
#if defined(__AVX512F__)
  const __m512 lowest = _mm512_set1_ps(0x1p-126f), highest = _mm512_set1_ps(0x1.fffffep127f);
  const __m512 inside = _mm512_min_ps(highest, _mm512_max_ps(lowest, (__m512)x));  // NaN becomes a number here,
  const __m512 y = _mm512_rsqrt14_ps(inside);
  const __m512 half = _mm512_mul_ps(_mm512_mul_ps(inside, y), _mm512_set1_ps(-0.5f));
  const __m512 better = _mm512_mul_ps(y, _mm512_fmadd_ps(half, y, _mm512_set1_ps(1.5f)));
  return (Float)_mm512_mul_ps((__m512)x, better);  // and is one again here
#else
  return sqrt(x);
#endif
}

// 1 / x to three digits or more; infinity for 0.
OPTWATCH_INLINE Float reciprocal_nearly(Float x) {
#if defined(__AVX512F__)
  return (Float)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
  return (Float)_mm256_rcp_ps((__m256)x);
#elif defined(__SSE2__)
  return (Float)_mm_rcp_ps((__m128)x);
#else
  return 1.0f / x;
#endif
}

// Towards zero; the value must fit.
OPTWATCH_INLINE Int truncate(Float x) {
#if defined(__AVX512F__)
  return (Int)_mm512_cvttps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (Int)_mm256_cvttps_epi32((__m256)x);
#elif defined(__SSE2__)
  return (Int)_mm_cvttps_epi32((__m128)x);
#else
  return __builtin_convertvector(x, Int);
#endif
}

// To the nearest integer, which must fit; where the processor has no such instruction a half goes away from zero.
OPTWATCH_INLINE Int nearest(Float x) {
#if defined(__AVX512F__)
  return (Int)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (Int)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
  return (Int)_mm_cvtps_epi32((__m128)x);
#elif defined(__aarch64__)
  return (Int)vcvtnq_s32_f32((float32x4_t)x);
#else
  return truncate(x + select(less(x, Float{}), splat(-0.5f), splat(0.5f)));
#endif
}

// x - floor(x), for x >= 0 that fits an integer.
OPTWATCH_INLINE Float fraction(Float x) {
#if defined(__AVX512F__)
  return (Float)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return x - (Float)_mm256_floor_ps((__m256)x);
#else
  return x - to_float(truncate(x));
#endif
}

OPTWATCH_INLINE Float minimum(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Float)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(less(a, b), a, b);
#endif
}

OPTWATCH_INLINE Float maximum(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(less(b, a), a, b);
#endif
}

OPTWATCH_INLINE Int maximum(Int a, Int b) {
#if defined(__AVX512F__)
  return (Int)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Int)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return select(less(b, a), a, b);
#endif
}

OPTWATCH_INLINE Int minimum(Int a, Int b) {
#if defined(__AVX512F__)
  return (Int)_mm512_min_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Int)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
  return select(less(a, b), a, b);
#endif
}

OPTWATCH_INLINE Word minimum(Word a, Word b) {
#if defined(__AVX512F__)
  return (Word)_mm512_min_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Word)_mm256_min_epu32((__m256i)a, (__m256i)b);
#else
  Int m = reinterpret_cast<Int>(a < b);
  return reinterpret_cast<Word>(select(m, reinterpret_cast<Int>(a), reinterpret_cast<Int>(b)));
#endif
}

OPTWATCH_INLINE Word maximum(Word a, Word b) {
#if defined(__AVX512F__)
  return (Word)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Word)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
  Int m = reinterpret_cast<Int>(b < a);
  return reinterpret_cast<Word>(select(m, reinterpret_cast<Int>(a), reinterpret_cast<Int>(b)));
#endif
}

// Narrow loads and stores: kWidth elements of 8 or 16 bits.
template <class T>
OPTWATCH_INLINE Int load_narrow(const T* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 1) {
    __m128i v = _mm_loadu_si128((const __m128i*)p);
    return (Int)(T(-1) < 0 ? _mm512_cvtepi8_epi32(v) : _mm512_cvtepu8_epi32(v));
  } else {
    __m256i v = _mm256_loadu_si256((const __m256i*)p);
    return (Int)(T(-1) < 0 ? _mm512_cvtepi16_epi32(v) : _mm512_cvtepu16_epi32(v));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 1) {
    __m128i v = _mm_loadl_epi64((const __m128i*)p);
    return (Int)(T(-1) < 0 ? _mm256_cvtepi8_epi32(v) : _mm256_cvtepu8_epi32(v));
  } else {
    __m128i v = _mm_loadu_si128((const __m128i*)p);
    return (Int)(T(-1) < 0 ? _mm256_cvtepi16_epi32(v) : _mm256_cvtepu16_epi32(v));
  }
#else
  typedef T Narrow __attribute__((vector_size(sizeof(T) * kWidth)));
  return __builtin_convertvector(load_as<Narrow>(p), Int);
#endif
}

// The lower bits of each element.
template <class T>
OPTWATCH_INLINE void store_narrow(T* p, Int x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 1)
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
  else
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(__AVX2__)
  const __m256i low = _mm256_and_si256((__m256i)x, _mm256_set1_epi32(sizeof(T) == 1 ? 0xff : 0xffff));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  if constexpr (sizeof(T) == 1)
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
  else
    _mm_storeu_si128((__m128i*)p, words);
#else
  typedef T Narrow __attribute__((vector_size(sizeof(T) * kWidth)));
  store(p, __builtin_convertvector(x, Narrow));
#endif
}

// table[index], for numbers of 32 bits.
template <class T>
OPTWATCH_INLINE auto gather(const T* table, Int index) {
  static_assert(sizeof(T) == 4);
  typedef T V __attribute__((vector_size(4 * kWidth)));
#if defined(__AVX512F__)
  return (V)_mm512_i32gather_epi32((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (V)_mm256_i32gather_epi32((const int*)table, (__m256i)index, 4);
#else
  V found;
  for (int i = 0; i < kWidth; i++) found[i] = table[index[i]];
  return found;
#endif
}

// Eight or sixteen numbers in registers, looked up by the lower three or four bits of an index.
template <int size>
struct Lookup {
#if defined(__AVX512F__)
  __m512 table;
  OPTWATCH_INLINE explicit Lookup(const float* values)
      : table(size == 16 ? _mm512_loadu_ps(values) : _mm512_broadcast_f32x8(_mm256_loadu_ps(values))) {}
  OPTWATCH_INLINE Float operator[](Int index) const { return (Float)_mm512_permutexvar_ps((__m512i)index, table); }
#elif defined(__AVX2__)
  __m256 low, high;
  OPTWATCH_INLINE explicit Lookup(const float* values)
      : low(_mm256_loadu_ps(values)), high(_mm256_loadu_ps(values + size - 8)) {}
  OPTWATCH_INLINE Float operator[](Int index) const {
    const __m256 lower = _mm256_permutevar8x32_ps(low, (__m256i)index);
    if constexpr (size == 8) return (Float)lower;
    const __m256 upper = _mm256_permutevar8x32_ps(high, (__m256i)index);
    return (Float)_mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)index, 28)));
  }
#else
  float table[size];
  OPTWATCH_INLINE explicit Lookup(const float* values) { std::memcpy(table, values, sizeof table); }
  OPTWATCH_INLINE Float operator[](Int index) const { return gather(table, index & (size - 1)); }
#endif
};

// kWidth numbers of four bits, two a byte with the first in the lower half; above them an element may have other bits.
OPTWATCH_INLINE Int load_nibbles(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m512i pair = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
  return (Int)_mm512_or_si512(pair, _mm512_slli_epi64(pair, 28));
#elif defined(__AVX2__)
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  const __m256i pair = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  return (Int)_mm256_or_si256(pair, _mm256_slli_epi64(pair, 28));
#else
  Int x;
  for (int i = 0; i < kWidth; i++) x[i] = p[i / 2] >> (i % 2 * 4);
  return x;
#endif
}

// The same way back, of numbers of [0, 16).
OPTWATCH_INLINE void store_nibbles(uint8_t* p, Int x) {
#if defined(__AVX512F__)
  const __m512i pair = _mm512_or_si512((__m512i)x, _mm512_srli_epi64((__m512i)x, 28));
  _mm_storel_epi64((__m128i*)p, _mm512_cvtepi64_epi8(pair));
#elif defined(__AVX2__)
  const __m256i pair = _mm256_or_si256((__m256i)x, _mm256_srli_epi64((__m256i)x, 28));
  const __m256i first = _mm256_set1_epi64x(0x0800);  // the lowest byte of each pair, in every two bytes
  const __m256i bytes = _mm256_shuffle_epi8(pair, first);
  const int both =
      _mm_cvtsi128_si32(_mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
  std::memcpy(p, &both, sizeof both);
#else
  for (int i = 0; i < kWidth; i += 2) p[i / 2] = static_cast<uint8_t>(x[i] | x[i + 1] << 4);
#endif
}

// 0, 1, 2, ..., and from 0 again after so many.
OPTWATCH_INLINE Float count_up(int period = kWidth) {
  Float lane;
  for (int i = 0; i < kWidth; i++) lane[i] = static_cast<float>(i % period);
  return lane;
}

// Across the lanes: halves are folded onto each other, so the chain is as short as it can be.
template <class V>
OPTWATCH_INLINE V swap_pairs(V x) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(x, x, 1, 0, 3, 2);
#endif
}
template <class V>
OPTWATCH_INLINE V swap_quads(V x) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
#else
  return __builtin_shufflevector(x, x, 2, 3, 0, 1);
#endif
}
template <class V, class Merge>
OPTWATCH_INLINE auto across(V x, Merge merge) {
#if defined(__AVX512F__)
  x = merge(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = merge(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
#elif defined(__AVX2__)
  x = merge(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
#endif
  x = merge(x, swap_quads(x));
  return merge(x, swap_pairs(x))[0];
}
template <class V>
OPTWATCH_INLINE auto sum(V x) {
  return across(x, [](V a, V b) { return a + b; });
}
template <class V>
OPTWATCH_INLINE auto largest(V x) {
  return across(x, [](V a, V b) { return maximum(a, b); });
}
template <class V>
OPTWATCH_INLINE auto smallest(V x) {
  return across(x, [](V a, V b) { return minimum(a, b); });
}

OPTWATCH_INLINE int32_t bits(float x) {
  int32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}
OPTWATCH_INLINE float as_float(int32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

}  // namespace optwatch::OPTWATCH_ISA
