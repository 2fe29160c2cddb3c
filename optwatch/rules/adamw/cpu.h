// AdamW; rule.py has the formulas.
#pragma once

#include "optwatch/kernels/cpu/elementwise.h"

namespace optwatch::OPTWATCH_ISA {

struct AdamW : Decoupled {
  static constexpr int kSlots = 2;
  static constexpr bool kSecondMoment[] = {false, true};
  static constexpr bool kAgain = false;
  struct Scalars {
    float grad_scale, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, inv_sqrt_bc2, decay;
  };

  template <int k>
  OPTWATCH_INLINE static Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>&, const Scalars& h) {
    const auto g = grad * h.grad_scale;
    s[0] = s[0] + (g - s[0]) * h.one_minus_beta1;
    s[1] = s[1] * h.beta2 + g * g * h.one_minus_beta2;
    return s[0] / (sqrt(s[1]) * h.inv_sqrt_bc2 + h.eps) * h.step_size;
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> update(const Floats<k>* s, const Floats<k>&, const Scalars& h) {
    return s[0] / (sqrt_nearly(s[1]) * h.inv_sqrt_bc2 + h.eps) * h.step_size;
  }
};

constexpr Rule rules_adamw[] = {elementwise_rule<AdamW>("adamw")};

}  // namespace optwatch::OPTWATCH_ISA
