// One byte an element: cube roots for signed slots, logarithms for second moments. The formulas are in codec.py; here
// is how they are reached without a cube root, a division or an exponential per element.
#pragma once

#include "optwatch/kernels/cpu/mathematics.h"

namespace optwatch::OPTWATCH_ISA {

// Elements of the codec's block that starts at `start` of n.
OPTWATCH_INLINE int length_of(int start, int block, int n) { return n - start < block ? n - start : block; }

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
    const float unit = cubic_scale(part, start / kCubicBlock) * kCubicUnit;
    in_packs(length_of(start, kCubicBlock, n), [=](int i, auto size) {
      const auto code = load_narrow_pack<size.value>(codes + start + i);
      store(scratch + start + i, code * code * code * unit);
    });
  }
  return scratch;
}

inline float cubic_limit(const Part& part, int index) {
  // A block too small to tell apart has scale 0: its values underflow, they are not cut off.
  const float scale = cubic_scale(part, index);
  return scale > 0 ? scale : __builtin_inff();
}

struct CubicNote {
  float inverse[kBlock / kCubicBlock];  // of the scale; 0 where all codes are 0
};
static_assert(sizeof(CubicNote) <= sizeof(Note));

inline void cubic_prepare(const Part& part, int n, const float* exact, Note* note) {
  auto* inverse = reinterpret_cast<CubicNote*>(note)->inverse;
  for (int start = 0, k = 0; start < n; start += kCubicBlock, k++) {
    Int most{};  // bit patterns of magnitudes order like integers, NaN above infinity above the rest
    for (int i = 0; i < length_of(start, kCubicBlock, n); i += kWidth)
      most = maximum(most, load_bits(exact + start + i) & ~kSignBit);
    const int32_t top = largest(most);
    const bool empty = top < bits(kSmallestNormal), finite = top < kInfinityBits;
    int32_t scale = (top + 0xffff) & ~0xffff;
    if (scale > kLargestBf16Bits) scale = kLargestBf16Bits;
    inverse[k] = empty || !finite ? 0.0f : 1.0f / as_float(scale);
    cubic_scales(part)[k] = empty ? 0 : finite ? static_cast<uint16_t>(scale >> 16) : 0x7fc0;
  }
}

inline void cubic_store(const Part& part, int n, const float* exact, const Note& note) {
  int8_t* codes = static_cast<int8_t*>(part.values);
  for (int start = 0, k = 0; start < n; start += kCubicBlock, k++) {
    const int length = length_of(start, kCubicBlock, n);
    const float inverse = reinterpret_cast<const CubicNote&>(note).inverse[k];
    if (inverse == 0) {
      std::memset(codes + start, 0, static_cast<size_t>(length));
      continue;
    }
    in_packs(length, [=](int i, auto size) {
      const auto x = load_pack<size.value>(exact + start + i);
      const auto code = cbrt_times_127(each(x, absolute) * inverse);
      store_narrow(codes + start + i,
                   each(code, x, [](Float c, Float a) { return nearest(as_float(bits(c) | (bits(a) & kSignBit))); }));
    });
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
    const float lowest = grid[0], step = grid[1];
#if defined(__AVX512F__)
    // With code = 16 h + l the value is lowest * 2**(16 h * step) times 2**((l - 1) * step): two tables of sixteen
    // entries, looked up by permutation, in place of an exponential per element.
    const Floats<2> tables = exp2(Floats<2>{count_up() * 16.0f, count_up() - 1.0f} * step);
    const __m512 coarse = (__m512)(lowest * tables.v[0]), fine = (__m512)tables.v[1];
    for (int i = start; i < start + length_of(start, kLogBlock, n); i += kWidth) {
      const __m512i code = (__m512i)load_narrow(codes + i);
      const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(code, 4), coarse);
      const __m512 low = _mm512_permutexvar_ps(code, fine);  // reads the lower four bits only
      _mm512_storeu_ps(scratch + i, _mm512_maskz_mul_ps(_mm512_test_epi32_mask(code, code), high, low));
    }
#else
    in_packs(length_of(start, kLogBlock, n), [=](int i, auto size) {
      const auto code = load_narrow_pack<size.value>(codes + start + i);
      const auto value = exp2((code - 1.0f) * step) * lowest;
      store(scratch + start + i,
            each(code, value, [](Float c, Float v) { return select(equal(c, Float{}), Float{}, v); }));
    });
#endif
  }
  return scratch;
}

inline float log_limit(const Part&, int) { return __builtin_inff(); }  // the grid ends at the largest value

// How a block of second moments is encoded.
struct LogGrid {
  float lowest, inverse, per_step;  // inverse = 1 / lowest, per_step = 1 / step
  float bend;                       // k of bend_of
  bool plain;                       // every element is normal, finite and at least `lowest`
  int code;                         // what all elements get where there is no grid, else -1
};

// p(f) = (2**(f*step) - 1) / (2**step - 1) is the probability to round up at a fraction f. With a = step * log(2) it is
// f - f * (1 - f) * k, exact at f = 0, 1/2 and 1 with k = 2 * tanh(a / 4). What is left is odd about 1/2, so nothing is
// biased, and below 0.01 * a**2: 6e-5 for the usual twenty octaves in a block.
OPTWATCH_INLINE float bend_of(float step) {
  const float a = step * kLn2;
  return a * (0.5f - a * a * (1.0f / 96));
}

