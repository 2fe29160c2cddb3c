// SGD; rule.py has the formulas.
#pragma once

#include "optwatch/kernels/cpu/elementwise.h"

namespace optwatch::OPTWATCH_ISA {

struct SGD : Coupled {
  static constexpr int kSlots = 0;
  static constexpr bool kSecondMoment[] = {false};
  static constexpr bool kAgain = true;
  struct Scalars {
    float grad_scale, l2, lr;
  };

  template <int k>
  OPTWATCH_INLINE static Floats<k> step(Floats<k>*, const Floats<k>& grad, const Floats<k>& weight, const Scalars& h) {
    return decayed(grad, weight, h) * h.lr;
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> update(const Floats<k>*, const Floats<k>& grad, const Scalars& h) {
    return grad * h.grad_scale * h.lr;
  }
};

struct SGDMomentum : Coupled {
  static constexpr int kSlots = 1;
  static constexpr bool kSecondMoment[] = {false};
  static constexpr bool kAgain = true;
  struct Scalars {
    float grad_scale, l2, momentum, fresh, direct, through, lr;
  };

  template <int k>
  OPTWATCH_INLINE static Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>& weight,
                                        const Scalars& h) {
    const auto g = decayed(grad, weight, h);
    s[0] = s[0] * h.momentum + g * h.fresh;
    return (g * h.direct + s[0] * h.through) * h.lr;
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> update(const Floats<k>* s, const Floats<k>& grad, const Scalars& h) {
    return (grad * h.grad_scale * h.direct + s[0] * h.through) * h.lr;
  }
};

constexpr Rule rules_sgd[] = {elementwise_rule<SGD>("sgd"), elementwise_rule<SGDMomentum>("sgd_momentum")};

}  // namespace optwatch::OPTWATCH_ISA
