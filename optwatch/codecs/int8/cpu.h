// One byte an element: cube roots for signed slots, logarithms for second moments. The formulas are in codec.py; here
// is how they are reached without a cube root, a division or an exponential per element.
#pragma once

#include "optwatch/kernels/cpu/mathematics.h"

namespace optwatch::OPTWATCH_ISA {

// ---- cubic -----------------------------------------------------------------------------------------------------

constexpr int kCubicBlock = 128;
constexpr float kCubicUnit = 1.0 / (127.0 * 127.0 * 127.0);

// The buffers at a block. Loops have them in variables of their own: a vector that is stored may, to the compiler, have
// changed any pointer that lies in memory.
struct CubicBuffers {
  int8_t* codes;
  uint16_t* scales;

  OPTWATCH_INLINE CubicBuffers(const Part& part)
      : codes(static_cast<int8_t*>(part.values)),
        scales(static_cast<uint16_t*>(part.buffers[1]) + static_cast<uint64_t>(part.first) / kCubicBlock) {}

  OPTWATCH_INLINE float scale(int index) const { return as_float(scales[index] << 16); }
};

// How the codes of sub-block `index` are read: as their values times `factor`.
struct CubicReader {
  const int8_t* codes;  // of the whole block
  float unit;

  OPTWATCH_INLINE CubicReader(const CubicBuffers& buffers, int index, float factor = 1.0f)
      : codes(buffers.codes), unit(buffers.scale(index) * kCubicUnit * factor) {}

  template <int size>
  OPTWATCH_INLINE Floats<size> read(int i) const {
    const auto code = load_narrow_pack<size>(codes + i);
    return code * code * code * unit;
  }
  // Added to `base`, rounded once.
  template <int size>
  OPTWATCH_INLINE Floats<size> read_onto(const Floats<size>& base, int i) const {
    const auto code = load_narrow_pack<size>(codes + i);
    return fma(code * code * code, unit, base);
  }
};

inline const float* cubic_load(const Part& part, int n, float* scratch) {
  const CubicBuffers buffers = part;
  for (int start = 0; start < n; start += kCubicBlock) {
    const CubicReader reader(buffers, start / kCubicBlock);
    in_packs(length_of(start, kCubicBlock, n),
             [=](int i, auto size) { store(scratch + start + i, reader.template read<size.value>(start + i)); });
  }
  return scratch;
}

inline float cubic_limit(const Part& part, int index) {
  // A block too small to tell apart has scale 0: its values underflow, they are not cut off.
  const float scale = CubicBuffers(part).scale(index);
  return scale > 0 ? scale : __builtin_inff();
}

struct CubicNote {
  float inverse[kBlock / kCubicBlock];  // of the scale; 0 where all codes are 0
};
static_assert(sizeof(CubicNote) <= sizeof(Note::bytes));

// Writes the scale of a sub-block whose largest magnitude has the bit pattern `top`; returns its inverse.
OPTWATCH_INLINE float cubic_rescale(const CubicBuffers& buffers, int index, int32_t top) {
  const bool empty = top < bits(kSmallestNormal), finite = top < kInfinityBits;
  int32_t scale = (top + 0xffff) & ~0xffff;
  if (scale > kLargestBf16Bits) scale = kLargestBf16Bits;
  buffers.scales[index] = empty ? 0 : finite ? static_cast<uint16_t>(scale >> 16) : 0x7fc0;
  return empty || !finite ? 0.0f : 1.0f / as_float(scale);
}

// What is left to prepare of sub-block `index` once the largest bit pattern of a magnitude is known.
OPTWATCH_INLINE void cubic_settle(const CubicBuffers& buffers, int index, int32_t top, Note* note) {
  reinterpret_cast<CubicNote*>(note)->inverse[index] = cubic_rescale(buffers, index, top);
}

inline void cubic_prepare(const Part& part, int n, const float* exact, Note* note) {
  for (int start = 0, k = 0; start < n; start += kCubicBlock, k++)
    cubic_settle(part, k, largest_magnitude(exact + start, length_of(start, kCubicBlock, n)), note);
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
    in_packs(length, [=](int i, auto size) OPTWATCH_INLINE_BODY {
      const auto x = load_pack<size.value>(exact + start + i);
      const auto root = cbrt_times_127(x * inverse);
      // Not negative, since no root is below 1/2.
      const auto code = each(root, [](Float r) { return fma(reciprocal_nearly(r), splat(-0.25f), r); });
      store_bytes(codes + start + i,
                  each(code, x, [](Float c, Float a) { return nearest(as_float(bits(c) | (bits(a) & kSignBit))); }));
    });
  }
}

