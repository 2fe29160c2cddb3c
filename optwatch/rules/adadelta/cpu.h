// Adadelta; rule.py has the formulas.
#pragma once

#include "optwatch/kernels/cpu/elementwise.h"

namespace optwatch::OPTWATCH_ISA {

struct Adadelta : Coupled {
  static constexpr int kSlots = 2;
  static constexpr bool kSecondMoment[] = {true, true};
  static constexpr bool kAgain = true;
  struct Scalars {
    float grad_scale, l2, rho, one_minus_rho, eps, lr;
  };

  template <int k>
  OPTWATCH_INLINE static Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>& weight,
                                        const Scalars& h) {
    const auto g = decayed(grad, weight, h);
    s[0] = s[0] * h.rho + g * g * h.one_minus_rho;
    const auto delta = sqrt(s[1] + h.eps) / sqrt(s[0] + h.eps) * g;
    s[1] = s[1] * h.rho + delta * delta * h.one_minus_rho;
    return delta * h.lr;
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> update(const Floats<k>* s, const Floats<k>& grad, const Scalars& h) {
    const auto g = grad * h.grad_scale;
    const auto below = (s[0] + h.eps) * h.rho + g * g * h.one_minus_rho;
    return sqrt((s[1] + h.rho * h.eps) / below) * g * h.lr;
  }
};

constexpr Rule rules_adadelta[] = {elementwise_rule<Adadelta>("adadelta")};

}  // namespace optwatch::OPTWATCH_ISA
