// Lion; rule.py has the formulas.
#pragma once

#include "optwatch/kernels/cpu/elementwise.h"

namespace optwatch::OPTWATCH_ISA {

struct Lion : Decoupled {
  static constexpr int kSlots = 1;
  static constexpr bool kSecondMoment[] = {false};
  static constexpr bool kAgain = true;
  struct Scalars {
    float grad_scale, one_minus_beta1, one_minus_beta2, moment_share, grad_share, lr, decay;
  };

  // lr with the sign of x, 0 where x is 0 or NaN, as torch.sign has it.
  template <int k>
  OPTWATCH_INLINE static Floats<k> signed_lr(const Floats<k>& x, const Scalars& h) {
    return each(x, [=](Float a) {
      return select(less(Float{}, a), splat(h.lr), select(less(a, Float{}), splat(-h.lr), Float{}));
    });
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>&, const Scalars& h) {
    const auto away = grad * h.grad_scale - s[0];
    const auto direction = s[0] + away * h.one_minus_beta1;
    s[0] = s[0] + away * h.one_minus_beta2;
    return signed_lr(direction, h);
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> update(const Floats<k>* s, const Floats<k>& grad, const Scalars& h) {
    return signed_lr(s[0] * h.moment_share + grad * h.grad_scale * h.grad_share, h);
  }
};

constexpr Rule rules_lion[] = {elementwise_rule<Lion>("lion")};

}  // namespace optwatch::OPTWATCH_ISA
