// AdamW on fp32 vectors; rule.py has the formulas. Products and sums are spelled out in rule.py's order and never
// contracted, so that the new state and the weights equal the reference's to the last bit.
#pragma once

#include "optwatch/kernels/cpu/packs.h"
#include "optwatch/kernels/cpu/tables.h"

namespace optwatch::OPTWATCH_ISA {

struct AdamWScalars {
  float grad_scale, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, inv_sqrt_bc2, decay;
};

template <bool keep>
inline float adamw_loop(const float* g, const float* w, float* w_new, const float* const* state, float* const* next,
                        int n, const AdamWScalars h, float* u_out) {
  const float *m_in = state[0], *v_in = state[1];
  float *m_out = next[0], *v_out = next[1];
  Float update_sq{};
  in_packs<1>(n, [&](int i, auto size) {
    constexpr int k = size.value;
    const auto grad = load_pack<k>(g + i) * h.grad_scale;
    auto m = load_pack<k>(m_in + i), v = load_pack<k>(v_in + i);
    m = m + (grad - m) * h.one_minus_beta1;
    v = v * h.beta2 + grad * grad * h.one_minus_beta2;
    store(m_out + i, m);
    store(v_out + i, v);
    const auto u = m / (sqrt(v) * h.inv_sqrt_bc2 + h.eps) * h.step_size;
    store(w_new + i, load_pack<k>(w + i) * h.decay - u);
    if constexpr (keep) store(u_out + i, u);
    for (int j = 0; j < k; j++) update_sq = fma(u.v[j], u.v[j], update_sq);
  });
  return sum(update_sq);
}

inline float adamw_step(const float* g, const float* w, float* w_new, const float* const* state, float* const* next,
                        int n, const float* scalars, float* u) {
  AdamWScalars h;
  std::memcpy(&h, scalars, sizeof h);
  return u ? adamw_loop<true>(g, w, w_new, state, next, n, h, u)
           : adamw_loop<false>(g, w, w_new, state, next, n, h, nullptr);
}

// For the statistics only, so nearly exact is exact enough.
inline void adamw_update(const float* const* state, const float*, int n, const float* scalars, float* u) {
  AdamWScalars h;
  std::memcpy(&h, scalars, sizeof h);
  in_packs<4>(n, [=](int i, auto size) {
    const auto m = load_pack<size.value>(state[0] + i), v = load_pack<size.value>(state[1] + i);
    store(u + i, m / (sqrt_nearly(v) * h.inv_sqrt_bc2 + h.eps) * h.step_size);
  });
}

constexpr Rule rules_adamw[] = {{"adamw", 2, 8, {false, true}, adamw_step, adamw_update, false}};

}  // namespace optwatch::OPTWATCH_ISA
