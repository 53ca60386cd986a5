// Vectors of W floats for the instruction set that this file is compiled for, through the compiler's own vector
// types: one source serves AVX-512, AVX2 and whatever the baseline is. Only what those types cannot say is written
// with intrinsics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../core/types.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace olmoe {
namespace {  // every instruction set has its own copy: nothing here may be shared between object files

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

#define OLMOE_INLINE inline __attribute__((always_inline))

// Fetch some bytes into the second cache: what is looked at next, before the hardware notices what is being read.
inline void fetch_ahead(const void* place, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)place + i, 0, 2);
}

OLMOE_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
OLMOE_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
OLMOE_INLINE vf splat(float x) { return vf{} + x; }

OLMOE_INLINE float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 h = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
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

OLMOE_INLINE float max_of(vf v) {
  float m = v[0];
  for (int i = 1; i < W; i++) m = v[i] > m ? v[i] : m;
  return m;
}

OLMOE_INLINE vf load_bf16(const uint16_t* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vi) << 16);
}

inline float half_to_float(uint16_t h) {
#if defined(__AVX2__)
  return _cvtsh_ss(h);
#else
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {  // zero or subnormal: mantissa * 2^-24
    float f = float(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

inline uint16_t float_to_half(float x) {  // round to nearest even
#if defined(__AVX2__)
  return _cvtss_sh(x, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more
  if (magnitude < 0x38800000) {                                 // subnormal halves count 2^-24
    float f;
    std::memcpy(&f, &magnitude, 4);
    return uint16_t(sign | uint32_t(std::nearbyint(f * 0x1p24f)));
  }
  uint32_t rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
  return uint16_t(sign | rounded >> 13);
#endif
}

OLMOE_INLINE vf load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  // As half_to_float, without a branch.
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vi bits = __builtin_convertvector(h, vi), shifted = (bits & 0x7fff) << 13, exponent = bits & 0x7c00;
  const vi rebased = shifted + (112 << 23) + ((exponent == 0x7c00) & (112 << 23));
  // Zeros and subnormals: the mantissa below an implicit one, which is taken away.
  const vi small = (vi)((vf)(rebased + (1 << 23)) - 0x1p-14f);
  return (vf)((exponent == 0 ? small : rebased) | (bits & 0x8000) << 16);
#endif
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

// As float_to_half and float_to_bf16, W at a time.
OLMOE_INLINE void store_f16(uint16_t* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int i = 0; i < W; i++) p[i] = float_to_half(v[i]);
#endif
}
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
}
template <Type T>
OLMOE_INLINE float scalar_as(const void* p, size_t i) {
  if constexpr (T == Type::kF32) return ((const float*)p)[i];
  if constexpr (T == Type::kBF16) return bf16_to_float(((const uint16_t*)p)[i]);
  if constexpr (T == Type::kF16) return half_to_float(((const uint16_t*)p)[i]);
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
