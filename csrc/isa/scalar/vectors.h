// What other instruction sets have instructions for, in plain C++: vectors of 16 bytes as the baseline has them.
#pragma once

namespace olmoe {
namespace {

constexpr int W = 4;

}  // namespace
}  // namespace olmoe

#include "../common/vector_types.h"

namespace olmoe {
namespace {

OLMOE_INLINE float sum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// a * b + c, rounded once.
OLMOE_INLINE vf fused(vf a, vf b, vf c) {
  vf out;
  for (int i = 0; i < W; i++) out[i] = std::fma(a[i], b[i], c[i]);
  return out;
}

// Entries of a table of 16 by the nibbles of W / 2 bytes, that of a byte's upper half first.
struct Book {
  const float* entries;
  explicit Book(const float* p) : entries(p) {}
  OLMOE_INLINE vf at(const uint8_t* p) const {
    vf out;
    for (int i = 0; i < W; i += 2) out[i] = entries[p[i / 2] >> 4], out[i + 1] = entries[p[i / 2] & 15];
    return out;
  }
};

inline float half_to_float(uint16_t h) {
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
}

inline uint16_t float_to_half(float x) {  // round to nearest even
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
}

OLMOE_INLINE vf load_f16(const uint16_t* p) {
  // As half_to_float, without a branch.
  vh h;
  std::memcpy(&h, p, sizeof h);
  const vi bits = __builtin_convertvector(h, vi), shifted = (bits & 0x7fff) << 13, exponent = bits & 0x7c00;
  const vi rebased = shifted + (112 << 23) + ((exponent == 0x7c00) & (112 << 23));
  // Zeros and subnormals: the mantissa below an implicit one, which is taken away.
  const vi small = (vi)((vf)((vu)rebased + (1u << 23)) - 0x1p-14f);  // unsigned: NaN would overflow
  return (vf)((exponent == 0 ? small : rebased) | (bits & 0x8000) << 16);
}

OLMOE_INLINE vf load_i8(const int8_t* p) {
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  // Each byte to the upper end of its lane, from where shifting brings its sign.
  const vi lanes = (vi)(vu{bytes << 24, bytes << 16, bytes << 8, bytes});
  return __builtin_convertvector(lanes >> 24, vf);
}

// As float_to_half, W at a time.
OLMOE_INLINE void store_f16(uint16_t* p, vf v) {
  for (int i = 0; i < W; i++) p[i] = float_to_half(v[i]);
}

// The sums of the lanes of four vectors, each in the order of `sum`.
OLMOE_INLINE void sum_four(const vf (&v)[4], float* out) {
  for (int j = 0; j < 4; j++) out[j] = sum(v[j]);
}

// W x W values transposed.
OLMOE_INLINE void transpose(vf (&v)[W]) {
  for (int i = 0; i < W; i++)
    for (int j = 0; j < i; j++) {
      const float x = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = x;
    }
}

OLMOE_INLINE vf broadcast(const float* p) { return vf{*p, *p, *p, *p}; }

// Write the indices i + j of lanes that are hit (-1, else 0) after `count` others; the number of all.
OLMOE_INLINE int append_lanes(vi hits, int i, int* ids, int count) {
  for (int j = 0; j < W; j++) {  // without a branch: what comes next overwrites a miss
    ids[count] = i + j;
    count -= hits[j];
  }
  return count;
}

// kBlock values times `inverse`, rounded to integers of a byte, halves to even; their sum.
OLMOE_INLINE int round_to_bytes(const float* x, float inverse, int8_t* out) {
  int total = 0;
  for (int i = 0; i < kBlock; i++) {
    int q = int(std::nearbyint(x[i] * inverse));
    out[i] = int8_t(q);
    total += q;
  }
  return total;
}

inline void pack_bf16(const uint8_t*, size_t, size_t, size_t, float*) {}
constexpr bool kPacksBF16 = false;  // whether pack_bf16 is worth it

}  // namespace
}  // namespace olmoe