// ---- logarithmic -----------------------------------------------------------------------------------------------

constexpr int kLogBlock = 256;
constexpr float kSmallestStep = 0x1p-12f;
constexpr float kLn2 = 0.693147180559945f;

struct LogBuffers {
  uint8_t* codes;
  float (*grids)[2];  // the lowest value and the step of each sub-block

  OPTWATCH_INLINE LogBuffers(const Part& part)
      : codes(static_cast<uint8_t*>(part.values)),
        grids(static_cast<float (*)[2]>(part.buffers[1]) + static_cast<uint64_t>(part.first) / kLogBlock) {}
};

// Numbers in registers, looked up by the lower bits of an index, in place of an exponential per element.
#if defined(__AVX512F__) || defined(__AVX2__)
#define OPTWATCH_LOG_TABLES
// log2 of the numbers in such a table.
constexpr int kLogTable = kWidth == 16 ? 4 : 3;
// A table of so many, of which a vector may hold several.
template <int size = kWidth>
OPTWATCH_INLINE Float look_up(Float table, Int index) {
#if defined(__AVX512F__)
  return (Float)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
  if constexpr (size <= 4) return (Float)_mm256_permutevar_ps((__m256)table, (__m256i)index);  // half the work
  return (Float)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#endif
}
#endif

// How the codes of sub-block `index` are read: as their values times `factor`.
struct LogReader {
  const uint8_t* codes;  // of the whole block
  float lowest, step;
#if defined(OPTWATCH_LOG_TABLES)
  // With the digits of a code in base 16, or 8, its value is the product of a power for each: lowest * 2**(16 h * step)
  // times 2**((l - 1) * step).
  static constexpr int kDigits = (8 + kLogTable - 1) / kLogTable;
  static constexpr int kHighest = 1 << (8 - (kDigits - 1) * kLogTable);  // values of the highest digit
  Float tables[kDigits];                                                 // of the lowest digit first
#endif

  OPTWATCH_INLINE LogReader(const LogBuffers& buffers, int index, float factor = 1.0f) : codes(buffers.codes) {
    const float* grid = buffers.grids[index];
    lowest = grid[0] * factor;
    step = grid[1];
    // Near the end of fp32's range the last bits must not carry the largest value beyond it.
    if (static_cast<float>((bits(grid[0]) >> 23) - 127) + 254 * step > 126) lowest *= 1 - 0x1p-20f;
#if defined(OPTWATCH_LOG_TABLES)
    Floats<kDigits> digits;
    for (int d = 0; d < kDigits; d++)
      digits.v[d] = count_up(d < kDigits - 1 ? kWidth : kHighest) * static_cast<float>(1 << (d * kLogTable));
    digits.v[0] -= 1.0f;
    // What rounding the exponent loses comes back as a factor, or the tables would differ from each other by it.
    const auto exponents = digits * step, lost = fma(digits, step, exponents * -1.0f), powers = exp2(exponents);
    for (int d = 0; d < kDigits; d++) tables[d] = fma(powers.v[d] * lost.v[d], splat(kLn2), powers.v[d]);
    tables[kDigits - 1] *= lowest;
#endif
  }

  // The reader of the values' square roots: as exact, and for nothing where values are looked up.
  OPTWATCH_INLINE LogReader of_roots() const {
    LogReader roots = *this;
    roots.lowest = __builtin_sqrtf(lowest);
    roots.step = 0.5f * step;
#if defined(OPTWATCH_LOG_TABLES)
    for (Float& table : roots.tables) table = sqrt(table);
#endif
    return roots;
  }

