// What the pieces of a plan look like to the driver: tables of plain functions, one table for each codec, rule and
// element type, compiled once for every instruction set. A plan is bound by picking tables, so the library grows with
// the sum of codecs and rules, not with their product.
#pragma once

#include <cstdint>

namespace optwatch {

// Elements that are worked on together. A block's fp32 arrays stay in the first-level cache, and every codec's own
// block divides it, so that no scale is shared by two blocks.
constexpr int kBlock = 512;
// The same where nothing needs arrays of its own, everything being fp32 where it lies: a block costs some 30 ns by
// itself, which is a third of what SGD does with 512 elements.
constexpr int kLongBlock = 4 * kBlock;
constexpr int kMaxSlots = 4;
constexpr int kMaxBuffers = 4;
constexpr int kMaxNorms = 2;
// Arrays are padded to this many elements, with zeros in what is loaded, so that loops over vectors need no scalar
// remainder on any processor.
constexpr int kPad = 16;
constexpr int padded_length(int n) { return (n + kPad - 1) / kPad * kPad; }

struct Key {
  uint32_t k0, k1;  // of (seed, parameter, slot, step), see optwatch/kernels/random.py
};

constexpr int kLine = 64;  // bytes that come from memory at once

constexpr int64_t bytes_of(int64_t elements, int bits) { return (elements * bits + 7) / 8; }

// Where one block of a slot, or of the weight, lives.
struct Part {
  void* values;          // the primary buffer, at the block's first element
  void* const* buffers;  // every buffer of the tensor from its start, as the codec lists them
  int64_t first;         // the block's first element in the flat tensor, a multiple of kBlock
  Key key;
  void* correction;  // of the weight: what a split format keeps beside it, at the block's first element
};

// Room for what a codec finds out about the sub-blocks of a block; aligned for any of its types.
struct alignas(64) Note {
  char bytes[128];
  float each[kBlock];  // and of every element
};

// How a slot, or the weight, is stored. `n` is at most kBlock; arrays may be read and written up to the next multiple
// of kPad.
struct Codec {
  const char* name;
  int bits;       // per element of the primary buffer: 4, with the even element in the lower half, 8, 16 or 32
  int buffers;    // how many buffers a tensor has
  int block;      // elements that share a limit
  bool in_place;  // the primary buffer holds the fp32 values themselves: load and store have nothing to do
  const float* (*load)(const Part&, int n, float* scratch);
  // Storing is in two parts: what concerns whole sub-blocks (scales) and what concerns elements. The driver prepares
  // all slots before it stores the first, so that the long chain of a reduction overlaps with other work. `note` is
  // what one hands to the other. May be null.
  void (*prepare)(const Part&, int n, const float* exact, Note* note);
  void (*store)(const Part&, int n, const float* exact, const Note& note);
  float largest;  // what any block can hold, as long as its scales are free to grow
  // The largest magnitude that sub-block `index` of the block, as stored, can hold; infinity where nothing is cut off.
  float (*limit)(const Part&, int index);
  // Of a weight's codec:
  int correction = 0;       // bytes per element of what it keeps beside the parameter
  bool stochastic = false;  // whether a weight that stayed as it was might have moved
};

// Memory that is asked for while a block is worked on: of the gradient, the weight and the slots, somewhat ahead. A
// block in the first-level cache tells the processor nothing of the next one, so the loop over it asks, a little at a
// time: all at once there would be more requests than a core can have under way.
struct Ahead {
  const char* at[2 + kMaxSlots];

