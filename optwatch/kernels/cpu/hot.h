// Adam and AdamW with one byte an element, the plans that most memory is saved by, and with them AMSGrad: their loop is
// written by hand, see fused.h for those of the other rules.
#pragma once

#include <type_traits>

#include "optwatch/codecs/int8/cpu.h"
#include "optwatch/rules/adam/cpu.h"
#include "optwatch/rules/adamw/cpu.h"
#include "optwatch/rules/amsgrad/cpu.h"
#include "sums.h"

namespace optwatch::OPTWATCH_ISA {

// One pass over the block decodes, steps, and collects the squares and the ranges that the encoders need; only the new
// moments go through the first-level cache, and the codecs' own loops encode them. Decoding multiplies by beta and is
// added to in one go, the step size is part of the denominator, and products are contracted: on Zen 5, where two busy
// threads of a core share its arithmetic units and the number of instructions is all that counts, 16 elements take 9.6
// ns in place of the composition's 11.1. The weights differ from the rule's in the last bits, and are the same with and
// without full statistics.

// The larger of two numbers without sign, NaN if either is: as bit patterns they order like that.
OPTWATCH_INLINE Float larger_square(Float x, Float y) {
  return (Float)maximum(reinterpret_cast<Word>(x), reinterpret_cast<Word>(y));
}

// Of the second moments and of their maxima.
struct LogReaders {
  LogReader v, top;
};
struct LogRanges {
  LogRange v, top;
};

// With half the registers of AVX-512 the second moments have a loop of their own: one for all would keep its sums in
// memory.
constexpr bool kApart = kWidth < 16;

template <class R>
struct AdamInt8 {
  static constexpr bool kDecoupled = std::is_base_of_v<Decoupled, R>;
  static constexpr bool kMaximum = R::kSlots == 3;  // the denominator is the largest second moment so far
  typename R::Scalars h;
  float root_factor, eps;  // the denominator divided by the step size: root_factor * sqrt(v) + eps

  explicit AdamInt8(const float* scalars) {
    std::memcpy(&h, scalars, sizeof h);
    root_factor = h.inv_sqrt_bc2 / h.step_size;
    eps = h.eps / h.step_size;
  }
  bool fits() const { return root_factor > 0 && root_factor < 0x1p60f && eps < 0x1p60f; }  // so step_size is not 0

  // All of it stays in registers as long as no loop over vectors takes or returns a struct: GCC copies one in pieces
  // that it then waits for, which took more than the loop itself for the 8 vectors of a scale.
  struct Sums {
    Float grad{}, update{}, weight{};
    Int unchanged{}, most{};
  };

  template <bool scaled>
  OPTWATCH_INLINE Float gradient(Float raw, Float weight) const {
    const Float g = scaled ? raw * h.grad_scale : raw;
    if constexpr (kDecoupled)
      return g;
    else
      return fma(weight, splat(h.l2), g);
  }

  // The new second moments from i on; returns those that the denominator is of.
  OPTWATCH_INLINE Float second_moments(int i, Float g, const LogReaders& readers, float* next_v, float* next_top,
                                       LogRanges* ranges) const {
    const Float v = readers.v.read_onto<1>({g * g * h.one_minus_beta2}, i).v[0];
    store(next_v + i, v);
    ranges->v.add(v);
    if constexpr (kMaximum) {
      const Float top = larger_square(readers.top.read<1>(i).v[0], v);
      store(next_top + i, top);
      ranges->top.add(top);
      return top;
    }
    return v;
  }

  template <bool scaled, bool keep>
  OPTWATCH_INLINE HotSums run(const HotBlock& b) const {
    static_assert(kLogBlock % kCubicBlock == 0);
    const Ahead ahead = b.ahead;
    const int n = b.n;
    const float *grads = b.grad, *weights = b.weight;
    float *next_m = b.next[0], *next_v = b.next[1], *next_top = b.next[R::kSlots - 1];
    float *new_weights = b.new_weight, *updates = b.update, *roots = b.root;
    const CubicBuffers m_buffers = b.parts[0];
    const LogBuffers v_buffers = b.parts[1], top_buffers = b.parts[R::kSlots - 1];
    Note* notes = b.notes;
    Sums sums;
    Word v_most{};
    for (int start = 0; start < n; start += kLogBlock) {
      const int length = length_of(start, kLogBlock, n), stop = start + padded_length(length);
      const LogReader v_reader(v_buffers, start / kLogBlock, h.beta2);
      const LogReaders readers = {v_reader, kMaximum ? LogReader(top_buffers, start / kLogBlock) : v_reader};
      LogRanges ranges;
      if constexpr (kApart)
        for (int i = start; i < stop; i += kWidth)
          second_moments(i, gradient<scaled>(load(grads + i), load(weights + i)), readers, next_v, next_top, &ranges);
      for (int part = start; part < stop; part += kCubicBlock) {
        const CubicReader m_reader(m_buffers, part / kCubicBlock, 1.0f - h.one_minus_beta1);
        Magnitude m_range;
        ahead.ask_bytes<2, 2 + R::kSlots, kCubicBlock>(part);
        for (int i = part, end = part + length_of(part, kCubicBlock, n); i < end;) {
          ahead.ask<0, 2>(i);
          for (const int line = i + kPad; i < line; i += kWidth) {
            const Float raw = load(grads + i), w = load(weights + i), g = gradient<scaled>(raw, w);
            const Float m = m_reader.read_onto<1>({g * h.one_minus_beta1}, i).v[0];
            const Float top = kApart ? load(next_top + i) : second_moments(i, g, readers, next_v, next_top, &ranges);
            const Float root = sqrt(top), u = m / fma(root, splat(root_factor), splat(eps));
            Float moved = w - u;
            if constexpr (kDecoupled) moved = fma(w, splat(h.decay), -u);
            store(next_m + i, m);
            store(new_weights + i, moved);
            m_range.add(m);
            sums.grad = fma(raw, raw, sums.grad);
            sums.update = fma(u, u, sums.update);
            if constexpr (keep) {
              sums.weight = fma(moved, moved, sums.weight);
              sums.unchanged = count(sums.unchanged, equal(moved, w));
              store(updates + i, u);
              store(roots + i, root);
            }
          }
        }
        cubic_settle(m_buffers, part / kCubicBlock, largest(m_range.most), &notes[0]);
        if constexpr (keep) sums.most = maximum(sums.most, m_range.most);
      }
      log_settle(v_buffers, start / kLogBlock, ranges.v, next_v + start, length, &notes[1]);
      if constexpr (kMaximum)
        log_settle(top_buffers, start / kLogBlock, ranges.top, next_top + start, length, &notes[2]);
      if constexpr (keep) v_most = maximum(v_most, ranges.v.most);
    }
    const Squares squares = {sum(sums.grad), sum(sums.update), sum(sums.weight), sum(sums.unchanged)};
    return {squares, {as_float(largest(sums.most)), as_float(static_cast<int32_t>(largest(v_most)))}};
  }

