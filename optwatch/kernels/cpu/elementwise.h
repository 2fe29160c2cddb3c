// The loop that the rules share. A rule is a class with
//   kSlots, kSecondMoment[]          its slots
//   Scalars                          the numbers of rule.py, in its order
//   kAgain                           whether update() of the new state need not be step()'s update to the last bit
//   step(s, g, w, h)                 turns the state s into the new one and returns the update
//   update(s, g, h)                  what is subtracted from the weight, from the new state; for the statistics only,
//                                    so nearly exact is exact enough
//   apply(w, u, h)                   the new weight
// all of them on packs. Products and sums are spelled out in rule.py's order and never contracted, so that the new
// state and the weights equal the reference's to the last bit.
#pragma once

#include "fused.h"
#include "packs.h"
#include "sums.h"
#include "tables.h"

namespace optwatch::OPTWATCH_ISA {

template <class R, Keep keep>
inline Squares elementwise_loop(const float* g, const float* w, float* w_new, const float* const* state,
                                float* const* next, int n, const typename R::Scalars h, float* u_out,
                                const Ahead ahead) {
  const float* in[R::kSlots + 1];
  float* out[R::kSlots + 1];
  for (int s = 0; s < R::kSlots; s++) in[s] = state[s], out[s] = next[s];
  Floats<kLineful> grad_sq{}, update_sq{}, weight_sq{};  // kPad partial sums, so that a long block is no less exact
  Int unchanged{};
  in_packs<kLineful>(n, [&](int i, auto size) {
    constexpr int k = size.value;
    ahead.ask<0, 2 + R::kSlots>(i);
    Floats<k> values[R::kSlots + 1];
    for (int s = 0; s < R::kSlots; s++) values[s] = load_pack<k>(in[s] + i);
    const auto grad = load_pack<k>(g + i), weight = load_pack<k>(w + i);
    const auto u = R::step(values, grad, weight, h);
    for (int s = 0; s < R::kSlots; s++) store(out[s] + i, values[s]);
    const auto moved = R::apply(weight, u, h);
    store(w_new + i, moved);
    if constexpr (keep != Keep::kNothing) store(u_out + i, u);
    for (int j = 0; j < k; j++) {
      if constexpr (keep == Keep::kAll) {
        weight_sq.v[j] = fma(moved.v[j], moved.v[j], weight_sq.v[j]);
        unchanged = count(unchanged, equal(moved.v[j], weight.v[j]));
      }
      grad_sq.v[j] = fma(grad.v[j], grad.v[j], grad_sq.v[j]);
      update_sq.v[j] = fma(u.v[j], u.v[j], update_sq.v[j]);
    }
  });
  return {sum(fold(grad_sq)), sum(fold(update_sq)), sum(fold(weight_sq)), sum(unchanged)};
}

template <class R>
inline Squares elementwise_step(const float* g, const float* w, float* w_new, const float* const* state,
                                float* const* next, int n, const float* scalars, Keep keep, float* u,
                                const Ahead& ahead) {
  typename R::Scalars h;
  std::memcpy(&h, scalars, sizeof h);
  return with_keep<R::kAgain>(
      keep, [&](auto kept) { return elementwise_loop<R, kept.value>(g, w, w_new, state, next, n, h, u, ahead); });
}

template <class R>
inline void elementwise_update(const float* const* state, const float* g, int n, const float* scalars, float* u) {
  typename R::Scalars h;
  std::memcpy(&h, scalars, sizeof h);
  in_packs<4>(n, [=](int i, auto size) {
    constexpr int k = size.value;
    Floats<k> values[R::kSlots + 1];
    for (int s = 0; s < R::kSlots; s++) values[s] = load_pack<k>(state[s] + i);
    store(u + i, R::update(values, load_pack<k>(g + i), h));
  });
}

template <class R>
inline void elementwise_measure(const float* g, const float* w, const float* const* state, int n, const float* scalars,
                                float (*out)[kBlock]) {
  typename R::Scalars h;
  std::memcpy(&h, scalars, sizeof h);
  in_packs<2>(n, [=](int i, auto size) {
    constexpr int k = size.value;
    Floats<k> values[R::kSlots + 1], measured[R::kNorms];
    for (int s = 0; s < R::kSlots; s++) values[s] = load_pack<k>(state[s] + i);
    R::measure(values, load_pack<k>(g + i), load_pack<k>(w + i), h, measured);
    for (int m = 0; m < R::kNorms; m++) store(out[m] + i, measured[m]);
  });
}

template <class R>
constexpr Rule elementwise_rule(const char* name) {
  Rule rule = {name,
               R::kSlots,
               static_cast<int>(sizeof(typename R::Scalars) / sizeof(float)),
               {},
               elementwise_step<R>,
               elementwise_update<R>,
               R::kAgain,
               {},
               0,
               nullptr};
  if constexpr (R::kSlots > 0) rule.bytes = {byte_fits, byte_step<R>, nullptr};
  for (int s = 0; s < R::kSlots; s++) rule.second_moment[s] = R::kSecondMoment[s];
  return rule;
}

// The same for a rule with a first pass: kNorms, and measure(s, g, w, h, values) from the old state s.
template <class R>
constexpr Rule elementwise_rule_with_norms(const char* name) {
  Rule rule = elementwise_rule<R>(name);
  static_assert(R::kNorms <= kMaxNorms);
  rule.norms = R::kNorms;
  rule.measure = elementwise_measure<R>;
  return rule;
}

// The larger one; NaN if either is.
template <int size>
OPTWATCH_INLINE Floats<size> larger(const Floats<size>& a, const Floats<size>& b) {
  return each(a, b, [](Float x, Float y) { return select(equal(x, x), maximum(x, y), x); });
}

// Weight decay as a part of the gradient (L2), after its sign.
template <int size, class Scalars>
OPTWATCH_INLINE Floats<size> decayed(const Floats<size>& grad, const Floats<size>& weight, const Scalars& h) {
  return grad * h.grad_scale + weight * h.l2;
}

// What such a rule does with its update.
struct Coupled {
  template <int size, class Scalars>
  OPTWATCH_INLINE static Floats<size> apply(const Floats<size>& weight, const Floats<size>& u, const Scalars&) {
    return weight - u;
  }
};

// What a rule does that shrinks the weight by its scalar `decay`.
struct Decoupled {
  template <int size, class Scalars>
  OPTWATCH_INLINE static Floats<size> apply(const Floats<size>& weight, const Floats<size>& u, const Scalars& h) {
    return weight * h.decay - u;
  }
};

}  // namespace optwatch::OPTWATCH_ISA