OPTWATCH_INLINE LogGrid log_grid_of(const float* exact, int n, float* out) {
  // One less than each bit pattern, without sign: zero becomes the largest word, and negative NaN follows. So where
  // the largest is an ordinary number there is neither zero nor NaN, and the rest takes the long way.
  uint32_t one = 1;
  // Compilers make a vector of ones by an instruction that waits for what the register held before, which here is the
  // end of the previous block's long chain; hidden from them, the number comes from elsewhere.
  asm("" : "+r"(one));
  Word least = load_as<Word>(exact) - one, most = least;
  for (int i = kWidth; i < n; i += kWidth) {
    const Word x = load_as<Word>(exact + i) - one;
    least = minimum(least, x);
    most = maximum(most, x);
  }
  LogGrid grid;
  grid.code = -1;
  const uint32_t smallest_bits = smallest(least) + 1;
  uint32_t top = largest(most) + 1;
  grid.plain = top - 1 < kInfinityBits - 1 && smallest_bits >= static_cast<uint32_t>(bits(kSmallestNormal));
  if (!grid.plain) {
    Int magnitude{};
    for (int i = 0; i < n; i += kWidth) magnitude = maximum(magnitude, load_bits(exact + i) & ~kSignBit);
    top = static_cast<uint32_t>(largest(magnitude));
    if (top == 0 || top >= kInfinityBits) {
      grid.code = top ? 1 : 0;
      out[0] = out[1] = top ? __builtin_nanf("") : 0.0f;
      return grid;
    }
  }
  // In bits, not in floats: a product below the normal range costs some processors a hundred cycles.
  constexpr uint32_t normal = 0x00800000, widest = 126u << 23;
  uint32_t low_bits = smallest_bits < normal ? normal : smallest_bits;
  if (top < normal) top = normal;
  if (top - low_bits > widest && top > low_bits) {
    low_bits = top - widest;
    grid.plain = false;
  }
  const float low = as_float(static_cast<int32_t>(low_bits)), high = as_float(static_cast<int32_t>(top));
  grid.lowest = low;
  grid.inverse = 1.0f / low;
  float step = log2(Floats<1>{splat(high * grid.inverse)}).v[0][0] * (1.0f / 254.0f);
  if (!(step > kSmallestStep)) step = kSmallestStep;
  // A hair too small, so that the largest value lies below code 254 + 1 whatever the rounding.
  grid.per_step = (1.0f - 0x1p-22f) / step;
  grid.bend = bend_of(step);
  out[0] = low;
  out[1] = step;
  return grid;
}

template <bool plain>
OPTWATCH_INLINE void log_encode(const LogGrid& grid, const float* exact, const uint16_t* numbers, int n,
                                uint8_t* codes) {
  in_packs(n, [=](int i, auto size) {
    const auto v = load_pack<size.value>(exact + i);
    const auto above = each(v, [=](Float x) { return plain ? x : maximum(x, splat(grid.lowest)); });
    const auto position = log2(above * grid.inverse) * grid.per_step;
    const auto f = each(position, fraction);
    // The code is 1 + floor(position), and one more if (number + 1) / 65536 <= p(f). In one sum: what is added to
    // floor(position) + p(f) lies in [1, 2), so that the carry of the fraction is the rounding.
    const auto up = fma(fma(f, grid.bend, -grid.bend), f, position + (2.0f - 0x1p-16f));
    const auto sum = fma(load_narrow_pack<size.value>(numbers + i), -0x1p-16f, up);
    // The smallest and the largest value may come out a rounding error beside the grid, at the code for zero or, which
    // wraps to it, at 256.
    store_narrow(codes + i, each(v, sum, [](Float x, Float y) {
                   const Int code = truncate(maximum(minimum(y, splat(255.0f)), splat(1.0f)));
                   return plain ? code : select(equal(bits(x), Int{}), Int{}, code);
                 }));
  });
}

struct LogNote {
  LogGrid grids[kBlock / kLogBlock];
};
static_assert(sizeof(LogNote) <= sizeof(Note));

inline void log_prepare(const Part& part, int n, const float* exact, Note* note) {
  LogGrid* grids = reinterpret_cast<LogNote*>(note)->grids;
  for (int start = 0, k = 0; start < n; start += kLogBlock, k++)
    grids[k] = log_grid_of(exact + start, length_of(start, kLogBlock, n), log_grid(part, k));
}

inline void log_store(const Part& part, int n, const float* exact, const Note& note) {
  uint8_t* codes = static_cast<uint8_t*>(part.values);
  alignas(64) uint32_t random[kBlock / 2 + kPad];
  random_words(part.first, part.key, n, random);
  const uint16_t* numbers = reinterpret_cast<const uint16_t*>(random);
  for (int start = 0, k = 0; start < n; start += kLogBlock, k++) {
    const LogGrid& grid = reinterpret_cast<const LogNote&>(note).grids[k];
    const int length = length_of(start, kLogBlock, n);
    if (grid.code >= 0)
      std::memset(codes + start, grid.code, static_cast<size_t>(length));
    else if (grid.plain)
      log_encode<true>(grid, exact + start, numbers + start, length, codes + start);
    else
      log_encode<false>(grid, exact + start, numbers + start, length, codes + start);
  }
}

constexpr Codec codecs_int8[] = {
    {"int8_cubic", 1, 2, kCubicBlock, false, cubic_load, cubic_prepare, cubic_store, kLargestBf16, cubic_limit},
    {"int8_log", 1, 2, kLogBlock, false, log_load, log_prepare, log_store, __builtin_inff(), log_limit},
};

}  // namespace optwatch::OPTWATCH_ISA
