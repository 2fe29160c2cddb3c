// Several vectors as one value.
#pragma once

#include "simd.h"

namespace optwatch::OPTWATCH_ISA {

// Several vectors that go through a calculation side by side. A chain of dependent operations leaves the arithmetic
// units idle, and a processor looks too few instructions ahead to fill them from the next round of a long loop; written
// this way the next instruction is always an independent one. (Half the time of the codecs' loops, measured.)
#if defined(__AVX2__)  // where half the registers of AVX-512 are no reason for fewer: 8 take 11 % less time than 2
constexpr int kTogether = 8;
#else
constexpr int kTogether = 2;
#endif

template <class V, int size>
struct Pack {
  V v[size];
};
template <int size>
using Floats = Pack<Float, size>;

template <class V, int size, class F>
OPTWATCH_INLINE auto each(const Pack<V, size>& a, F f) {
  Pack<decltype(f(a.v[0])), size> r;
#pragma GCC unroll 8
  for (int i = 0; i < size; i++) r.v[i] = f(a.v[i]);
  return r;
}
template <class V, class U, int size, class F>
OPTWATCH_INLINE auto each(const Pack<V, size>& a, const Pack<U, size>& b, F f) {
  Pack<decltype(f(a.v[0], b.v[0])), size> r;
#pragma GCC unroll 8
  for (int i = 0; i < size; i++) r.v[i] = f(a.v[i], b.v[i]);
  return r;
}
template <int size>
OPTWATCH_INLINE Floats<size> operator+(const Floats<size>& a, const Floats<size>& b) {
  return each(a, b, [](Float x, Float y) { return x + y; });
}
template <int size>
OPTWATCH_INLINE Floats<size> operator-(const Floats<size>& a, const Floats<size>& b) {
  return each(a, b, [](Float x, Float y) { return x - y; });
}
template <int size>
OPTWATCH_INLINE Floats<size> operator*(const Floats<size>& a, const Floats<size>& b) {
  return each(a, b, [](Float x, Float y) { return x * y; });
}
template <int size>
OPTWATCH_INLINE Floats<size> operator+(const Floats<size>& a, float b) {
  return each(a, [=](Float x) { return x + b; });
}
template <int size>
OPTWATCH_INLINE Floats<size> operator-(const Floats<size>& a, float b) {
  return each(a, [=](Float x) { return x - b; });
}
template <int size>
OPTWATCH_INLINE Floats<size> operator*(const Floats<size>& a, float b) {
  return each(a, [=](Float x) { return x * b; });
}
template <int size>
OPTWATCH_INLINE Floats<size> operator/(const Floats<size>& a, const Floats<size>& b) {
  return each(a, b, [](Float x, Float y) { return x / y; });
}
template <int size>
OPTWATCH_INLINE Floats<size> fma(const Floats<size>& a, const Floats<size>& b, const Floats<size>& c) {
  Floats<size> r;
#pragma GCC unroll 8
  for (int i = 0; i < size; i++) r.v[i] = fma(a.v[i], b.v[i], c.v[i]);
  return r;
}
template <int size>
OPTWATCH_INLINE Floats<size> fma(const Floats<size>& a, const Floats<size>& b, float c) {
  return each(a, b, [=](Float x, Float y) { return fma(x, y, splat(c)); });
}
template <int size>
OPTWATCH_INLINE Floats<size> fma(const Floats<size>& a, float b, const Floats<size>& c) {
  return each(a, c, [=](Float x, Float y) { return fma(x, splat(b), y); });
}
template <int size>
OPTWATCH_INLINE Floats<size> fma(const Floats<size>& a, float b, float c) {
  return each(a, [=](Float x) { return fma(x, splat(b), splat(c)); });
}
template <int size>
OPTWATCH_INLINE Floats<size> sqrt(const Floats<size>& a) {
  return each(a, [](Float x) { return sqrt(x); });
}
template <int size>
OPTWATCH_INLINE Floats<size> sqrt_nearly(const Floats<size>& a) {
  return each(a, [](Float x) { return sqrt_nearly(x); });
}
// a[0] * x**(n-1) + ... + a[n-1]
template <int size, class... Rest>
OPTWATCH_INLINE Floats<size> polynomial(const Floats<size>& x, float first, float second, Rest... rest) {
  Floats<size> p = fma(x, first, second);
  ((p = fma(p, x, rest)), ...);
  return p;
}

template <int size>
OPTWATCH_INLINE Floats<size> load_pack(const float* p) {
  Floats<size> r;
#pragma GCC unroll 8
  for (int i = 0; i < size; i++) r.v[i] = load(p + i * kWidth);
  return r;
}
template <int size, class T>
OPTWATCH_INLINE Floats<size> load_narrow_pack(const T* p) {
  Floats<size> r;
#pragma GCC unroll 8
  for (int i = 0; i < size; i++) r.v[i] = to_float(load_narrow(p + i * kWidth));
  return r;
}
template <int size, class T>
OPTWATCH_INLINE Pack<Int, size> load_integers(const T* p) {
  Pack<Int, size> r;
#pragma GCC unroll 8
  for (int i = 0; i < size; i++) r.v[i] = load_narrow(p + i * kWidth);
  return r;
}
template <int size>
OPTWATCH_INLINE void store(float* p, const Floats<size>& x) {
#pragma GCC unroll 8
  for (int i = 0; i < size; i++) store(p + i * kWidth, x.v[i]);
}
// Integers of [-128, 127] as bytes.
template <int size>
OPTWATCH_INLINE void store_bytes(int8_t* p, const Pack<Int, size>& x) {
#if defined(__AVX512BW__)
  // Packing works inside quarters of a vector, so the quarters are put in order at the end: 4 instructions for four
  // vectors, where narrowing one at a time takes 3 for each.
  if constexpr (size % 4 == 0) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#pragma GCC unroll 2
    for (int i = 0; i < size; i += 4) {
      const __m512i ab = _mm512_packs_epi32((__m512i)x.v[i], (__m512i)x.v[i + 1]);
      const __m512i cd = _mm512_packs_epi32((__m512i)x.v[i + 2], (__m512i)x.v[i + 3]);
      _mm512_storeu_si512(p + i * kWidth, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd)));
    }
    return;
  }
#elif defined(__AVX2__)
  if constexpr (size % 4 == 0) {  // the same with halves of a vector
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
#pragma GCC unroll 2
    for (int i = 0; i < size; i += 4) {
      const __m256i ab = _mm256_packs_epi32((__m256i)x.v[i], (__m256i)x.v[i + 1]);
      const __m256i cd = _mm256_packs_epi32((__m256i)x.v[i + 2], (__m256i)x.v[i + 3]);
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
      _mm256_storeu_si256((__m256i*)(p + i * kWidth), bytes);
    }
    return;
  }
#endif
#pragma GCC unroll 8
  for (int i = 0; i < size; i++) store_narrow(p + i * kWidth, x.v[i]);
}

template <int size>
struct Size {
  static constexpr int value = size;
};
// Calls body(i, Size<vectors>) for the elements [0, n): `together` vectors at a time, then one by one.
template <int together = kTogether, class Body>
OPTWATCH_INLINE void in_packs(int n, Body body) {
  int i = 0;
  for (; i + together * kWidth <= n; i += together * kWidth) body(i, Size<together>{});
  for (; i < n; i += kWidth) body(i, Size<1>{});
}

}  // namespace optwatch::OPTWATCH_ISA
