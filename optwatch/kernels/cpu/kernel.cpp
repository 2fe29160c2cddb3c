// The step over one work item, compiled once for each instruction set with OPTWATCH_ISA as its name.
#include "foreign.h"
#include "hot.h"
#include "mathematics.h"
#include "passes.h"
#include "registry.h"  // generated: the cpu.h of every codec and rule
#include "simd.h"
#include "sums.h"
#include "tables.h"
#include "types.h"

namespace optwatch::OPTWATCH_ISA {
namespace {

bool same(const char* a, const char* b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

template <class T, int n>
const T* find(const T (&tables)[n], const char* name) {
  for (const T& table : tables)
    if (same(table.name, name)) return &table;
  return nullptr;
}

const Codec* find_codec(const char* name) {
  const Codec* found = nullptr;
#define OPTWATCH_LOOK(folder) \
  if (!found) found = find(codecs_##folder, name);
  OPTWATCH_CODECS(OPTWATCH_LOOK)
#undef OPTWATCH_LOOK
  return found ? found : find(kForeignCodecs, name);
}

const Rule* find_rule(const char* name) {
  const Rule* found = nullptr;
#define OPTWATCH_LOOK(folder) \
  if (!found) found = find(rules_##folder, name);
  OPTWATCH_RULES(OPTWATCH_LOOK)
#undef OPTWATCH_LOOK
  return found;
}

const Type* find_type(const char* name) { return find(kTypes, name); }

const Hot* find_hot(const Rule& rule, const Codec* const* codecs) {
  for (int s = 0; s < rule.slots; s++)
    if (!same(codecs[s]->name, rule.second_moment[s] ? "int8_log" : "int8_cubic")) return nullptr;
  if (same(rule.name, "adamw")) return &kAdamInt8<AdamW>;
  if (same(rule.name, "adam")) return &kAdamInt8<Adam>;
  if (same(rule.name, "adamw_amsgrad")) return &kAdamInt8<AMSGradW>;
  if (same(rule.name, "adam_amsgrad")) return &kAdamInt8<AMSGrad>;
  return rule.bytes.step ? &rule.bytes : nullptr;
}

bool is_hot(const Tables& t, const Work& work, int n) { return t.hot && t.hot->fits(work.scalars, n); }

// The arrays of a block. They are reused for block after block and stay in the first-level cache.
struct alignas(64) Arrays {
  float grad[kBlock];
  float weight[kBlock], new_weight[kBlock];
  float state[kMaxSlots][kBlock], next[kMaxSlots][kBlock];
  float update[kLongBlock], root[kBlock];
  Note notes[kMaxSlots];
};

struct Block {
  int n;             // elements
  bool shorter;      // than those before it: what follows is another tensor
  const void* grad;  // at the block's first element
  Part weight;
  Part parts[kMaxSlots];
};

// Full statistics: everything is read back as the next step will read it.
void observe(const Tables& t, const Work& work, const Block& b, Arrays& a, const float* grad, const float* const* exact,
             double update_sq, double* sums) {
  const int slots = t.rule->slots;
  const float* stored[kMaxSlots];
  bool lossy = false;
  for (int s = 0; s < slots; s++) {
    const Codec& codec = *t.codecs[s];
    stored[s] = codec.load(b.parts[s], b.n, a.state[s]);
    lossy |= !codec.in_place;
    double* fields = sums + kTensorFields + s * kSlotFields;
    const auto sums_of = t.rule->second_moment[s] ? (codec.in_place ? slot_fields<true, false> : slot_fields<true>)
                                                  : (codec.in_place ? slot_fields<false, false> : slot_fields<false>);
    const float absmax = sums_of(exact[s], stored[s], b.n, fields);
    if (absmax <= codec.largest) continue;
    for (int start = 0; start < b.n; start += codec.block) {
      const int n = b.n - start < codec.block ? b.n - start : codec.block;
      fields[kSaturated] += saturated(exact[s] + start, n, codec.limit(b.parts[s], start / codec.block));
    }
  }
  if (lossy) {
    float* from_stored = a.new_weight;  // the weights are written already
    t.rule->update(stored, grad, b.n, work.scalars, from_stored);
    if (t.rule->again) t.rule->update(exact, grad, b.n, work.scalars, a.update);
    sums[kUpdateErrorSq] += squared_difference(a.update, from_stored, b.n);
  } else {
    sums[kUpdateErrorSq] += update_sq - update_sq;  // exact storage, but NaN - NaN is NaN
  }
  if (slots && !t.rule->second_moment[0]) sums[kMomentGrad] += product(exact[0], grad, b.n);
}

// How far ahead memory is asked for: so many bytes of all arrays together. Farther, and what was fetched is evicted
// before it is used; nearer, and it comes too late. (With 2 to 3 KiB AdamW takes 8 % longer with int8 and 3 % with
// bf16, SGD 14 %; with 8 KiB the plans with int8 take 3 to 5 % longer.)
constexpr int kAheadBytes = 6 * 1024;

int bits_of_element(const Tables& t) {
  int bits = 8 * t.grad->bytes + t.weight->bits;
  for (int s = 0; s < t.rule->slots; s++) bits += t.codecs[s]->bits;
  return bits;
}

Ahead ahead_of(const Tables& t, const Work& work, const Block& b) {
  Ahead ahead;
  const bool more = !b.shorter;
  const Tensor* next = work.following;
  const int distance = kAheadBytes * 8 / bits_of_element(t) / kPad * kPad;
  const auto stream = [&](int k, const void* block, const void* following, int bits) {
    const auto* from = static_cast<const char*>(block) + distance * bits / 8;
    ahead.at[k] = more ? from : static_cast<const char*>(next ? following : block);  // the last: nothing to ask for
  };
  stream(0, b.grad, work.following_grad, 8 * t.grad->bytes);
  stream(1, b.weight.values, next ? next->param : nullptr, t.weight->bits);
  for (int s = 0; s < t.rule->slots; s++)
    stream(2 + s, b.parts[s].values, next ? next->buffers[s][0] : nullptr, t.codecs[s]->bits);
  return ahead;
}

// New moments and weights, and all that is needed to store the moments.
HotSums advance(const Tables& t, const Work& work, const HotBlock& b, Arrays& a) {
  if (is_hot(t, work, b.n)) return t.hot->step(b, work.scalars);
  const int slots = t.rule->slots;
  HotSums found;
  const float* state[kMaxSlots];
  for (int s = 0; s < slots; s++) state[s] = t.codecs[s]->load(b.parts[s], b.n, a.state[s]);
  found.squares =
      t.rule->step(b.grad, b.weight, b.new_weight, state, b.next, b.n, work.scalars, b.keep, b.update, b.ahead);
  // Padding must not turn into anything: 0 / (0 + eps) is NaN when eps is 0.
  for (int i = b.n; i % kPad; i++)
    for (int s = 0; s < slots; s++) b.next[s][i] = 0;
  for (int s = slots - 1; s >= 0; s--)
    if (t.codecs[s]->prepare) t.codecs[s]->prepare(b.parts[s], b.n, b.next[s], &a.notes[s]);
  return found;
}

void step(const Tables& t, const Work& work, const Block& b, Arrays& a, double* sums) {
  const int slots = t.rule->slots;
  const float* grad = t.grad->load(b.grad, b.n, a.grad);
  if (work.zero) grad = without_nonfinite(grad, b.n, a.grad);
  const float* weight = t.weight->load(b.weight, b.n, a.weight);
  // Where the loops below cannot sum what concerns weights, the old one is still needed after the new one is known.
  const bool looped = t.weight->in_place && b.n % kPad == 0;
  float* new_weight = looped ? static_cast<float*>(b.weight.values) : a.new_weight;
  float* next[kMaxSlots];
  for (int s = 0; s < slots; s++) next[s] = t.codecs[s]->in_place ? static_cast<float*>(b.parts[s].values) : a.next[s];

  const Keep keep = work.full ? Keep::kAll : t.rule->again ? Keep::kUpdate : Keep::kNothing;
  const HotBlock block = {b.n,  b.parts,  grad,   weight,  new_weight,          next,
                          keep, a.update, a.root, a.notes, ahead_of(t, work, b)};
  const HotSums found = advance(t, work, block, a);
  const Squares& squares = found.squares;
  const double grad_sq = trustworthy(squares.grad) ? squares.grad : precise_squares(grad, b.n);
  sums[kGradSq] += grad_sq;
  if (!(grad_sq <= 1e300)) sums[kNonfinite] += static_cast<double>(nonfinite(grad, b.n));
  double update_sq = squares.update;
  for (int i = b.n; i % kPad; i++) {
    new_weight[i] = a.update[i] = 0;
    for (int s = 0; s < slots; s++) next[s][i] = 0;
  }
  if (!trustworthy(squares.update)) {
    if (!t.rule->again) t.rule->update(next, grad, b.n, work.scalars, a.update);
    update_sq = precise_squares(a.update, b.n);
  }
  sums[kUpdateSq] += update_sq;

  for (int s = 0; s < slots; s++) t.codecs[s]->store(b.parts[s], b.n, next[s], a.notes[s]);
  const float* stored = new_weight;
  if (work.full && looped) {
    sums[kWeightSq] += trustworthy(squares.weight) ? squares.weight : precise_squares(new_weight, b.n);
    sums[kUnchanged] += squares.unchanged;
  } else if (work.full && t.weight->in_place) {  // storing ends the old weight
    sums[kWeightSq] += weights(weight, stored, stored, b.n, sums + kUnchanged);
  }
  t.weight->store(b.weight, b.n, new_weight, a.notes[0]);
  if (!work.full) return;
  if (!t.weight->in_place) {
    stored = t.weight->load(b.weight, b.n, a.state[0]);  // the old state is not needed any more
    sums[kWeightSq] += weights(weight, stored, t.weight->stochastic ? new_weight : stored, b.n, sums + kUnchanged);
  }
  if (!(is_hot(t, work, b.n) && t.hot->observe && t.hot->observe(block, work.scalars, found, sums)))
    observe(t, work, b, a, grad, next, update_sq, sums);
}

// A block whose end is not a multiple of kPad works on padded copies, so that nothing past a tensor's end is touched.
void step_padded(const Tables& t, const Work& work, Block b, Arrays& a, double* sums) {
  alignas(64) char param[kBlock * 4], correction[kBlock * 2], grad[kBlock * 4], values[kMaxSlots][kBlock * 4];
  const auto copy = [&](char* to, const void* from, int bits) {
    const size_t bytes = static_cast<size_t>(bytes_of(b.n, bits));
    std::memcpy(to, from, bytes);
    std::memset(to + bytes, 0, static_cast<size_t>(bytes_of(padded_length(b.n), bits)) - bytes);
  };
  const auto copy_back = [&](void* to, const char* from, int bits) {
    std::memcpy(to, from, static_cast<size_t>(bytes_of(b.n, bits)));
  };
  const Block original = b;
  copy(param, b.weight.values, t.weight->bits);
  if (t.weight->correction) copy(correction, b.weight.correction, 8 * t.weight->correction);
  copy(grad, b.grad, 8 * t.grad->bytes);
  b.weight.values = param;
  b.weight.correction = correction;
  b.grad = grad;
  for (int s = 0; s < t.rule->slots; s++) {
    copy(values[s], b.parts[s].values, t.codecs[s]->bits);
    b.parts[s].values = values[s];
  }
  step(t, work, b, a, sums);
  copy_back(original.weight.values, param, t.weight->bits);
  if (t.weight->correction) copy_back(original.weight.correction, correction, 8 * t.weight->correction);
  for (int s = 0; s < t.rule->slots; s++) copy_back(original.parts[s].values, values[s], t.codecs[s]->bits);
}

// Whether every array of a plan is fp32 where it lies.
bool in_place(const Tables& t) {
  bool all = t.weight->in_place && t.grad->bytes == sizeof(float);
  for (int s = 0; s < t.rule->slots; s++) all &= t.codecs[s]->in_place;
  return all;
}

Key key_of(const Work& work, int slot) { return {work.keys[2 * slot], work.keys[2 * slot + 1]}; }

void run(const Tables& t, const Work& work) {
  Arrays arrays;
  const Tensor& tensor = *work.tensor;
  bool elementwise = true;
  for (int s = 0; s < t.rule->slots; s++) elementwise &= t.codecs[s]->block == kBlock;
  const int longest = in_place(t) && !work.zero ? kLongBlock : kBlock;
  Block b;
  for (int64_t first = work.start; first < work.stop; first += b.n) {
    b.n = static_cast<int>(work.stop - first < longest ? work.stop - first : longest);
    b.shorter = b.n < longest;
    // Copies for padding are for the last few elements only, where no codec minds another block.
    if (elementwise && b.n > kPad) b.n -= b.n % kPad;
    b.grad = work.grad + first * t.grad->bytes;
    const int slots = t.rule->slots;
    b.weight = {tensor.param + bytes_of(first, t.weight->bits), nullptr, first, key_of(work, slots),
                tensor.correction + first * t.weight->correction};
    for (int s = 0; s < slots; s++) {
      void* const* buffers = tensor.buffers[s];
      b.parts[s] = {static_cast<char*>(buffers[0]) + bytes_of(first, t.codecs[s]->bits), buffers, first,
                    key_of(work, s), nullptr};
    }
    if (b.n % kPad == 0)
      step(t, work, b, arrays, work.sums);
    else
      step_padded(t, work, b, arrays, work.sums);
  }
}

}  // namespace

extern const Isa isa;
const Isa isa = {OPTWATCH_ISA_NAME, find_rule, find_codec, find_type, find_hot,
                 sum_gradients,     sum_norms, sum_state,  run};

}  // namespace optwatch::OPTWATCH_ISA
