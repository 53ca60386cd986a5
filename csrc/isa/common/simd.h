// Arithmetic on the vectors of an instruction set, whose vectors.h comes before this: one source serves AVX-512, AVX2
// and whatever the baseline is.
#pragma once

#include "vector_types.h"

namespace olmoe {
namespace {  // every instruction set has its own copy: nothing here may be shared between object files

// Prefetch bytes that are needed next into the second-level cache, before the hardware recognises the access pattern.
inline void fetch_ahead(const void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)address + i, 0, 2);
}

// a * b + c of single numbers, rounded once where the CPU can. Whether the compiler makes one instruction of the
// expression depends on what is around it, and so would the result.
OLMOE_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// The same of vectors.
OLMOE_INLINE vf multiply_add(vf a, vf b, vf c) {
  vf out;
  for (int i = 0; i < W; i++) out[i] = multiply_add(a[i], b[i], c[i]);
  return out;
}

OLMOE_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
OLMOE_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

// A vector of N floats.
template <int N>
struct Floats {
  typedef float type __attribute__((vector_size(N * 4)));
};
// The largest of N floats, by halves.
template <int N = W>
OLMOE_INLINE float max_of(typename Floats<N>::type v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    typename Floats<N / 2>::type halves[2];
    std::memcpy(halves, &v, sizeof v);
    return max_of<N / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
  }
}

OLMOE_INLINE vf load_bf16(const uint16_t* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vi) << 16);
}

inline uint16_t float_to_bf16(float x) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float bf16_to_float(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// As float_to_bf16, W at a time.
OLMOE_INLINE void store_bf16(uint16_t* p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
  const vh h = __builtin_convertvector((v == v ? rounded : quiet) >> 16, vh);
  std::memcpy(p, &h, sizeof h);
}

template <Type T>
OLMOE_INLINE vf load_as(const void* p, size_t i) {
  if constexpr (T == Type::kF32) return load((const float*)p + i);
  if constexpr (T == Type::kBF16) return load_bf16((const uint16_t*)p + i);
  if constexpr (T == Type::kF16) return load_f16((const uint16_t*)p + i);
  if constexpr (T == Type::kI8) return load_i8((const int8_t*)p + i);
}
template <Type T>
OLMOE_INLINE float scalar_as(const void* p, size_t i) {
  if constexpr (T == Type::kF32) return ((const float*)p)[i];
  if constexpr (T == Type::kBF16) return bf16_to_float(((const uint16_t*)p)[i]);
  if constexpr (T == Type::kF16) return half_to_float(((const uint16_t*)p)[i]);
  if constexpr (T == Type::kI8) return ((const int8_t*)p)[i];
}

// e^x to about 2 units in the last place: x = n ln 2 + r, a Taylor polynomial in r, n added to the exponent.
OLMOE_INLINE vf vexp(vf x) {
  const vf limit = splat(88.0f);
  vf under = splat(-87.0f);
  vi tiny = x < under;
  vf clamped = vmax(vmin(x, limit), under);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  vf shifted = clamped * 1.44269504f + magic;
  vf n = shifted - magic;
  vf r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  vf y = p * (vf)exponent;
  vf result = tiny ? vf{} : y;
  return x == x ? result : x;  // NaN stays NaN
}

inline float exp_one(float x) { return vexp(splat(x))[0]; }

}  // namespace
}  // namespace olmoe
