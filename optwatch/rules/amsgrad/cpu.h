// AMSGrad, with both kinds of weight decay; rule.py has the formulas.
#pragma once

#include "optwatch/kernels/cpu/elementwise.h"
#include "optwatch/rules/adam/cpu.h"
#include "optwatch/rules/adamw/cpu.h"

namespace optwatch::OPTWATCH_ISA {

struct AMSGradW : Decoupled {
  static constexpr int kSlots = 3;
  static constexpr bool kSecondMoment[] = {false, true, true};
  static constexpr bool kAgain = false;
  using Scalars = AdamW::Scalars;

  template <int k, class H>
  OPTWATCH_INLINE static Floats<k> advance(Floats<k>* s, const Floats<k>& g, const H& h) {
    s[0] = s[0] + (g - s[0]) * h.one_minus_beta1;
    s[1] = s[1] * h.beta2 + g * g * h.one_minus_beta2;
    s[2] = larger(s[2], s[1]);
    return s[0] / (sqrt(s[2]) * h.inv_sqrt_bc2 + h.eps) * h.step_size;
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>&, const Scalars& h) {
    return advance(s, grad * h.grad_scale, h);
  }

  template <int k, class H>
  OPTWATCH_INLINE static Floats<k> update(const Floats<k>* s, const Floats<k>&, const H& h) {
    return s[0] / (sqrt_nearly(s[2]) * h.inv_sqrt_bc2 + h.eps) * h.step_size;
  }
};

struct AMSGrad : Coupled {
  static constexpr int kSlots = 3;
  static constexpr bool kSecondMoment[] = {false, true, true};
  static constexpr bool kAgain = false;
  using Scalars = Adam::Scalars;

  template <int k>
  OPTWATCH_INLINE static Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>& weight,
                                        const Scalars& h) {
    return AMSGradW::advance(s, decayed(grad, weight, h), h);
  }

  template <int k>
  OPTWATCH_INLINE static Floats<k> update(const Floats<k>* s, const Floats<k>& grad, const Scalars& h) {
    return AMSGradW::update(s, grad, h);
  }
};

constexpr Rule rules_amsgrad[] = {elementwise_rule<AMSGradW>("adamw_amsgrad"),
                                  elementwise_rule<AMSGrad>("adam_amsgrad")};

}  // namespace optwatch::OPTWATCH_ISA
