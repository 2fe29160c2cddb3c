// Plain fp32: the step works on the storage itself.
#pragma once

#include "optwatch/kernels/cpu/simd.h"
#include "optwatch/kernels/cpu/tables.h"

namespace optwatch::OPTWATCH_ISA {

inline const float* fp32_load(const Part& part, int, float*) { return static_cast<const float*>(part.values); }
inline void fp32_store(const Part&, int, const float*, const Note&) {}
inline float fp32_limit(const Part&, int) { return __builtin_inff(); }

constexpr Codec codecs_fp32[] = {
    {"fp32", 32, 1, kBlock, true, fp32_load, nullptr, fp32_store, __builtin_inff(), fp32_limit}};

}  // namespace optwatch::OPTWATCH_ISA