  // Beside element i, of the streams [first, last): as if an element had four bytes, which takes no counter of its own.
  // Where it has fewer, the end of one block asks for what the next would.
  template <int first, int last>
  inline __attribute__((always_inline)) void ask(int i) const {
    for (int k = first; k < last; k++) __builtin_prefetch(reinterpret_cast<const float*>(at[k]) + i, 1);
  }
  // Of elements of a byte each, so many of them from element i on.
  template <int first, int last, int elements>
  inline __attribute__((always_inline)) void ask_bytes(int i) const {
    for (int k = first; k < last; k++)
      for (int line = 0; line < elements; line += kLine) __builtin_prefetch(at[k] + i + line, 1);
  }
};

// What the loop over a block leaves besides new state and weights.
enum class Keep {
  kNothing,
  kUpdate,  // what was subtracted from the weights
  kAll,     // that, and the sums that concern weights
};

// Sums over one block, in fp32: of squares, and how many weights stayed as they were. The last two with Keep::kAll.
struct Squares {
  float grad, update, weight = 0;
  int unchanged = 0;
};

// One block as a specialised plan sees it; arrays may be read and written up to the next multiple of kPad.
struct HotBlock {
  int n;
  const Part* parts;  // [slots]
  const float *grad, *weight;
  float* new_weight;   // may alias `weight`
  float* const* next;  // [slots], the new state
  Keep keep;
  float* update;  // what is subtracted, as far as it is kept
  float* root;    // of the second moment in the denominator, for `observe`, with Keep::kAll
  Note* notes;    // [slots], for the codecs' store
  Ahead ahead;
};

struct HotSums {
  Squares squares;
  float absmax[kMaxSlots];  // of the new state; infinity or NaN if anything is. For `observe`
};

// A loop of its own for a rule with certain codecs.
struct Hot {
  bool (*fits)(const float* scalars, int n);
  // What the codecs' loads, the rule's step and the codecs' preparations do together; null if there is no such loop.
  HotSums (*step)(const HotBlock&, const float* scalars);
  // After the new state was stored: adds everything but the cheap sums and what concerns weights. Returns false, and
  // adds nothing, where that needs more care than a sum in fp32 takes. May be null.
  bool (*observe)(const HotBlock&, const float* scalars, const HotSums&, double* sums);
};

// The mathematics of an optimizer on fp32 values.
struct Rule {
  const char* name;
  int slots;
  int scalars;
  bool second_moment[kMaxSlots];
  // New state and weights; returns the sums, and writes u as far as it is kept. `next` may alias `state`,
  // `w_new` may alias `w`.
  Squares (*step)(const float* g, const float* w, float* w_new, const float* const* state, float* const* next, int n,
                  const float* scalars, Keep keep, float* u, const Ahead&);
  // What is subtracted from the weight, from the new state.
  void (*update)(const float* const* state, const float* g, int n, const float* scalars, float* u);
  // Whether `update` of the new state is not what `step` gave: then what `step` gave is kept in every step, and an
  // error of the update is the difference of two results of `update`.
  bool again;
  Hot bytes;  // for int8 in every slot
  // Of a rule that needs norms of whole tensors before its step: what they are norms of. Stores nothing.
  int norms;
  void (*measure)(const float* g, const float* w, const float* const* state, int n, const float* scalars,
                  float (*values)[kBlock]);
};

// An element type of gradients.
struct Type {
  const char* name;
  int bytes;
  const float* (*load)(const void* values, int n, float* scratch);
};

// The columns of a row, in the order of optwatch/metrics/fields.py.
enum TensorField { kGradSq, kNonfinite, kUpdateSq, kUpdateErrorSq, kWeightSq, kMomentGrad, kUnchanged, kTensorFields };
enum SlotField { kErrorSq, kExactSq, kSum, kAbsMax, kUnderflow, kSaturated, kSlotFields };
// What a first pass sums of the gradients of a tensor, in the order of optwatch/kernels/plan.py.
enum GradField { kGivenSq, kNonfiniteCount, kFiniteSq, kGradFields };
constexpr int kCheapFields = kUpdateSq + 1;
constexpr int kMaxFields = kTensorFields + kMaxSlots * kSlotFields;

constexpr int columns(int slots) { return kTensorFields + slots * kSlotFields; }

// One tensor of a bound plan.
struct Tensor {
  int64_t numel;
  char* param;
  char* correction;  // or null
  void* buffers[kMaxSlots][kMaxBuffers];
};

struct Tables {
  const Rule* rule;
  const Codec* codecs[kMaxSlots];
  const Codec* weight;
  const Type* grad;
  const Hot* hot;  // or null
  // Of a plan for another's optimizer, which only reads: the rule that its update follows from, or null, and the
  // plan's slots in the order of that rule's.
  const Rule* stepped_by;
  int order[kMaxSlots];
};

// Elements [start, stop) of a tensor; start is a multiple of kBlock. `sums` holds as many zeros as the pass has
// sums.
struct Work {
  const Tensor* tensor;
  const char* grad;
  const float* scalars;
  const uint32_t* keys;  // [slots + 1][2], the last one the weight's
  int64_t start, stop;
  bool full;
  bool zero;  // a gradient that is not finite counts as zero
  double* sums;
  const Tensor* following;     // what the thread works on next, from its first element on; or null
  const char* following_grad;  // its gradient
};

// What one instruction set provides.
struct Isa {
  const char* name;
  const Rule* (*rule)(const char* name);
  const Codec* (*codec)(const char* name);
  const Type* (*type)(const char* name);
  const Hot* (*hot)(const Rule& rule, const Codec* const* codecs);
  // The passes over a work item: those that only read and sum, and the step.
  void (*gradients)(const Tables&, const Work&);
  void (*norms)(const Tables&, const Work&);
  void (*state)(const Tables&, const Work&);
  void (*run)(const Tables&, const Work&);
};

}  // namespace optwatch
