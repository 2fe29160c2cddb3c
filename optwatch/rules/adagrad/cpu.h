// Adagrad; rule.py has the formulas.
#pragma once

#include "optwatch/kernels/cpu/elementwise.h"

namespace optwatch::OPTWATCH_ISA {

struct Adagrad : Coupled {
  static constexpr int kSlots = 1;
  static constexpr bool kSecondMoment[] = {true};
  static constexpr bool kAgain = true;
  struct Scalars {
    float grad_scale, l2, eps, step_size;
  };

  template <int k>
  OPTWATCH_INLINE static Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>& weight,
                                        const Scalars& h) {
    const auto g = decayed(grad, weight, h);
    s[0] = s[0] + g * g;
    return g / (sqrt(s[0]) + h.eps) * h.step_size;
  }

  // Contracted, and every other root beside the divider, which a root and a quotient for each vector keep busier than
  // all else.
  template <bool bare, int k>
  OPTWATCH_INLINE static Floats<k> step_freely(Floats<k>* s, const Floats<k>& grad, const Floats<k>& weight,
                                               const Scalars& h) {
    const auto g = bare ? grad : fma(weight, h.l2, grad * h.grad_scale);
    s[0] = fma(g, g, s[0]);
    Floats<k> root;
    for (int j = 0; j < k; j++) root.v[j] = j % 2 ? sqrt_nearly(s[0].v[j]) : sqrt(s[0].v[j]);
    return g / (root + h.eps) * h.step_size;
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> update(const Floats<k>* s, const Floats<k>& grad, const Scalars& h) {
    return grad * h.grad_scale / (sqrt_nearly(s[0]) + h.eps) * h.step_size;
  }
};

constexpr Rule rules_adagrad[] = {elementwise_rule<Adagrad>("adagrad")};

}  // namespace optwatch::OPTWATCH_ISA
