// The rules with one byte an element in every slot: one pass over a block decodes, steps, and collects the squares and
// the ranges that the encoders need; only the new state goes through the first-level cache, and the codecs' own loops
// encode it. Codecs are what they are elsewhere, and so are rules but for Freely below.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "mathematics.h"
#include "optwatch/codecs/int8/cpu.h"

namespace optwatch::OPTWATCH_ISA {

constexpr int kLineful = kPad / kWidth;  // vectors that a line of fp32 fills

// Calls f(0), f(1), ... with constants.
template <int... s, class F>
OPTWATCH_INLINE void for_each_of(std::integer_sequence<int, s...>, F f) {
  (f(std::integral_constant<int, s>{}), ...);
}

// Calls f with `keep` as a constant; in plain steps only a rule with `kAgain` keeps its update.
template <bool again, class F>
OPTWATCH_INLINE auto with_keep(Keep keep, F f) {
  if constexpr (again)
    if (keep == Keep::kUpdate) return f(std::integral_constant<Keep, Keep::kUpdate>{});
  if (keep == Keep::kAll) return f(std::integral_constant<Keep, Keep::kAll>{});
  return f(std::integral_constant<Keep, Keep::kNothing>{});
}

// How int8 reads a slot of a kind, and what its encoder has to know of a sub-block.
template <bool second_moment>
struct ByteSlot {
  using Buffers = CubicBuffers;
  using Reader = CubicReader;
  using Range = Magnitude;
  static constexpr int kSize = kCubicBlock;
};
template <>
struct ByteSlot<true> {
  using Buffers = LogBuffers;
  using Reader = LogReader;
  using Range = LogRange;
  static constexpr int kSize = kLogBlock;
};

// A rule's step where its last bits are free, since the state is rounded anyway: its `step_freely`, for two vectors at
// once, or its `step` if it has none. It is `bare` where the gradient is taken as it is given.
template <class R, class = void>
struct Freely {
  static constexpr int kTogether = 1;
  static bool is_bare(const typename R::Scalars&) { return false; }
  template <bool bare, int k>
  static OPTWATCH_INLINE Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>& weight,
                                        const typename R::Scalars& h) {
    return R::step(s, grad, weight, h);
  }
};
template <class R>
struct Freely<R, std::void_t<decltype(&R::template step_freely<false, 1>)>> {
  static constexpr int kTogether = 2;
  static bool is_bare(const typename R::Scalars& h) { return h.grad_scale == 1 && h.l2 == 0; }
  template <bool bare, int k>
  static OPTWATCH_INLINE Floats<k> step(Floats<k>* s, const Floats<k>& grad, const Floats<k>& weight,
                                        const typename R::Scalars& h) {
    return R::template step_freely<bare>(s, grad, weight, h);
  }
};

template <class R>
struct BytePlan {
  using Slots = std::make_integer_sequence<int, R::kSlots>;
  using Scalars = typename R::Scalars;

  template <class>
  struct Tuples;
  template <int... s>
  struct Tuples<std::integer_sequence<int, s...>> {
    using Buffers = std::tuple<typename ByteSlot<R::kSecondMoment[s]>::Buffers...>;
    using Readers = std::tuple<typename ByteSlot<R::kSecondMoment[s]>::Reader...>;
    using Ranges = std::tuple<typename ByteSlot<R::kSecondMoment[s]>::Range...>;
    static OPTWATCH_INLINE Buffers buffers(const HotBlock& b) { return {b.parts[s]...}; }
    static OPTWATCH_INLINE Readers readers(const Buffers& buffers, int start) { return {reader<s>(buffers, start)...}; }
  };
  using Buffers = typename Tuples<Slots>::Buffers;
  using Readers = typename Tuples<Slots>::Readers;
  using Ranges = typename Tuples<Slots>::Ranges;

  template <int s>
  static OPTWATCH_INLINE auto reader(const Buffers& buffers, int start) {
    using Slot = ByteSlot<R::kSecondMoment[s]>;
    return typename Slot::Reader(std::get<s>(buffers), start / Slot::kSize);
  }

  static constexpr bool has(bool second_moment) {
    for (int s = 0; s < R::kSlots; s++)
      if (R::kSecondMoment[s] == second_moment) return true;
    return false;
  }
  // What has one scale or grid in every slot, and what has one in those that have the longest.
  static constexpr int kShort = has(false) ? kCubicBlock : kLogBlock, kLong = has(true) ? kLogBlock : kCubicBlock;
  static_assert(kLong % kShort == 0 && kBlock % kLong == 0);

  struct Sums {
    Float grad{}, update{}, weight{};
    Int unchanged{};
  };

