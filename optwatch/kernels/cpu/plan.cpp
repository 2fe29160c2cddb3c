// Plans: a table of tensors cut into work items, run by however many threads; and the C interface to them.
//
// Compiled for the oldest processor supported: nothing here may be compiled with an instruction set's flags.
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "driver.h"
#include "tables.h"

// Raised with every change of the functions below, so that the driver can refuse a library of another version.
#define OPTWATCH_ABI 5

// OpenMP's entry point. It is not linked: it resolves at load time to the copy that torch brought, so that a process
// has one runtime and one set of threads. Where there is none, plans run on the calling thread.
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags) __attribute__((weak));

namespace optwatch {

#if defined(__x86_64__)
namespace avx512 {
extern const Isa isa;
}
namespace avx2 {
extern const Isa isa;
}
namespace baseline {
extern const Isa isa;
}
#elif defined(__aarch64__)
namespace neon {
extern const Isa isa;
}
#else
namespace baseline {
extern const Isa isa;
}
#endif

namespace {

// What this processor runs, best first.
const std::vector<const Isa*>& supported() {
  static const std::vector<const Isa*> found = [] {
    std::vector<const Isa*> isas;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      isas.push_back(&avx512::isa);
    if (fma) isas.push_back(&avx2::isa);
    isas.push_back(&baseline::isa);
#elif defined(__aarch64__)
    isas.push_back(&neon::isa);
#else
    isas.push_back(&baseline::isa);
#endif
    return isas;
  }();
  return found;
}

// Elements of a work item. Small ones keep many threads busy to the end; but in each the first blocks come without
// having been asked for (8 % longer with 32 Ki throughout), so a plan of many elements has larger ones. A tensor has at
// most kMaxItems, so that partial sums stay small beside it.
constexpr int64_t kSmallItem = 32 * 1024, kLargeItem = 256 * 1024;
constexpr int64_t kItems = 128;  // of a plan in between
constexpr int64_t kMaxItems = 1024;

struct Item {
  int64_t tensor, start, stop;
};

struct Plan {
  Tables tables = {};
  Rule shape = {};  // of a plan that only reads: its slots
  const Isa* isa;
  std::vector<Tensor> tensors;
  std::vector<Item> items;       // in the order of the tensors
  std::vector<int64_t> batches;  // first item of each; small tensors share a batch. The last entry is their end.
  std::vector<double> sums;      // [items][columns]
};

void cut_into_items(Plan* plan) {
  int64_t elements = 0;
  for (const Tensor& tensor : plan->tensors) elements += tensor.numel;
  const int64_t item = std::min(std::max(elements / kItems, kSmallItem), kLargeItem);
  int64_t in_batch = item;
  for (size_t t = 0; t < plan->tensors.size(); t++) {
    const int64_t numel = plan->tensors[t].numel;
    int64_t length = std::max(item, (numel + kMaxItems - 1) / kMaxItems);
    length = (length + kBlock - 1) / kBlock * kBlock;
    for (int64_t start = 0; start < numel; start += length) {
      const int64_t stop = std::min(numel, start + length);
      if (in_batch >= item) {
        plan->batches.push_back(static_cast<int64_t>(plan->items.size()));
        in_batch = 0;
      }
      plan->items.push_back({static_cast<int64_t>(t), start, stop});
      in_batch += stop - start + kBlock;  // something for the item itself
    }
  }
  plan->batches.push_back(static_cast<int64_t>(plan->items.size()));
}

// What the tensors of a plan are kept in, by name.
struct Formats {
  const char* const* codecs;
  const char* weight;
  const char* grad_type;
};

// Where they are, see optwatch_cpu_bind; `corrections` may be null.
struct Addresses {
  int64_t n;
  const int64_t* numel;
  const uint64_t *params, *corrections, *buffers;
};

// Fills in all but the rule, which is there.
void fill(Plan* plan, const Formats& formats, const Addresses& of) {
  Tables& tables = plan->tables;
  tables.weight = plan->isa->codec(formats.weight);
  tables.grad = plan->isa->type(formats.grad_type);
  const int slots = tables.rule->slots;
  for (int s = 0; s < slots; s++) tables.codecs[s] = plan->isa->codec(formats.codecs[s]);
  plan->tensors.resize(static_cast<size_t>(of.n));
  const uint64_t* buffer = of.buffers;
  for (size_t t = 0; t < plan->tensors.size(); t++) {
    Tensor& tensor = plan->tensors[t];
    tensor.numel = of.numel[t];
    tensor.param = reinterpret_cast<char*>(of.params[t]);
    tensor.correction = of.corrections ? reinterpret_cast<char*>(of.corrections[t]) : nullptr;
    for (int s = 0; s < slots; s++)
      for (int b = 0; b < kMaxBuffers; b++) tensor.buffers[s][b] = reinterpret_cast<void*>(*buffer++);
  }
  cut_into_items(plan);
  plan->sums.resize(plan->items.size() * static_cast<size_t>(columns(slots)));
}

// A pass over all work items.
struct Pass {
  Plan* plan;
  void (*run)(const Tables&, const Work&);
  int used;   // sums of an item that are kept
  int width;  // columns of a row
  const uint64_t* grads;
  const float* scalars;
  const uint32_t* keys;
  bool full;
  bool zero;
  std::atomic<int64_t> next_batch{0};
};

void run_item(const Pass& pass, size_t index, size_t end) {
  Plan& plan = *pass.plan;
  const Item& item = plan.items[index];
  const uint64_t grad = pass.grads[item.tensor];
  if (!grad) return;
  const int slots = plan.tables.rule->slots;
  double sums[kMaxFields] = {};
  Work work;
  work.tensor = &plan.tensors[static_cast<size_t>(item.tensor)];
  work.grad = reinterpret_cast<const char*>(grad);
  work.scalars = pass.scalars ? pass.scalars + item.tensor * plan.tables.rule->scalars : nullptr;
  work.keys = pass.keys ? pass.keys + item.tensor * (slots + 1) * 2 : nullptr;
  work.start = item.start;
  work.stop = item.stop;
  work.full = pass.full;
  work.zero = pass.zero;
  work.sums = sums;
  work.following = nullptr;
  if (index + 1 < end && plan.items[index + 1].start == 0) {
    work.following = &plan.tensors[static_cast<size_t>(plan.items[index + 1].tensor)];
    work.following_grad = reinterpret_cast<const char*>(pass.grads[plan.items[index + 1].tensor]);
  }
  pass.run(plan.tables, work);
  const size_t used = static_cast<size_t>(pass.used);
  std::memcpy(plan.sums.data() + index * used, sums, used * sizeof(double));
}

// Each thread takes the next batch until none is left. Which thread ran an item leaves no trace in the result.
void run_batches(void* argument) {
  Pass& pass = *static_cast<Pass*>(argument);
  const std::vector<int64_t>& batches = pass.plan->batches;
  const int64_t count = static_cast<int64_t>(batches.size()) - 1;
  for (int64_t b; (b = pass.next_batch.fetch_add(1, std::memory_order_relaxed)) < count;)
    for (int64_t i = batches[b]; i < batches[b + 1]; i++)
      run_item(pass, static_cast<size_t>(i), static_cast<size_t>(batches[b + 1]));
}

// Adds the items to rows of their tensors, always in the same order.
void fold(const Pass& pass, double* rows) {
  const Plan& plan = *pass.plan;
  const int used = pass.used, width = pass.width;
  std::memset(rows, 0, plan.tensors.size() * static_cast<size_t>(width) * sizeof(double));
  for (size_t i = 0; i < plan.items.size(); i++) {
    const int64_t tensor = plan.items[i].tensor;
    if (!pass.grads[tensor]) continue;
    const double* sums = plan.sums.data() + i * static_cast<size_t>(used);
    double* row = rows + tensor * width;
    for (int f = 0; f < used; f++) {
      const bool maximum = f >= kTensorFields && (f - kTensorFields) % kSlotFields == kAbsMax;
      if (!maximum)
        row[f] += sums[f];
      else if (!(sums[f] <= row[f]) && row[f] == row[f])
        row[f] = sums[f];
    }
  }
}

const pid_t loaded_by = getpid();

// Runs a pass with at most so many threads and folds its sums to rows.
void run_all(Pass* pass, int threads, double* rows) {
  in_parallel(run_batches, pass, threads, pass->plan->batches.size() - 1);
  fold(*pass, rows);
}

}  // namespace

const Isa* find_isa(const char* name) {
  for (const Isa* isa : supported())
    if (!std::strcmp(isa->name, name)) return isa;
  return nullptr;
}

void in_parallel(void (*work)(void*), void* argument, int threads, size_t parts) {
  // The runtime's threads do not survive a fork, and waiting for them would hang. Fewer threads than asked for are
  // never used: the runtime would end the others, and starting them again costs more than they would do here.
  if (threads <= 1 || parts <= 1 || !GOMP_parallel || getpid() != loaded_by)
    work(argument);
  else
    GOMP_parallel(work, argument, static_cast<unsigned>(threads), 0);
}

}  // namespace optwatch

