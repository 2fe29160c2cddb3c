// Formats that only others' optimizers keep: they can be read and not written, so no plan that steps may name one.
#pragma once

#include "mathematics.h"
#include "tables.h"

namespace optwatch::OPTWATCH_ISA {

// A byte an element, a table of the 256 values that bytes stand for, and a factor for every 256 elements: the buffers
// are codes, factors and table.
constexpr int kTableBlock = 256;

inline const float* table_load(const Part& part, int n, float* scratch) {
  const uint8_t* codes = static_cast<const uint8_t*>(part.values);
  const float* scales = static_cast<const float*>(part.buffers[1]) + part.first / kTableBlock;
  const float* table = static_cast<const float*>(part.buffers[2]);
  for (int i = 0; i < n; i++) scratch[i] = table[codes[i]] * scales[i / kTableBlock];
  for (int i = n; i % kPad; i++) scratch[i] = 0;
  return scratch;
}

constexpr Codec kForeignCodecs[] = {
    {"table8", 8, 3, kTableBlock, false, table_load, nullptr, nullptr, __builtin_inff(), nullptr}};

}  // namespace optwatch::OPTWATCH_ISA
