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

// Partial sums as one.
OPTWATCH_INLINE Float fold(const Floats<1>& x) { return x.v[0]; }
template <int size>
OPTWATCH_INLINE Float fold(const Floats<size>& x) {
  Floats<size / 2> half;
  for (int i = 0; i < size / 2; i++) half.v[i] = x.v[2 * i] + x.v[2 * i + 1];
  return fold(half);
}

// Sums of a vector-valued term. Four partial sums, because one would wait for itself.
template <class Term>
OPTWATCH_INLINE float quickly(int n, Term add) {
  Floats<4> total{};
  in_packs<4>(n, [&](int i, auto size) {
    for (int j = 0; j < size.value; j++) total.v[j] = add(i + j * kWidth, total.v[j]);
  });
  return sum(fold(total));
}

inline float quick_squares(const float* x, int n) {
  return quickly(n, [=](int i, Float so_far) { return fma(load(x + i), load(x + i), so_far); });
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
  constexpr int k = 4;
  Floats<k> total{}, magnitude{};
  in_packs<k>(n, [&](int i, auto size) {
    for (int j = 0; j < size.value; j++) {
      const Float term = load(x + i + j * kWidth) * load(y + i + j * kWidth);
      total.v[j] += term;
      magnitude.v[j] += absolute(term);
    }
  });
  if (trustworthy(sum(fold(magnitude)))) return sum(fold(total));
  return precisely(n, [=](int i) { return double(x[i]) * y[i]; });
}

// The sum of squared weights, and how many of `moved` are what they were. Padding is zero in all.
inline double weights(const float* before, const float* after, const float* moved, int n, double* unchanged) {
  constexpr int k = 4;
  Floats<k> total{};
  Int same{};
  in_packs<k>(n, [&](int i, auto size) {
    for (int j = 0; j < size.value; j++) {
      const Float w = load(after + i + j * kWidth);
      total.v[j] = fma(w, w, total.v[j]);
      same = count(same, equal(load(moved + i + j * kWidth), load(before + i + j * kWidth)));
    }
  });
  *unchanged += sum(same) - (-n & (kWidth - 1));
  const float fast = sum(fold(total));
  return trustworthy(fast) ? fast : precise_squares(after, n);
}

// Finite magnitudes above `limit`.
inline int saturated(const float* x, int n, float limit) {
  int found = 0;
  for (int i = 0; i < n; i++) {
    const int32_t magnitude = bits(x[i]) & ~kSignBit;
    found += as_float(magnitude) > limit && magnitude < kInfinityBits;
  }
  return found;
}

// Adds the fields of a slot, all but kSaturated, to `fields` and returns the largest magnitude of the block. What is
// not `lossy` is stored as it is: `stored` is not read.
template <bool second_moment, bool lossy = true>
inline float slot_fields(const float* exact, const float* stored, int n, double* fields) {
  constexpr int k = 4;
  Floats<k> error_sq{}, exact_sq{}, total{};
  Int most{}, underflow{};
  in_packs<k>(n, [&](int i, auto size) {
    const auto x = load_pack<size.value>(exact + i);
    for (int j = 0; j < size.value; j++) {
      total.v[j] += x.v[j];
      if constexpr (!second_moment) exact_sq.v[j] = fma(x.v[j], x.v[j], exact_sq.v[j]);
      most = maximum(most, bits(x.v[j]) & ~kSignBit);
    }
    if constexpr (lossy) {
      const auto y = load_pack<size.value>(stored + i);
      const auto error = each(x, y, [](Float p, Float q) {
        if constexpr (!second_moment) return p - q;
        // One root by the divider and one beside it; they differ in the last bit, which must not look like an error.
        return select(equal(p, q), Float{}, sqrt(p) - sqrt_nearly(q));
      });
      for (int j = 0; j < size.value; j++) {
        error_sq.v[j] = fma(error.v[j], error.v[j], error_sq.v[j]);
        underflow = count(underflow, but_not(equal(y.v[j], Float{}), equal(x.v[j], Float{})));
      }
    }
  });
  const float errors = sum(fold(error_sq)), values = sum(fold(exact_sq)), totals = sum(fold(total));
  const bool finite = totals - totals == 0;
  const double total_exactly = finite ? totals : precisely(n, [=](int i) { return double(exact[i]); });
  if (!lossy) {
    fields[kErrorSq] += total_exactly - total_exactly;  // exact, but NaN - NaN is NaN
  } else if (finite && trustworthy(errors)) {           // infinity - infinity is NaN, which the selection above hides
    fields[kErrorSq] += errors;
  } else {
    fields[kErrorSq] += precisely(n, [=](int i) {
      const double d =
          second_moment ? __builtin_sqrtf(exact[i]) - __builtin_sqrtf(stored[i]) : double(exact[i]) - stored[i];
      return d * d;
    });
  }
  if constexpr (second_moment)
    fields[kExactSq] += total_exactly;  // the square of the square root
  else
    fields[kExactSq] += trustworthy(values) ? values : precise_squares(exact, n);
  fields[kSum] += total_exactly;
  const float absmax = as_float(largest(most));
  double& so_far = fields[kAbsMax];
  if (!(absmax <= so_far) && so_far == so_far) so_far = absmax;  // a NaN replaces every number and is kept
  fields[kUnderflow] += sum(underflow);
  return absmax;
}

}  // namespace optwatch::OPTWATCH_ISA
