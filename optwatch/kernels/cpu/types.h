// The element types of gradients.
#pragma once

#include "bf16.h"
#include "tables.h"

namespace optwatch::OPTWATCH_ISA {

inline const float* float32_load(const void* values, int, float*) { return static_cast<const float*>(values); }
inline const float* bfloat16_load(const void* values, int n, float* scratch) { return widen(values, n, scratch); }

constexpr Type kTypes[] = {
    {"float32", 4, float32_load},
    {"bfloat16", 2, bfloat16_load},
};

}  // namespace optwatch::OPTWATCH_ISA