  // Calls f(s) with the slots of a kind.
  template <bool second_moment, class F>
  static OPTWATCH_INLINE void for_each_slot(F f) {
    for_each_of(Slots{}, [&](auto s) {
      if constexpr (R::kSecondMoment[s.value] == second_moment) f(s);
    });
  }

  // What is left to prepare of the slots of a kind where their sub-block [start, start + n) has been collected.
  template <bool second_moment>
  static OPTWATCH_INLINE void settle(const Buffers& buffers, int start, int n, const Ranges& ranges,
                                     const float* const* next, Note* notes) {
    for_each_slot<second_moment>([&](auto slot) {
      constexpr int s = slot.value;
      if constexpr (second_moment)
        log_settle(std::get<s>(buffers), start / kLogBlock, std::get<s>(ranges), next[s] + start, n, &notes[s]);
      else
        cubic_settle(std::get<s>(buffers), start / kCubicBlock, largest(std::get<s>(ranges).most), &notes[s]);
    });
  }

  // One function, in which no loop over vectors takes or returns a struct: GCC copies one in pieces and then waits for
  // them, which took as long as the loop itself for the 8 vectors of a scale.
  template <Keep keep, bool bare>
  static HotSums run(const HotBlock& b, const Scalars h) {
    constexpr int kTogether = Freely<R>::kTogether < kLineful ? kLineful : Freely<R>::kTogether;
    const Ahead ahead = b.ahead;
    const int n = b.n;
    const float *grads = b.grad, *weights = b.weight;
    float *new_weights = b.new_weight, *updates = b.update, *next[R::kSlots];
    const Buffers buffers = Tuples<Slots>::buffers(b);
    Note* notes = b.notes;
    for (int s = 0; s < R::kSlots; s++) next[s] = b.next[s];
    Sums sums;
    for (int start = 0; start < n; start += kLong) {
      Readers readers = Tuples<Slots>::readers(buffers, start);
      Ranges ranges;
      const int length = length_of(start, kLong, n);
      for (int part = start; part < start + length; part += kShort) {
        const int part_length = length_of(part, kShort, n);
        for_each_slot<false>([&](auto s) {
          std::get<s.value>(readers) = reader<s.value>(buffers, part);
          std::get<s.value>(ranges) = {};
        });
        ahead.ask_bytes<2, 2 + R::kSlots, kShort>(part);
        in_packs<kTogether>(part_length, [&](int at, auto size) OPTWATCH_INLINE_BODY {
          constexpr int k = size.value;
          const int i = part + at;
          Floats<k> state[R::kSlots];
          for_each_of(Slots{}, [&](auto s) { state[s.value] = std::get<s.value>(readers).template read<k>(i); });
          const Floats<k> grad = load_pack<k>(grads + i), weight = load_pack<k>(weights + i);
          const Floats<k> u = Freely<R>::template step<bare>(state, grad, weight, h);
          for_each_of(Slots{}, [&](auto s) { store(next[s.value] + i, state[s.value]); });
          const Floats<k> moved = R::apply(weight, u, h);
          store(new_weights + i, moved);
          if constexpr (keep != Keep::kNothing) store(updates + i, u);
          for (int j = 0; j < k; j++) {
            if constexpr (keep == Keep::kAll) {
              sums.weight = fma(moved.v[j], moved.v[j], sums.weight);
              sums.unchanged = count(sums.unchanged, equal(moved.v[j], weight.v[j]));
            }
            if (j % kLineful == 0) ahead.ask<0, 2>(i + j * kWidth);
            for_each_of(Slots{}, [&](auto s) { std::get<s.value>(ranges).add(state[s.value].v[j]); });
            sums.grad = fma(grad.v[j], grad.v[j], sums.grad);
            sums.update = fma(u.v[j], u.v[j], sums.update);
          }
        });
        settle<false>(buffers, part, part_length, ranges, next, notes);
      }
      settle<true>(buffers, start, length, ranges, next, notes);
    }
    return {{sum(sums.grad), sum(sums.update), sum(sums.weight), sum(sums.unchanged)}, {}};
  }
};

// Padding may turn into anything, and would be part of the ranges.
inline bool byte_fits(const float*, int n) { return n % kPad == 0; }

template <class R>
inline HotSums byte_step(const HotBlock& b, const float* scalars) {
  typename R::Scalars h;
  std::memcpy(&h, scalars, sizeof h);
  using Plan = BytePlan<R>;
  return with_keep<R::kAgain>(b.keep, [&](auto keep) {
    if constexpr (Freely<R>::kTogether > 1)
      if (Freely<R>::is_bare(h)) return Plan::template run<keep.value, true>(b, h);
    return Plan::template run<keep.value, false>(b, h);
  });
}

}  // namespace optwatch::OPTWATCH_ISA
