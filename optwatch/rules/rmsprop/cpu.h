// RMSprop, plain, centered and with momentum; rule.py has the formulas.
#pragma once

#include "optwatch/kernels/cpu/elementwise.h"

namespace optwatch::OPTWATCH_ISA {

template <bool centered, bool momentum>
struct RMSprop : Coupled {
  static constexpr int kSlots = 1 + centered + momentum;
  static constexpr int kMean = momentum, kSquare = kSlots - 1;  // the buffer is the first, if there is one
  static constexpr bool kSecondMoment[] = {kSlots == 1, kSlots == 2, kSlots == 3};
  static constexpr bool kAgain = !momentum;
  struct Scalars {
    float grad_scale, l2, alpha, one_minus_alpha, odds, eps, momentum_factor, lr;
  };

  template <int k>
  OPTWATCH_INLINE static Floats<k> normalised(const Floats<k>* s, const Floats<k>& g, const Scalars& h) {
    auto square = s[kSquare];
    if constexpr (centered) {
      const auto away = g - s[kMean];
      square = larger(square - s[kMean] * s[kMean], away * away * h.odds);
    }
    return g / (sqrt(square) + h.eps);
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>& weight,
                                        const Scalars& h) {
    const auto g = decayed(grad, weight, h);
    s[kSquare] = s[kSquare] * h.alpha + g * g * h.one_minus_alpha;
    if constexpr (centered) s[kMean] = s[kMean] + (g - s[kMean]) * h.one_minus_alpha;
    const auto u = normalised(s, g, h);
    if constexpr (!momentum) return u * h.lr;
    s[0] = s[0] * h.momentum_factor + u;
    return s[0] * h.lr;
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> update(const Floats<k>* s, const Floats<k>& grad, const Scalars& h) {
    if constexpr (momentum) return s[0] * h.lr;
    return normalised(s, grad * h.grad_scale, h) * h.lr;
  }
};

constexpr Rule rules_rmsprop[] = {elementwise_rule<RMSprop<false, false>>("rmsprop"),
                                  elementwise_rule<RMSprop<false, true>>("rmsprop_momentum"),
                                  elementwise_rule<RMSprop<true, false>>("rmsprop_centered"),
                                  elementwise_rule<RMSprop<true, true>>("rmsprop_centered_momentum")};

}  // namespace optwatch::OPTWATCH_ISA
