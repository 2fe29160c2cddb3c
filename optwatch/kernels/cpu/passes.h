// The passes before the step: they read what the step will read, sum, and store nothing.
#pragma once

#include "sums.h"
#include "tables.h"
#include "types.h"

namespace optwatch::OPTWATCH_ISA {

// Elements [first, first + n) of an array, or a copy that is padded with zeros where a vector would read past its end.
inline char* padded(const char* array, int64_t first, int n, int bits, char* room) {
  const char* from = array + bytes_of(first, bits);
  if (n % kPad == 0) return const_cast<char*>(from);  // a Part is for writing, too; nothing here writes
  std::memset(room, 0, static_cast<size_t>(bytes_of(kBlock, bits)));
  std::memcpy(room, from, static_cast<size_t>(bytes_of(n, bits)));
  return room;
}

// The gradient with zeros where it is not finite.
inline const float* without_nonfinite(const float* grad, int n, float* room) {
  for (int i = 0; i < n; i++) room[i] = (bits(grad[i]) & ~kSignBit) < kInfinityBits ? grad[i] : 0.0f;
  for (int i = n; i % kPad; i++) room[i] = 0;
  return room;
}

inline double squares(const float* x, int n) {
  const float fast = quick_squares(x, n);
  return trustworthy(fast) ? fast : precise_squares(x, n);
}

// What a block's arrays hold, as fp32 that is padded with zeros.
struct Operands {
  const float *grad, *weight, *state[kMaxSlots];
};

class Reading {
 public:
  Reading(const Tables& tables, const Work& work) : t_(tables), work_(work) {}

  // Elements [first, first + n); they are there until the next call.
  Operands at(int64_t first, int n) {
    Operands found = {};
    const Tensor& tensor = *work_.tensor;
    found.grad = t_.grad->load(padded(work_.grad, first, n, 8 * t_.grad->bytes, rooms_[0]), n, grad_);
    if (work_.zero) found.grad = without_nonfinite(found.grad, n, grad_);
    Part part = {};
    part.first = first;
    part.values = padded(tensor.param, first, n, t_.weight->bits, rooms_[1]);
    if (t_.weight->correction)
      part.correction = padded(tensor.correction, first, n, 8 * t_.weight->correction, rooms_[2]);
    found.weight = t_.weight->load(part, n, weight_);
    for (int s = 0; s < t_.rule->slots; s++) {
      const Codec& codec = *t_.codecs[s];
      part.buffers = tensor.buffers[s];
      part.values = padded(static_cast<const char*>(part.buffers[0]), first, n, codec.bits, rooms_[3 + s]);
      found.state[s] = codec.load(part, n, state_[s]);
    }
    return found;
  }

 private:
  const Tables& t_;
  const Work& work_;
  alignas(64) float grad_[kBlock], weight_[kBlock], state_[kMaxSlots][kBlock];
  alignas(64) char rooms_[3 + kMaxSlots][kBlock * 4];
};

// Of the blocks of a work item: f(first element, number of elements).
template <class F>
OPTWATCH_INLINE void for_each_block(const Work& work, F f) {
  for (int64_t first = work.start; first < work.stop; first += kBlock)
    f(first, static_cast<int>(work.stop - first < kBlock ? work.stop - first : kBlock));
}

constexpr int kPage = 4096;

// GradField of the gradients of a work item.
inline void sum_gradients(const Tables& t, const Work& work) {
  alignas(64) float wide[kBlock], finite[kBlock];
  alignas(64) char room[kBlock * 4];
  for_each_block(work, [&](int64_t first, int n) {
    const float* grad = t.grad->load(padded(work.grad, first, n, 8 * t.grad->bytes, room), n, wide);
    // A page ahead: the processor by itself asks for nothing beyond the one it reads.
    const char* ahead = work.grad + first * t.grad->bytes + kPage;
    for (int i = 0; i < n * t.grad->bytes; i += kLine) __builtin_prefetch(ahead + i);
    const double given = squares(grad, n);
    work.sums[kGivenSq] += given;
    if (given <= 1e300) {
      work.sums[kFiniteSq] += given;
      return;
    }
    work.sums[kNonfiniteCount] += static_cast<double>(nonfinite(grad, n));
    work.sums[kFiniteSq] += squares(without_nonfinite(grad, n, finite), n);
  });
}

// The squares of what the rule measures, from the state as it was.
inline void sum_norms(const Tables& t, const Work& work) {
  Reading reading(t, work);
  alignas(64) float values[kMaxNorms][kBlock];
  for_each_block(work, [&](int64_t first, int n) {
    const Operands is = reading.at(first, n);
    t.rule->measure(is.grad, is.weight, is.state, n, work.scalars, values);
    for (int m = 0; m < t.rule->norms; m++) {
      for (int i = n; i % kPad; i++) values[m][i] = 0;  // 0 / (0 + eps) is NaN when eps is 0
      work.sums[m] += squares(values[m], n);
    }
  });
}

// The fields of a full row that follow from what anybody's step has left; the others stay zero.
inline void sum_state(const Tables& t, const Work& work) {
  Reading reading(t, work);
  alignas(64) float update[kBlock];
  const int slots = t.rule->slots;
  double* sums = work.sums;
  for_each_block(work, [&](int64_t first, int n) {
    const Operands is = reading.at(first, n);
    const double grad_sq = squares(is.grad, n);
    sums[kGradSq] += grad_sq;
    if (!(grad_sq <= 1e300)) sums[kNonfinite] += static_cast<double>(nonfinite(is.grad, n));
    sums[kWeightSq] += squares(is.weight, n);
    for (int s = 0; s < slots; s++)
      (t.rule->second_moment[s]
           ? slot_fields<true, false>
           : slot_fields<false, false>)(is.state[s], nullptr, n, sums + kTensorFields + s * kSlotFields);
    if (slots && !t.rule->second_moment[0]) sums[kMomentGrad] += product(is.state[0], is.grad, n);
    if (!t.stepped_by) return;
    const float* ordered[kMaxSlots];
    for (int s = 0; s < t.stepped_by->slots; s++) ordered[s] = is.state[t.order[s]];
    t.stepped_by->update(ordered, is.grad, n, work.scalars, update);
    for (int i = n; i % kPad; i++) update[i] = 0;
    sums[kUpdateSq] += squares(update, n);
  });
}

}  // namespace optwatch::OPTWATCH_ISA
