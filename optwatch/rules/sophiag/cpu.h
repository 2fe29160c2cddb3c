// Sophia-G; rule.py has the formulas.
#pragma once

#include "optwatch/kernels/cpu/elementwise.h"

namespace optwatch::OPTWATCH_ISA {

struct SophiaG : Decoupled {
  static constexpr int kSlots = 2;
  static constexpr bool kSecondMoment[] = {false, true};
  static constexpr bool kAgain = false;
  struct Scalars {
    float grad_scale, one_minus_beta1, beta2, fold_scale, curvature, lr, decay;
  };

  template <int k>
  OPTWATCH_INLINE static Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>&, const Scalars& h) {
    const auto g = grad * h.grad_scale;
    const auto folded = g * h.fold_scale;
    s[0] = s[0] + (g - s[0]) * h.one_minus_beta1;
    s[1] = s[1] * h.beta2 + folded * folded;
    return update(s, grad, h);
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> update(const Floats<k>* s, const Floats<k>&, const Scalars& h) {
    const auto ratio = s[0] / (s[1] * h.curvature + 1e-15f);
    // The second operand is kept where it is NaN.
    return each(ratio, [](Float x) { return maximum(splat(-1.0f), minimum(splat(1.0f), x)); }) * h.lr;
  }
};

constexpr Rule rules_sophiag[] = {elementwise_rule<SophiaG>("sophiag")};

}  // namespace optwatch::OPTWATCH_ISA
