// LAMB; rule.py has the formulas. The driver puts the ratio into step_size and decay.
#pragma once

#include "optwatch/rules/adamw/cpu.h"

namespace optwatch::OPTWATCH_ISA {

struct LAMB : AdamW {
  static constexpr int kNorms = 2;
  struct Scalars : AdamW::Scalars {
    float inv_bc1, weight_decay, lr, adapts, max_ratio;
  };

  template <int k>
  OPTWATCH_INLINE static void measure(Floats<k>* s, const Floats<k>& grad, const Floats<k>& weight, const Scalars& h,
                                      Floats<k>* values) {
    AdamW::Scalars unit = h;
    unit.step_size = h.inv_bc1;
    values[0] = weight;
    values[1] = step(s, grad, weight, unit) + weight * h.weight_decay;
  }
};

constexpr Rule rules_lamb[] = {elementwise_rule_with_norms<LAMB>("lamb")};

}  // namespace optwatch::OPTWATCH_ISA
