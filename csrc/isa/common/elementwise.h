// Norm, rotary embedding, activation, softmax and conversions: kernels over one row of fp32 values.
#pragma once

#include <cfloat>

#include "simd.h"

namespace olmoe {
namespace {

inline void rms_norm(const float* x, const float* weight, float eps, int d, float* out) {
  vf squares[4] = {};
  int i = 0;
  for (; i + 4 * W <= d; i += 4 * W)
    for (int j = 0; j < 4; j++) {
      vf v = load(x + i + j * W);
      squares[j] += v * v;
    }
  float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < d; i++) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / float(d) + eps);
  for (i = 0; i + W <= d; i += W) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < d; i++) out[i] = x[i] * scale * weight[i];
}

inline void rope(float* x, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  int i = 0;
  for (; i + W <= half; i += W) {
    vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

inline void swiglu(const float* gate, const float* up, int n, float* out) {
  const vf lowest = splat(-88.0f);  // the limit of vexp, where silu is -5e-37; NaN passes
  int i = 0;
  for (; i + W <= n; i += W) {
    vf g = vmax(lowest, load(gate + i));
    store(out + i, g / (vexp(-g) + 1.0f) * load(up + i));
  }
  for (; i < n; i++) {
    const float g = gate[i] < lowest[0] ? lowest[0] : gate[i];
    out[i] = g / (exp_one(-g) + 1.0f) * up[i];
  }
}

inline void softmax(float* x, int n) {
  float top = x[0];
  for (int i = 1; i < n; i++) top = x[i] > top ? x[i] : top;
  vf totals = {};
  int i = 0;
  for (; i + W <= n; i += W) {
    vf e = vexp(load(x + i) - top);
    store(x + i, e);
    totals += e;
  }
  float total = sum(totals);
  for (; i < n; i++) total += x[i] = exp_one(x[i] - top);
  const float scale = 1.0f / total;
  for (i = 0; i < n; i++) x[i] *= scale;
}

inline void axpy(float a, const float* x, int n, float* y) {
  int i = 0;
  for (; i + W <= n; i += W) store(y + i, load(y + i) + load(x + i) * a);
  for (; i < n; i++) y[i] += a * x[i];
}

inline uint64_t read(const uint8_t* data, size_t n) {
  constexpr int kStreams = 4;  // as the packed rows are read
  const size_t part = n / kStreams;
  vi seen[kStreams] = {};
  for (size_t i = 0; i + sizeof(vi) <= part; i += sizeof(vi))
    for (int s = 0; s < kStreams; s++) {
      vi v;
      std::memcpy(&v, data + s * part + i, sizeof v);
      seen[s] ^= v;
    }
  uint64_t total = 0;
  for (const vi& v : seen)
    for (int i = 0; i < W; i++) total = total * 31 + uint32_t(v[i]);
  return total;
}

inline void store_as(const float* x, int n, Type type, void* out) {
  if (type == Type::kF32) {
    std::memcpy(out, x, size_t(n) * 4);
    return;
  }
  uint16_t* half = (uint16_t*)out;
  int i = 0;
  for (; i + W <= n; i += W) type == Type::kBF16 ? store_bf16(half + i, load(x + i)) : store_f16(half + i, load(x + i));
  for (; i < n; i++) half[i] = type == Type::kBF16 ? float_to_bf16(x[i]) : float_to_half(x[i]);
}

inline void load_from(const void* x, int n, Type type, float* out) {
  for (int i = 0; i < n; i++)
    out[i] = type == Type::kF32    ? scalar_as<Type::kF32>(x, i)
             : type == Type::kBF16 ? scalar_as<Type::kBF16>(x, i)
                                   : scalar_as<Type::kF16>(x, i);
}

// Magnitudes as integers: these compare just as the numbers do, and NaN, which must not get lost, is above all others.
OLMOE_INLINE vi magnitude_bits(vf v) { return (vi)v & 0x7fffffff; }
OLMOE_INLINE int32_t largest_lane(vi v) {
  int32_t top = v[0];
  for (int i = 1; i < W; i++) top = v[i] > top ? v[i] : top;
  return top;
}
OLMOE_INLINE float number_of(int32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// max|x| / 127 of n values.
OLMOE_INLINE float byte_scale(const float* x, int n) {
  vi largest = {};
  int i = 0;
  for (; i + W <= n; i += W) {
    const vi magnitude = magnitude_bits(load(x + i));
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t top = largest_lane(largest);
  for (; i < n; i++) {
    int32_t magnitude;
    std::memcpy(&magnitude, x + i, sizeof magnitude);
    magnitude &= 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  return number_of(top) / 127.0f;
}

// The factor that turns values of that scale into codes; false if the scale is not finite. Then codes are 0, and 0
// times the scale is NaN, so that every product with them is NaN.
OLMOE_INLINE bool byte_inverse(float d, float& inverse) {
  if (!(d <= FLT_MAX)) return false;
  inverse = 1.0f / d;
  if (!(inverse <= FLT_MAX)) inverse = 0;  // of zeros and denormals
  return true;
}

inline void quantize(const float* x, int columns, int zero, ActivationBlock* out) {
  for (int b = 0; b < columns / kBlock; b++, x += kBlock, out++) {
    out->d = byte_scale(x, kBlock);
    float inverse;
    if (!byte_inverse(out->d, inverse)) {
      std::memset(out->q, 0, sizeof out->q);
      out->correction = 0;
      continue;
    }
    out->correction = -zero * round_to_bytes(x, inverse, out->q);
  }
}

inline void quantize_row(const float* x, int n, int8_t* codes, float* scale) {
  *scale = byte_scale(x, n);
  float inverse;
  if (!byte_inverse(*scale, inverse)) {
    std::memset(codes, 0, n);
    return;
  }
  int i = 0;
  for (; i + kBlock <= n; i += kBlock) round_to_bytes(x + i, inverse, codes + i);
  for (; i < n; i++) codes[i] = int8_t(std::nearbyint(x[i] * inverse));
}

}  // namespace
}  // namespace olmoe
