// The element types of parameters and gradients.
#pragma once

#include "bf16.h"
#include "tables.h"

namespace optwatch::OPTWATCH_ISA {

inline const float* float32_load(const void* values, int, float*) { return static_cast<const float*>(values); }
inline void float32_store(void* values, int n, const float* exact) {
  if (values == exact) return;
  for (int i = 0; i < n; i += kWidth) store(static_cast<float*>(values) + i, load(exact + i));
}

inline const float* bfloat16_load(const void* values, int n, float* scratch) { return widen(values, n, scratch); }
inline void bfloat16_store(void* values, int n, const float* exact) {
  uint16_t* out = static_cast<uint16_t*>(values);
  for (int i = 0; i < n; i += kWidth) store_narrow(out + i, to_nearest_bf16(load_bits(exact + i)));
}

constexpr Type kTypes[] = {
    {"float32", 4, true, float32_load, float32_store},
    {"bfloat16", 2, false, bfloat16_load, bfloat16_store},
};

}  // namespace optwatch::OPTWATCH_ISA