using optwatch::Plan;

OPTWATCH_API int optwatch_cpu_abi() { return OPTWATCH_ABI; }

OPTWATCH_API int optwatch_cpu_has_threads() { return GOMP_parallel != nullptr; }

// The name of the instruction set at `index` of those this processor runs, best first; null after the last.
OPTWATCH_API const char* optwatch_cpu_isa(int index) {
  const auto& isas = optwatch::supported();
  return index >= 0 && static_cast<size_t>(index) < isas.size() ? isas[static_cast<size_t>(index)]->name : nullptr;
}

OPTWATCH_API int optwatch_cpu_has_rule(const char* isa, const char* name) {
  return optwatch::find_isa(isa)->rule(name) != nullptr;
}

OPTWATCH_API int optwatch_cpu_has_codec(const char* isa, const char* name) {
  return optwatch::find_isa(isa)->codec(name) != nullptr;
}

OPTWATCH_API int optwatch_cpu_has_type(const char* isa, const char* name) {
  return optwatch::find_isa(isa)->type(name) != nullptr;
}

// Prepares a plan. Every name must be one that the functions above know.
OPTWATCH_API void* optwatch_cpu_bind(const char* isa,            // instruction set
                                     const char* rule,           // its number of slots is that of `codecs`
                                     const char* const* codecs,  // [slots]
                                     const char* weight,         // the parameters' codec
                                     const char* grad_type,
                                     int64_t n,                    // tensors
                                     const int64_t* numel,         // [n]
                                     const uint64_t* params,       // [n] addresses
                                     const uint64_t* corrections,  // [n] addresses, 0 where the codec has none
                                     const uint64_t* buffers       // [n][slots][kMaxBuffers] addresses
) {
  using namespace optwatch;
  Plan* plan = new Plan;
  plan->isa = find_isa(isa);
  plan->tables.rule = plan->isa->rule(rule);
  fill(plan, {codecs, weight, grad_type}, {n, numel, params, corrections, buffers});
  plan->tables.hot = plan->isa->hot(*plan->tables.rule, plan->tables.codecs);
  return plan;
}

