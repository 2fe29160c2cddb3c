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

// GradField of the gradients of a work item.
inline void sum_gradients(const Tables& t, const Work& work) {
  alignas(64) float wide[kBlock], finite[kBlock];
  alignas(64) char room[kBlock * 4];
  for (int64_t first = work.start; first < work.stop; first += kBlock) {
    const int n = static_cast<int>(work.stop - first < kBlock ? work.stop - first : kBlock);
    const float* grad = t.grad->load(padded(work.grad, first, n, 8 * t.grad->bytes, room), n, wide);
    const double given = squares(grad, n);
    work.sums[kGivenSq] += given;
    if (given <= 1e300) {
      work.sums[kFiniteSq] += given;
      continue;
    }
    work.sums[kNonfiniteCount] += static_cast<double>(nonfinite(grad, n));
    work.sums[kFiniteSq] += squares(without_nonfinite(grad, n, finite), n);
  }
}

// The squares of what the rule measures, from the state as it was.
inline void sum_norms(const Tables& t, const Work& work) {
  alignas(64) float grad_wide[kBlock], weight_wide[kBlock], state_wide[kMaxSlots][kBlock], values[kMaxNorms][kBlock];
  alignas(64) char rooms[3 + kMaxSlots][kBlock * 4];
  const Tensor& tensor = *work.tensor;
  for (int64_t first = work.start; first < work.stop; first += kBlock) {
    const int n = static_cast<int>(work.stop - first < kBlock ? work.stop - first : kBlock);
    const float* grad = t.grad->load(padded(work.grad, first, n, 8 * t.grad->bytes, rooms[0]), n, grad_wide);
    if (work.zero) grad = without_nonfinite(grad, n, grad_wide);
    Part at = {};
    at.first = first;
    at.values = padded(tensor.param, first, n, t.weight->bits, rooms[1]);
    if (t.weight->correction) at.correction = padded(tensor.correction, first, n, 8 * t.weight->correction, rooms[2]);
    const float* weight = t.weight->load(at, n, weight_wide);
    const float* state[kMaxSlots];
    for (int s = 0; s < t.rule->slots; s++) {
      const Codec& codec = *t.codecs[s];
      at.buffers = tensor.buffers[s];
      at.values = padded(static_cast<const char*>(at.buffers[0]), first, n, codec.bits, rooms[3 + s]);
      state[s] = codec.load(at, n, state_wide[s]);
    }
    t.rule->measure(grad, weight, state, n, work.scalars, values);
    for (int m = 0; m < t.rule->norms; m++) {
      for (int i = n; i % kPad; i++) values[m][i] = 0;  // 0 / (0 + eps) is NaN when eps is 0
      work.sums[m] += squares(values[m], n);
    }
  }
}

}  // namespace optwatch::OPTWATCH_ISA