  template <int size>
  OPTWATCH_INLINE Floats<size> read(int i) const {
#if defined(OPTWATCH_LOG_TABLES)
    return each(load_integers<size>(codes + i), [this](Int code) {
#if defined(__AVX512F__)
      return (Float)_mm512_maskz_mul_ps(some(code), (__m512)high(code), (__m512)low(code));
#else
      return select(equal(code, Int{}), Float{}, high(code) * low(code));
#endif
    });
#else
    const auto code = load_narrow_pack<size>(codes + i);
    const auto value = exp2((code - 1.0f) * step) * lowest;
    return each(code, value, [](Float c, Float v) { return select(equal(c, Float{}), Float{}, v); });
#endif
  }
  // Added to `base`, rounded once where that is for nothing.
  template <int size>
  OPTWATCH_INLINE Floats<size> read_onto(const Floats<size>& base, int i) const {
#if defined(__AVX512F__)
    return each(base, load_integers<size>(codes + i), [this](Float sum, Int code) {
      return (Float)_mm512_mask3_fmadd_ps((__m512)high(code), (__m512)low(code), (__m512)sum, some(code));
    });
#else
    return base + read<size>(i);
#endif
  }

#if defined(OPTWATCH_LOG_TABLES)
 private:
  OPTWATCH_INLINE Float low(Int code) const { return look_up(tables[0], code); }
  OPTWATCH_INLINE Float high(Int code) const {
    Float product = look_up<kHighest>(tables[kDigits - 1], code >> ((kDigits - 1) * kLogTable));
    for (int d = kDigits - 2; d > 0; d--) product = product * look_up(tables[d], code >> (d * kLogTable));
    return product;
  }
#if defined(__AVX512F__)
  OPTWATCH_INLINE static __mmask16 some(Int code) { return _mm512_test_epi32_mask((__m512i)code, (__m512i)code); }
#endif
#endif
};

inline const float* log_load(const Part& part, int n, float* scratch) {
  const LogBuffers buffers = part;
  for (int start = 0; start < n; start += kLogBlock) {
    const LogReader reader(buffers, start / kLogBlock);
    in_packs(length_of(start, kLogBlock, n),
             [=](int i, auto size) { store(scratch + start + i, reader.template read<size.value>(start + i)); });
  }
  return scratch;
}

inline float log_limit(const Part&, int) { return __builtin_inff(); }  // the grid ends at the largest value

// How a block of second moments is encoded.
struct LogGrid {
  float lowest, inverse, per_step;  // inverse = 1 / lowest, per_step = 1 / step
  int bend;                         // k of bend_of, times 65536
  bool plain;                       // every element is normal, finite and at least `lowest`
  int code;                         // what all elements get where there is no grid, else -1
};

// p(f) = (2**(f*step) - 1) / (2**step - 1) is the probability to round up at a fraction f. With a = step * log(2) it is
// f - f * (1 - f) * k, exact at f = 0, 1/2 and 1 with k = 2 * tanh(a / 4). What is left is odd about 1/2, so nothing is
// biased, and below 0.01 * a**2: 6e-5 for the usual twenty octaves in a block.
OPTWATCH_INLINE int bend_of(float step) {
  const float a = step * kLn2;
  return static_cast<int>(65536.0f * a * (0.5f - a * a * (1.0f / 96)));
}

// What has to be known of a sub-block before it can be encoded, collected vector by vector.
struct LogRange {
  // Bit patterns of elements that are not negative order like integers. Where the smallest is a normal number and the
  // largest is finite, that is all; everything else takes the long way.
  Word least = ~Word{}, most{};

  OPTWATCH_INLINE void add(Float x) {
    const Word pattern = reinterpret_cast<Word>(x);
    least = minimum(least, pattern);
    most = maximum(most, pattern);
  }
  OPTWATCH_INLINE void add(const LogRange& other) {
    least = minimum(least, other.least);
    most = maximum(most, other.most);
  }
};

// The smallest bit pattern above zero and the largest one, both without sign. Kept out of the loops, where it is the
// larger part of what the processor has to fetch.
OPTWATCH_RARE void log_range_of(const float* exact, int n, uint32_t* low, uint32_t* top) {
  Word least = ~Word{};  // one less than the pattern, so that zero becomes the largest
  Int magnitude{};
  for (int i = 0; i < n; i += kWidth) {
    least = minimum(least, load_as<Word>(exact + i) - 1);
    magnitude = maximum(magnitude, load_bits(exact + i) & ~kSignBit);
  }
  *low = smallest(least) + 1;
  *top = static_cast<uint32_t>(largest(magnitude));
}