// Prepares a plan that only reads: for the state of another's optimizer. Its weights are kept as they are.
OPTWATCH_API void* optwatch_cpu_bind_state(const char* isa,
                                           const char* rule,  // that the update follows from, or null
                                           const int* order,  // [rule's slots], which of the slots each is
                                           int slots,
                                           const int* second_moment,   // [slots], whether it is one
                                           const char* const* codecs,  // [slots], also those of foreign.h
                                           const char* weight, const char* grad_type, int64_t n, const int64_t* numel,
                                           const uint64_t* params, const uint64_t* buffers) {
  using namespace optwatch;
  Plan* plan = new Plan;
  plan->isa = find_isa(isa);
  plan->shape.slots = slots;
  for (int s = 0; s < slots; s++) plan->shape.second_moment[s] = second_moment[s] != 0;
  plan->tables.rule = &plan->shape;
  if (rule) {
    plan->tables.stepped_by = plan->isa->rule(rule);
    plan->shape.scalars = plan->tables.stepped_by->scalars;
    std::copy(order, order + plan->tables.stepped_by->slots, plan->tables.order);
  }
  fill(plan, {codecs, weight, grad_type}, {n, numel, params, nullptr, buffers});
  return plan;
}

// The passes before a step: GradField of each tensor, and the squares of what its rule measures.
OPTWATCH_API void optwatch_cpu_run_gradients(void* bound,            // from optwatch_cpu_bind
                                             const uint64_t* grads,  // [n] addresses, 0 leaves the tensor alone
                                             int threads,            // at most this many
                                             double* rows            // [n][kGradFields], written
) {
  using namespace optwatch;
  Plan* plan = static_cast<Plan*>(bound);
  Pass pass = {plan, plan->isa->gradients, kGradFields, kGradFields, grads, nullptr, nullptr, false, false};
  run_all(&pass, threads, rows);
}

