// What the statistics need: sums over one block of fp32 arrays.
//
// A block is summed in fp32, lane by lane (at most 128 terms a lane, error below 1e-5 of the sum of magnitudes), and
// blocks are added in float64. Squares leave the range of fp32 below 1e-19 and above 1e19, so a sum that comes out
// tiny, infinite or NaN is formed once more in float64: it costs a comparison a block and holds for every fp32 value.
#pragma once

#include "mathematics.h"

namespace optwatch::OPTWATCH_ISA {

// Whether an fp32 sum of kBlock squares kept what it should: what underflows is below 2**-149 a term.
OPTWATCH_INLINE bool trustworthy(float sum_of_squares) {
  return sum_of_squares >= 0x1p-100f && sum_of_squares <= 0x1p126f;  // false for NaN
}

// Terms in float64, eight partial sums.
template <class Term>
OPTWATCH_INLINE double precisely(int n, Term term) {
  double partial[8] = {};
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) partial[j] += term(i + j);
  for (int j = 0; i < n; i++, j++) partial[j] += term(i);
  return ((partial[0] + partial[4]) + (partial[1] + partial[5])) +
         ((partial[2] + partial[6]) + (partial[3] + partial[7]));
}

inline double precise_squares(const float* x, int n) {
  return precisely(n, [=](int i) { return double(x[i]) * x[i]; });
}

inline int64_t nonfinite(const float* x, int n) {
  int64_t found = 0;
  for (int i = 0; i < n; i++) found += (bits(x[i]) & ~kSignBit) >= kInfinityBits;
  return found;
}

// Sums of a vector-valued term. Four partial sums, because one would wait for itself.
template <class Term>
OPTWATCH_INLINE float quickly(int n, Term add) {
  Float a{}, b{}, c{}, d{};
  int i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    a = add(i, a);
    b = add(i + kWidth, b);
    c = add(i + 2 * kWidth, c);
    d = add(i + 3 * kWidth, d);
  }
  for (; i < n; i += kWidth) a = add(i, a);
  return sum((a + b) + (c + d));
}

inline double squares(const float* x, int n) {
  const float fast = quickly(n, [=](int i, Float so_far) { return fma(load(x + i), load(x + i), so_far); });
  return trustworthy(fast) ? fast : precise_squares(x, n);
}

inline double squared_difference(const float* x, const float* y, int n) {
  const float fast = quickly(n, [=](int i, Float so_far) {
    const Float d = load(x + i) - load(y + i);
    return fma(d, d, so_far);
  });
  if (trustworthy(fast)) return fast;
  return precisely(n, [=](int i) { return double(x[i] - y[i]) * (x[i] - y[i]); });
}

inline double product(const float* x, const float* y, int n) {
  Float total{}, magnitude{};
  for (int i = 0; i < n; i += kWidth) {
    const Float term = load(x + i) * load(y + i);
    total = total + term;
    magnitude = magnitude + absolute(term);
  }
  if (trustworthy(sum(magnitude))) return sum(total);
  return precisely(n, [=](int i) { return double(x[i]) * y[i]; });
}

// The sum of squared weights, and how many are what they were. Padding is zero in both.
inline double weights(const float* before, const float* after, int n, double* unchanged) {
  Float total{};
  Int same{};
  int i = 0;
  for (; i < n; i += kWidth) {
    const Float w = load(after + i);
    total = fma(w, w, total);
    same = count(same, equal(w, load(before + i)));
  }
  *unchanged += sum(same) - (i - n);
  const float fast = sum(total);
  return trustworthy(fast) ? fast : precise_squares(after, n);
}

// The six fields of a slot, added to `fields`. `limit` is what the block can hold.
template <bool second_moment>
inline void slot_fields(const float* exact, const float* stored, int n, float limit, double* fields) {
  Float error_sq{}, exact_sq{}, total{};
  Int most{}, underflow{};
  for (int i = 0; i < n; i += kWidth) {
    const Float x = load(exact + i), y = load(stored + i);
    const Float error = second_moment ? sqrt(x) - sqrt(y) : x - y;
    error_sq = fma(error, error, error_sq);
    total = total + x;
    if constexpr (!second_moment) exact_sq = fma(x, x, exact_sq);
    most = maximum(most, bits(x) & ~kSignBit);
    underflow = count(underflow, but_not(equal(y, Float{}), equal(x, Float{})));
  }
  const float errors = sum(error_sq), values = sum(exact_sq), totals = sum(total);
  const bool finite = totals - totals == 0;
  const double total_exactly = finite ? totals : precisely(n, [=](int i) { return double(exact[i]); });
  if (trustworthy(errors)) {
    fields[kErrorSq] += errors;
  } else if (exact == stored) {  // the storage is exact, but NaN - NaN is NaN
    fields[kErrorSq] += total_exactly - total_exactly;
  } else {
    fields[kErrorSq] += precisely(n, [=](int i) {
      const double d = second_moment ? __builtin_sqrtf(exact[i]) - __builtin_sqrtf(stored[i])
                                     : double(exact[i]) - stored[i];
      return d * d;
    });
  }
  if constexpr (second_moment)
    fields[kExactSq] += total_exactly;  // the square of the square root
  else
    fields[kExactSq] += trustworthy(values) ? values : precise_squares(exact, n);
  fields[kSum] += total_exactly;
  const int32_t top = largest(most);
  const double absmax = as_float(top);
  double& so_far = fields[kAbsMax];
  if (!(absmax <= so_far) && so_far == so_far) so_far = absmax;  // a NaN replaces every number and is kept
  fields[kUnderflow] += sum(underflow);
  if (!(absmax <= limit))
    for (int i = 0; i < n; i++) {
      const int32_t magnitude = bits(exact[i]) & ~kSignBit;
      fields[kSaturated] += as_float(magnitude) > limit && magnitude < kInfinityBits;
    }
}

}  // namespace optwatch::OPTWATCH_ISA
