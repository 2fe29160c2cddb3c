// Half a byte an element: powers for signed slots, logarithms for second moments. The formulas are in codec.py; here
// sixteen values are a table in registers. The powers' every bit is the reference's.
#pragma once

#include "optwatch/kernels/cpu/mathematics.h"

namespace optwatch::OPTWATCH_ISA {

// ---- powers ----------------------------------------------------------------------------------------------------

constexpr int kPowerBlock = 64;
constexpr int kPowers = 4;
constexpr float kPowerThresholds[kPowers - 1] = {0.22f, 0.14f, 0.08f};  // mean over largest magnitude
constexpr int kScaleUnit = 1 << 18;                                     // of the bits of a scale, as fp32
constexpr int kLargestScale = 0x7f7c0000;

// (k / 8)**p for p of 1.5, 2, 3 and 4.5.
constexpr float kPowerLevels[kPowers][9] = {
    {0.0f, 0.0441941731f, 0.125f, 0.229639664f, 0.353553385f, 0.494105875f, 0.649519026f, 0.818487525f, 1.0f},
    {0.0f, 0.015625f, 0.0625f, 0.140625f, 0.25f, 0.390625f, 0.5625f, 0.765625f, 1.0f},
    {0.0f, 0.001953125f, 0.015625f, 0.052734375f, 0.125f, 0.244140625f, 0.421875f, 0.669921875f, 1.0f},
    {0.0f, 8.63167443e-05f, 0.001953125f, 0.0121099046f, 0.0441941731f, 0.120631322f, 0.274015844f, 0.548322737f, 1.0f},
};

// Levels by code, which is kept modulo 16, and what lies between the levels of 0, 1 ... 8.
struct PowerTables {
  float levels[kPowers][16] = {}, middles[kPowers][8] = {};
  constexpr PowerTables() {
    for (int p = 0; p < kPowers; p++) {
      for (int code = 0; code < 16; code++)
        levels[p][code] = code <= 8 ? kPowerLevels[p][code] : -kPowerLevels[p][16 - code];
      for (int k = 0; k < 8; k++) middles[p][k] = (kPowerLevels[p][k] + kPowerLevels[p][k + 1]) / 2;
    }
  }
};
constexpr PowerTables kPowerTables;

// A scale with its sign and the index of a power, as they are kept in sixteen bits.
struct PowerHead {
  uint16_t bits;