OPTWATCH_INLINE LogGrid log_grid_of(const LogRange& range, const float* exact, int n, float* out) {
  LogGrid grid;
  grid.code = -1;
  Word least = range.least, most = range.most;
  // Or the first step of the reductions would be prepared in the loop that collects the range: two copies in every
  // round. (Through memory, since that is what any processor's compiler understands.)
  asm("" : "+m"(least), "+m"(most));
  uint32_t low_bits = smallest(least), top = largest(most);
  grid.plain = low_bits >= static_cast<uint32_t>(bits(kSmallestNormal)) && top < kInfinityBits;
  if (!grid.plain) {
    log_range_of(exact, n, &low_bits, &top);
    if (top == 0 || top >= kInfinityBits) {
      grid.code = top ? 1 : 0;
      out[0] = out[1] = top ? __builtin_nanf("") : 0.0f;
      return grid;
    }
  }
  // In bits, not in floats: a product below the normal range costs some processors a hundred cycles.
  constexpr uint32_t normal = 0x00800000, widest = 126u << 23, highest = 0x7F7FFC00, last = 0x7F600000;
  if (low_bits < normal) low_bits = normal;
  if (top < normal) top = normal;
  if (top > highest) top = highest;      // or the last bits of exponents might carry its value beyond fp32,
  if (low_bits > last) low_bits = last;  // and so might codes beyond the largest value, where the step is the smallest
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

// Of numbers without sign.
OPTWATCH_INLINE Int upper_half(Int x) { return reinterpret_cast<Int>(reinterpret_cast<Word>(x) >> 16); }

// The 16-bit numbers of two vectors that are the lower (part 0) or upper (part 1) halves of their elements.
struct Halves {
  uint16_t index[32] = {};
  explicit constexpr Halves(int part) {
    for (int i = 0; i < 32; i++) index[i] = static_cast<uint16_t>(2 * i + part);
  }
};

// Stores codes whose positions on the grid are given with 16 bits after the point. An element is rounded up if its
// random number is below p of the fraction. The smallest and the largest value may come out a rounding error beside the
// grid, at the code for zero or, which would wrap to it, at 256: the result is cut off to [1, 255].
template <int size>
OPTWATCH_INLINE void store_rounded(uint8_t* codes, const Pack<Int, size>& fixed, const uint16_t* numbers, int bend) {
#if defined(__AVX512BW__)
  // 32 elements at once in 16 bits: p takes three instructions, the random numbers need no unpacking, and packing to
  // bytes cuts off at 255 by itself.
  if constexpr (size % 4 == 0) {
    alignas(64) static constexpr Halves kUpper(1), kLower(0);
    const __m512i upper = _mm512_load_si512(&kUpper), lower = _mm512_load_si512(&kLower);
    const __m512i k = _mm512_set1_epi16(static_cast<short>(bend));
    const auto rounded = [&](int j) {
      const __m512i a = (__m512i)fixed.v[j], b = (__m512i)fixed.v[j + 1];
      const __m512i whole = _mm512_permutex2var_epi16(a, upper, b), f = _mm512_permutex2var_epi16(a, lower, b);
      const __m512i rest = _mm512_xor_si512(f, _mm512_set1_epi32(-1));
      const __m512i p = _mm512_sub_epi16(f, _mm512_mulhi_epu16(_mm512_mulhi_epu16(f, rest), k));
      const __mmask32 up = _mm512_cmplt_epu16_mask(_mm512_loadu_si512(numbers + j * kWidth), p);
      return _mm512_mask_sub_epi16(whole, up, whole, _mm512_set1_epi16(-1));
    };
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
#pragma GCC unroll 2
    for (int j = 0; j < size; j += 4) {
      const __m512i bytes = _mm512_permutexvar_epi64(order, _mm512_packus_epi16(rounded(j), rounded(j + 2)));
      _mm512_storeu_si512(codes + j * kWidth, _mm512_max_epu8(bytes, _mm512_set1_epi8(1)));
    }
    return;
  }
#elif defined(__AVX2__)
  // The same with 16 elements, which lie in another order meanwhile: quarters of the first vector and of the second.
  if constexpr (size % 4 == 0) {
    const __m256i k = _mm256_set1_epi16(static_cast<short>(bend)), one = _mm256_set1_epi16(1);
    const __m256i halves = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));  // lower ones first
    const auto rounded = [&](int j) OPTWATCH_INLINE_BODY {
      const __m256i a = _mm256_shuffle_epi8((__m256i)fixed.v[j], halves);
      const __m256i b = _mm256_shuffle_epi8((__m256i)fixed.v[j + 1], halves);
      const __m256i whole = _mm256_unpackhi_epi64(a, b), f = _mm256_unpacklo_epi64(a, b);
      const __m256i rest = _mm256_xor_si256(f, _mm256_set1_epi32(-1));
      const __m256i p = _mm256_sub_epi16(f, _mm256_mulhi_epu16(_mm256_mulhi_epu16(f, rest), k));
      const __m256i random = _mm256_permute4x64_epi64(load_as<__m256i>(numbers + j * kWidth), 0xd8);
      return _mm256_add_epi16(whole, _mm256_min_epu16(_mm256_subs_epu16(p, random), one));
    };
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
#pragma GCC unroll 2
    for (int j = 0; j < size; j += 4) {
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(rounded(j), rounded(j + 2)), order);
      store(codes + j * kWidth, _mm256_max_epu8(bytes, _mm256_set1_epi8(1)));
    }
    return;
  }