  struct Errors {
    Float m_error{}, m_sq{}, m_sum{}, v_error{}, v_sum{}, u_error{}, moment_grad{};
    Int m_lost{};
  };

  // `root_reader` reads the roots of the second moments, and zero where they are.
  OPTWATCH_INLINE void compare(const HotBlock& b, int i, int n, const CubicReader& m_reader,
                               const LogReader& root_reader, Errors* errors) const {
    Errors e = *errors;
    for (const int end = i + n; i < end; i += kWidth) {
      const Float m = load(b.next[0] + i), v = load(b.next[1] + i);
      const Float m_stored = m_reader.read<1>(i).v[0], root = root_reader.read<1>(i).v[0];
      const Float v_error = load(b.root + i) - root, m_error = m - m_stored;
      const Float u_error = load(b.update + i) - m_stored / fma(root, splat(root_factor), splat(eps));
      e.m_error = fma(m_error, m_error, e.m_error);
      e.v_error = fma(v_error, v_error, e.v_error);
      e.u_error = fma(u_error, u_error, e.u_error);
      e.m_sq = fma(m, m, e.m_sq);
      e.moment_grad = fma(m, load(b.grad + i), e.moment_grad);
      e.m_sum += m;
      e.v_sum += v;
      e.m_lost = count(e.m_lost, but_not(equal(m_stored, Float{}), equal(m, Float{})));
    }
    *errors = e;
  }

  OPTWATCH_INLINE bool observe(const HotBlock& b, const HotSums& known, double* sums) const {
    if (!trustworthy(known.squares.update) || !(known.absmax[0] <= kLargestBf16) || !(known.absmax[1] < 0x1p126f))
      return false;
    Errors e;
    for (int start = 0; start < b.n; start += kLogBlock) {
      const LogReader roots = LogReader(b.parts[1], start / kLogBlock).of_roots();
      for (int i = start; i < b.n && i < start + kLogBlock; i += kCubicBlock)
        compare(b, i, length_of(i, kCubicBlock, b.n), CubicReader(b.parts[0], i / kCubicBlock), roots, &e);
    }
    const float m_error = sum(e.m_error), m_sq = sum(e.m_sq), v_error = sum(e.v_error), u_error = sum(e.u_error);
    const float moment_grad = sum(e.moment_grad);
    const bool precise = trustworthy(m_error) && trustworthy(m_sq) && trustworthy(v_error) && trustworthy(u_error) &&
                         trustworthy(moment_grad < 0 ? -moment_grad : moment_grad);
    if (!precise) return false;
    const float v_sum = sum(e.v_sum);
    const double m_fields[] = {m_error, m_sq, sum(e.m_sum), known.absmax[0], double(sum(e.m_lost))};
    const double v_fields[] = {v_error, v_sum, v_sum, known.absmax[1], 0};  // only what is zero has the code for it
    sums[kUpdateErrorSq] += u_error;
    sums[kMomentGrad] += moment_grad;
    for (int s = 0; s < 2; s++) {
      double* fields = sums + kTensorFields + s * kSlotFields;
      const double* found = s ? v_fields : m_fields;
      for (int f = 0; f < kSaturated; f++)
        if (f != kAbsMax) fields[f] += found[f];
      if (fields[kAbsMax] < found[kAbsMax]) fields[kAbsMax] = found[kAbsMax];  // a NaN is kept
    }
    return true;
  }
};

template <class R>
inline bool adam_int8_fits(const float* scalars, int) {
  return AdamInt8<R>(scalars).fits();
}

template <class R>
inline HotSums adam_int8_step(const HotBlock& b, const float* scalars) {
  const AdamInt8<R> plan(scalars);
  const bool scaled = plan.h.grad_scale != 1;
  if (b.keep == Keep::kAll) return scaled ? plan.template run<true, true>(b) : plan.template run<false, true>(b);
  return scaled ? plan.template run<true, false>(b) : plan.template run<false, false>(b);
}

template <class R>
inline bool adam_int8_observe(const HotBlock& b, const float* scalars, const HotSums& known, double* sums) {
  return AdamInt8<R>(scalars).observe(b, known, sums);
}

template <class R>
constexpr Hot kAdamInt8 = {adam_int8_fits<R>, adam_int8_step<R>, R::kSlots == 2 ? adam_int8_observe<R> : nullptr};

}  // namespace optwatch::OPTWATCH_ISA
