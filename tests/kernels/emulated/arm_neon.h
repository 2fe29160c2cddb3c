// What the kernels use of Arm's <arm_neon.h>, in plain loops.
#pragma once

#include <cmath>
#include <cstdint>

typedef float float32x4_t __attribute__((vector_size(16)));
typedef int32_t int32x4_t __attribute__((vector_size(16)));

inline float32x4_t vfmaq_f32(float32x4_t a, float32x4_t b, float32x4_t c) {
  for (int i = 0; i < 4; i++) a[i] = __builtin_fmaf(b[i], c[i], a[i]);
  return a;
}

inline float32x4_t vsqrtq_f32(float32x4_t a) {
  for (int i = 0; i < 4; i++) a[i] = std::sqrt(a[i]);
  return a;
}

// To the nearest integer, of two the even one; cut off where it does not fit, and 0 for NaN.
inline int32x4_t vcvtnq_s32_f32(float32x4_t a) {
  int32x4_t r;
  for (int i = 0; i < 4; i++) {
    const float x = std::nearbyint(a[i]);
    r[i] = x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : x == x ? static_cast<int32_t>(x) : 0;
  }
  return r;
}