OPTWATCH_API void optwatch_cpu_run_norms(void* bound,            // from optwatch_cpu_bind
                                         const uint64_t* grads,  // [n] addresses, 0 leaves the tensor alone
                                         const float* scalars,   // [n][rule's scalars]
                                         int zero,               // whether gradients that are not finite count as zero
                                         int threads,            // at most this many
                                         double* rows            // [n][norms], written
) {
  using namespace optwatch;
  Plan* plan = static_cast<Plan*>(bound);
  const int norms = plan->tables.rule->norms;
  Pass pass = {plan, plan->isa->norms, norms, norms, grads, scalars, nullptr, false, zero != 0};
  run_all(&pass, threads, rows);
}

// After a step of another's optimizer: the fields of a full row that follow from what it left.
OPTWATCH_API void optwatch_cpu_run_state(void* bound,            // from optwatch_cpu_bind_state
                                         const uint64_t* grads,  // [n] addresses
                                         const float* scalars,   // [n][rule's scalars], null without a rule
                                         int threads,            // at most this many
                                         double* rows            // [n][columns], written
) {
  using namespace optwatch;
  Plan* plan = static_cast<Plan*>(bound);
  const int width = columns(plan->tables.rule->slots);
  Pass pass = {plan, plan->isa->state, width, width, grads, scalars, nullptr, true, false};
  run_all(&pass, threads, rows);
}

OPTWATCH_API void optwatch_cpu_run(void* bound,            // from optwatch_cpu_bind
                                   const uint64_t* grads,  // [n] addresses, 0 leaves the tensor alone
                                   const float* scalars,   // [n][rule's scalars]
                                   const uint32_t* keys,   // [n][slots + 1][2]
                                   int full,               // whether to sum every field
                                   int zero,               // whether gradients that are not finite count as zero
                                   int threads,            // at most this many
                                   double* rows            // [n][columns], written
) {
  using namespace optwatch;
  Plan* plan = static_cast<Plan*>(bound);
  const int width = columns(plan->tables.rule->slots);
  Pass pass = {plan, plan->isa->run, full ? width : kCheapFields, width, grads, scalars, keys, full != 0, zero != 0};
  run_all(&pass, threads, rows);
}

OPTWATCH_API void optwatch_cpu_free(void* bound) { delete static_cast<Plan*>(bound); }