  OPTWATCH_INLINE static uint16_t& of(const Part& part, int index) {
    return static_cast<uint16_t*>(part.buffers[1])[part.first / kPowerBlock + index];
  }
  OPTWATCH_INLINE float scale() const { return as_float((bits & ~3) << 16); }
  OPTWATCH_INLINE int power() const { return bits & 3; }
};

inline const float* power_load(const Part& part, int n, float* scratch) {
  const uint8_t* codes = static_cast<const uint8_t*>(part.values);
  for (int start = 0, k = 0; start < n; start += kPowerBlock, k++) {
    const PowerHead head{PowerHead::of(part, k)};
    alignas(64) float values[16];
    for (int c = 0; c < 16; c++) values[c] = kPowerTables.levels[head.power()][c] * head.scale();
    const Lookup<16> table(values);
    for (int i = start; i < n && i < start + kPowerBlock; i += kWidth)
      store(scratch + i, table[load_nibbles(codes + i / 2)]);
  }
  return scratch;
}

inline float power_limit(const Part& part, int index) {
  // A block too small to tell apart has scale 0: its values underflow, they are not cut off.
  const float scale = PowerHead{PowerHead::of(part, index)}.scale();
  const float rounded_from = (scale < 0 ? -scale : scale) * (1 + 0x1p-6f);
  return scale == 0 ? __builtin_inff() : rounded_from;
}

struct PowerNote {
  PowerHead heads[kBlock / kPowerBlock];
};
static_assert(sizeof(PowerNote) <= sizeof(Note::bytes));

// Of 64 elements: the sum of magnitudes, half added to half, and the bit patterns of the highest element and of the
// magnitude of the lowest, 0 where none has that sign.
struct PowerRange {
  float sum;
  int32_t highest, lowest;
};

OPTWATCH_INLINE PowerRange power_range(const float* x, int n) {
  constexpr int kCount = kPowerBlock / kWidth;
  Float sums[kCount];
  Int positive{};  // integers order like the positive numbers, those without sign like the negative ones above them
  Word negative{};
  for (int j = 0; j < kCount; j++) {
    const Int pattern = j * kWidth < n ? load_bits(x + j * kWidth) : Int{};
    positive = maximum(positive, pattern);
    negative = maximum(negative, reinterpret_cast<Word>(pattern));
    sums[j] = as_float(pattern & ~kSignBit);
  }
  for (int half = kCount / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++) sums[j] += sums[j + half];
  const int32_t lowest = static_cast<int32_t>(largest(negative));
  return {sum(sums[0]), largest(positive), lowest < 0 ? lowest & ~kSignBit : 0};
}

OPTWATCH_INLINE int32_t rounded_scale(int32_t magnitude) {
  const int32_t rounded = (magnitude + kScaleUnit / 2) & -kScaleUnit;
  return rounded < kLargestScale ? rounded : kLargestScale;
}

OPTWATCH_INLINE PowerHead power_head(const PowerRange& range) {
  const int32_t magnitude = range.highest > range.lowest ? range.highest : range.lowest;
  if (magnitude >= kInfinityBits) return {0x7fc0};
  int power = 0;
  for (float threshold : kPowerThresholds) power += range.sum / kPowerBlock < as_float(magnitude) * threshold;
  if (magnitude < bits(kSmallestNormal)) return {static_cast<uint16_t>(power)};
  const int sign = rounded_scale(range.highest) < rounded_scale(range.lowest) ? 0x8000 : 0;
  return {static_cast<uint16_t>(rounded_scale(magnitude) >> 16 | power | sign)};
}

inline void power_prepare(const Part& part, int n, const float* exact, Note* note) {
  PowerHead* heads = reinterpret_cast<PowerNote*>(note)->heads;
  for (int start = 0, k = 0; start < n; start += kPowerBlock, k++) {
    heads[k] = power_head(power_range(exact + start, length_of(start, kPowerBlock, n)));
    PowerHead::of(part, k) = heads[k].bits;
  }
}

inline void power_store(const Part& part, int n, const float* exact, const Note& note) {
  uint8_t* codes = static_cast<uint8_t*>(part.values);
  for (int start = 0, k = 0; start < n; start += kPowerBlock, k++) {
    const PowerHead head = reinterpret_cast<const PowerNote&>(note).heads[k];
    const float scale = head.scale();
    if (scale == 0 || scale != scale) {
      std::memset(codes + start / 2, 0, static_cast<size_t>(bytes_of(length_of(start, kPowerBlock, n), 4)));
      continue;
    }
    const float* middles = kPowerTables.middles[head.power()];
    const Lookup<8> table(middles);
    for (int i = start; i < n && i < start + kPowerBlock; i += kWidth) {
      const Float scaled = load(exact + i) / splat(scale), x = absolute(scaled);
      Int level = count(Int{}, less(splat(middles[3]), x)) << 2;  // how many of the eight middles are below
      level += count(Int{}, less(table[level + 1], x)) << 1;
      level = count(level, less(table[level], x));
      level = count(level, less(splat(middles[7]), x));
      const Int negative = bits(scaled) >> 31;  // its magnitude is at most 7
      level = minimum(level, negative + 8);
      store_nibbles(codes + i / 2, ((level ^ negative) - negative) & 15);
    }
  }
}

// ---- logarithmic -----------------------------------------------------------------------------------------------

constexpr int kLog4Block = 256;
constexpr int kLog4Last = 14;  // steps of a grid
constexpr float kLog4Deviations = 2;
constexpr float kLog4SmallestStep = 0x1p-10f;

OPTWATCH_INLINE float* log4_grid(const Part& part, int index) {
  return static_cast<float*>(part.buffers[1]) + 2 * (part.first / kLog4Block + index);
}

inline const float* log4_load(const Part& part, int n, float* scratch) {
  const uint8_t* codes = static_cast<const uint8_t*>(part.values);
  for (int start = 0, k = 0; start < n; start += kLog4Block, k++) {
    const float *grid = log4_grid(part, k), lowest = grid[0], step = grid[1];
    alignas(64) float values[16];
    for (int c = 0; c < 16; c += kWidth) {
      const auto power = exp2(Floats<1>{count_up() + (static_cast<float>(c) - 1.0f)} * step).v[0];
      store(values + c, minimum(splat(__FLT_MAX__), power * lowest));  // keeps NaN
    }
    values[0] = 0;
    const Lookup<16> table(values);
    in_packs(length_of(start, kLog4Block, n), [=](int i, auto size) {
      for (int j = start + i; j < start + i + size.value * kWidth; j += kWidth)
        store(scratch + j, table[load_nibbles(codes + j / 2)]);
    });
  }
  return scratch;
}

inline float log4_limit(const Part&, int) { return __builtin_inff(); }

struct Log4Grid {
  float low, per_step;  // octaves of the lowest value relative to the largest, and 1 / step
  int code;             // what all elements get where there is no grid, else -1
};
struct Log4Note {
  Log4Grid grids[kBlock / kLog4Block];
};
static_assert(sizeof(Log4Note) <= sizeof(Note::bytes));

// Writes the octaves of each element relative to `high`, 0 for those that are zero, and returns the lowest of the grid.
OPTWATCH_INLINE float log4_octaves(const float* exact, int n, float high, float* octaves) {
  Float total{}, least{};
  Int some{};
  const float inverse = 1.0f / high;
  in_packs(n, [&](int i, auto size) {
    const auto v = load_pack<size.value>(exact + i);
    const auto ratio = each(v * inverse, [](Float x) { return maximum(x, splat(kSmallestNormal)); });
    const auto found = each(v, log2(ratio), [](Float x, Float o) { return select(less(Float{}, x), o, Float{}); });
    store(octaves + i, found);
    for (int j = 0; j < size.value; j++) {
      total += found.v[j];
      least = minimum(least, found.v[j]);
      some = count(some, less(Float{}, v.v[j]));
    }
  });
  const float number = static_cast<float>(sum(some)), mean = sum(total) / number;
  Float squares{};
  for (int i = 0; i < n; i += kWidth) {
    const Float d = select(less(Float{}, load(exact + i)), load(octaves + i) - mean, Float{});
    squares = fma(d, d, squares);
  }
  const float deviation = __builtin_sqrtf(sum(squares) / number), low = smallest(least);
  const float end = mean - kLog4Deviations * deviation;
  return low > end ? low : end;
}

inline void log4_prepare(const Part& part, int n, const float* exact, Note* note) {
  Log4Grid* grids = reinterpret_cast<Log4Note*>(note)->grids;
  for (int start = 0, k = 0; start < n; start += kLog4Block, k++) {
    const int length = length_of(start, kLog4Block, n);
    const int32_t top = largest_magnitude(exact + start, length);
    float* out = log4_grid(part, k);
    if (top == 0 || top >= kInfinityBits) {
      grids[k].code = top ? 0x11 : 0;
      out[0] = out[1] = top ? __builtin_nanf("") : 0.0f;
      continue;
    }
    const float high = top < bits(kSmallestNormal) ? kSmallestNormal : as_float(top);
    const float low = log4_octaves(exact + start, length, high, note->each + start);
    float step = -low / kLog4Last;
    if (!(step > kLog4SmallestStep)) step = kLog4SmallestStep;
    const float lowest = high / exp2(Floats<1>{splat(-low)}).v[0][0];
    out[0] = lowest > kSmallestNormal ? lowest : kSmallestNormal;
    out[1] = step;
    grids[k] = {low, 1.0f / step, -1};
  }
}

inline void log4_store(const Part& part, int n, const float* exact, const Note& note) {
  uint8_t* codes = static_cast<uint8_t*>(part.values);
  alignas(64) uint32_t random[kBlock / 2 + kPad];
  random_words(part.first, part.key, n, random);
  const uint16_t* numbers = reinterpret_cast<const uint16_t*>(random);
  for (int start = 0, k = 0; start < n; start += kLog4Block, k++) {
    const Log4Grid grid = reinterpret_cast<const Log4Note&>(note).grids[k];
    const int length = length_of(start, kLog4Block, n);
    if (grid.code >= 0) {
      std::memset(codes + start / 2, grid.code, static_cast<size_t>(bytes_of(length, 4)));
      if (length % 2) codes[(start + length) / 2] &= 15;  // what is not there is 0
      continue;
    }
    in_packs(length, [=](int i, auto size) {
      const auto position = (load_pack<size.value>(note.each + start + i) - grid.low) * grid.per_step;
      for (int j = 0; j < size.value; j++) {
        const int at = start + i + j * kWidth;
        const Float inside = maximum(position.v[j], Float{});
        const Int below = minimum(truncate(inside), splat(kLog4Last - 1));
        const Float part_above = (inside - to_float(below)) * 65536.0f;
        const Mask up = less(to_float(load_narrow(numbers + at)) + 0.5f, part_above);
        store_nibbles(codes + at / 2, select(less(Float{}, load(exact + at)), count(below + 1, up), Int{}));
      }
    });
  }
}

constexpr Codec codecs_int4[] = {
    {"int4_power", 4, 2, kPowerBlock, false, power_load, power_prepare, power_store, 0x1.f8p127f, power_limit},
    {"int4_log", 4, 2, kLog4Block, false, log4_load, log4_prepare, log4_store, __builtin_inff(), log4_limit},
};

}  // namespace optwatch::OPTWATCH_ISA
