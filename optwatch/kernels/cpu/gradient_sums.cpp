// Sums over any tensors, bound to no plan: the gradients of optimizers that are not ours.
//
// Compiled for the oldest processor supported, like plan.cpp.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "driver.h"

namespace optwatch {
namespace {

// Elements of a work item. Tensors that are smaller share one.
constexpr int64_t kItem = 64 * 1024;

struct Item {
  int64_t tensor, start, stop;
};

struct Sums {
  const Isa* isa;
  Tables tables;
  const uint64_t* addresses;
  std::vector<Item> items;       // in the order of the tensors
  std::vector<size_t> batches;   // first item of each, and the end of the last
  std::vector<double> partials;  // [items][kGradFields]
  std::atomic<size_t> next{0};
};

void cut(Sums* sums, int64_t n, const int64_t* numel) {
  int64_t in_batch = kItem;
  for (int64_t t = 0; t < n; t++) {
    for (int64_t start = 0; start < numel[t]; start += kItem) {
      const int64_t stop = std::min(numel[t], start + kItem);
      if (in_batch >= kItem) {
        sums->batches.push_back(sums->items.size());
        in_batch = 0;
      }
      sums->items.push_back({t, start, stop});
      in_batch += stop - start + kBlock;  // something for the item itself
    }
  }
  sums->batches.push_back(sums->items.size());
  sums->partials.resize(sums->items.size() * kGradFields);
}

void run(void* argument) {
  Sums& sums = *static_cast<Sums*>(argument);
  for (size_t b; (b = sums.next.fetch_add(1, std::memory_order_relaxed)) + 1 < sums.batches.size();)
    for (size_t i = sums.batches[b]; i < sums.batches[b + 1]; i++) {
      Work work = {};
      work.grad = reinterpret_cast<const char*>(sums.addresses[sums.items[i].tensor]);
      work.start = sums.items[i].start;
      work.stop = sums.items[i].stop;
      work.sums = sums.partials.data() + i * kGradFields;
      sums.isa->gradients(sums.tables, work);
    }
}

}  // namespace
}  // namespace optwatch

// GradField of each tensor. The type must be one that optwatch_cpu_has_type knows.
OPTWATCH_API void optwatch_cpu_gradient_sums(const char* isa,            // instruction set
                                             const char* type,           // of the elements
                                             int64_t n,                  // tensors
                                             const uint64_t* addresses,  // [n]
                                             const int64_t* numel,       // [n]
                                             int threads,                // at most this many
                                             double* rows                // [n][kGradFields], written
) {
  using namespace optwatch;
  Sums sums = {};
  sums.isa = find_isa(isa);
  sums.tables.grad = sums.isa->type(type);
  sums.addresses = addresses;
  cut(&sums, n, numel);
  in_parallel(run, &sums, threads, sums.batches.size() - 1);
  std::memset(rows, 0, static_cast<size_t>(n) * kGradFields * sizeof(double));
  // Always in the same order, whichever thread summed what.
  for (size_t i = 0; i < sums.items.size(); i++)
    for (int f = 0; f < kGradFields; f++)
      rows[sums.items[i].tensor * kGradFields + f] += sums.partials[i * kGradFields + static_cast<size_t>(f)];
}
