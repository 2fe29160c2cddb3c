// AdEMAMix; rule.py has the formulas.
#pragma once

#include "optwatch/kernels/cpu/elementwise.h"

namespace optwatch::OPTWATCH_ISA {

struct AdEMAMix : Decoupled {
  static constexpr int kSlots = 3;
  static constexpr bool kSecondMoment[] = {false, false, true};
  static constexpr bool kAgain = false;
  struct Scalars {
    float grad_scale, one_minus_beta1, one_minus_beta3, beta2, one_minus_beta2, eps, step_size, slow_size, inv_sqrt_bc2,
        decay;
  };

  template <int k>
  OPTWATCH_INLINE static Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>&, const Scalars& h) {
    const auto g = grad * h.grad_scale;
    s[0] = s[0] + (g - s[0]) * h.one_minus_beta1;
    s[1] = s[1] + (g - s[1]) * h.one_minus_beta3;
    s[2] = s[2] * h.beta2 + g * g * h.one_minus_beta2;
    return (s[0] * h.step_size + s[1] * h.slow_size) / (sqrt(s[2]) * h.inv_sqrt_bc2 + h.eps);
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> update(const Floats<k>* s, const Floats<k>&, const Scalars& h) {
    return (s[0] * h.step_size + s[1] * h.slow_size) / (sqrt_nearly(s[2]) * h.inv_sqrt_bc2 + h.eps);
  }
};

constexpr Rule rules_ademamix[] = {elementwise_rule<AdEMAMix>("ademamix")};

}  // namespace optwatch::OPTWATCH_ISA
