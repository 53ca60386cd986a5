// Vectors of W floats, which the including file has chosen (isa/*/vectors.h), through the compiler's own vector types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../core/types.h"

namespace olmoe {
namespace {  // every instruction set has its own copy: nothing here may be shared between object files

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float v4 __attribute__((vector_size(16)));

#define OLMOE_INLINE inline __attribute__((always_inline))

OLMOE_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
OLMOE_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
OLMOE_INLINE vf splat(float x) { return vf{} + x; }

}  // namespace
}  // namespace olmoe