#endif
  for (int j = 0; j < size; j++) {
    const Int f = fixed.v[j] & 0xffff;
    const Int less_than_f = upper_half(upper_half(f * (0xffff - f)) * bend);
    const Int code = (fixed.v[j] - less_than_f + (0xffff - load_narrow(numbers + j * kWidth))) >> 16;
    store_narrow(codes + j * kWidth, maximum(minimum(code, splat(255)), splat(1)));
  }
}

template <bool plain>
OPTWATCH_INLINE void log_encode(const LogGrid& grid, const float* exact, const uint16_t* numbers, int n,
                                uint8_t* codes) {
  in_packs(n, [=](int i, auto size) OPTWATCH_INLINE_BODY {
    const auto v = load_pack<size.value>(exact + i);
    const auto above = each(v, [=](Float x) { return plain ? x : maximum(x, splat(grid.lowest)); });
    const auto position = fma(log2(above * grid.inverse), grid.per_step * 65536.0f, 65536.0f);
    store_rounded(codes + i, each(position, nearest), numbers + i, grid.bend);
  });
  if constexpr (!plain)
    for (int i = 0; i < padded_length(n); i++) codes[i] = exact[i] == 0 ? 0 : codes[i];  // padding, too
}

struct LogNote {
  LogGrid grids[kBlock / kLogBlock];
};
static_assert(sizeof(LogNote) <= sizeof(Note::bytes));

// What is left to prepare of sub-block `index`, whose n elements start at `exact`, once its range is known.
OPTWATCH_INLINE void log_settle(const LogBuffers& buffers, int index, const LogRange& range, const float* exact, int n,
                                Note* note) {
  reinterpret_cast<LogNote*>(note)->grids[index] = log_grid_of(range, exact, n, buffers.grids[index]);
}

inline void log_prepare(const Part& part, int n, const float* exact, Note* note) {
  for (int start = 0, k = 0; start < n; start += kLogBlock, k++) {
    const int length = length_of(start, kLogBlock, n);
    LogRange range;
    for (int i = 0; i < length; i += kWidth) range.add(load(exact + start + i));
    log_settle(part, k, range, exact + start, length, note);
  }
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
    {"int8_cubic", 8, 2, kCubicBlock, false, cubic_load, cubic_prepare, cubic_store, kLargestBf16, cubic_limit},
    {"int8_log", 8, 2, kLogBlock, false, log_load, log_prepare, log_store, __builtin_inff(), log_limit},
};

}  // namespace optwatch::OPTWATCH_ISA
