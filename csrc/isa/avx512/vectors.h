// What the compiler's own vector types cannot say, or not as fast, for AVX-512.
#pragma once

#include <immintrin.h>

namespace olmoe {
namespace {

constexpr int W = 16;

}  // namespace
}  // namespace olmoe

#include "../common/vector_types.h"

namespace olmoe {
namespace {

OLMOE_INLINE float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }

// a * b + c, rounded once.
OLMOE_INLINE vf fused(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }

inline uint16_t float_to_half(float x) {  // round to nearest even
  return _cvtss_sh(x, 0);
}

OLMOE_INLINE vf load_f16(const uint16_t* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

OLMOE_INLINE vf load_i8(const int8_t* p) {
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

// As float_to_half, W at a time.
OLMOE_INLINE void store_f16(uint16_t* p, vf v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }

// The sums of the lanes of four vectors, each in the order of `sum`.
OLMOE_INLINE v4 sum_four(const vf (&v)[4]) {
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
  return (v4)_mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, s));
}

// Entries of a table of 16 by the nibbles of W / 2 bytes, that of a byte's upper half first.
struct Book {
  __m512 entries;
  explicit Book(const float* p) : entries(_mm512_loadu_ps(p)) {}
  OLMOE_INLINE vf at(const uint8_t* p) const {
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)p), half = _mm_set1_epi8(15);
    const __m128i numbers =
        _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), half), _mm_and_si128(bytes, half));
    return (vf)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(numbers), entries);
  }
};

// W x W values transposed.
OLMOE_INLINE void transpose(vf (&v)[W]) {
  __m512 u[16], q[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
    u[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
  }
  // q[4 i + m]: columns m, 4 + m, 8 + m, 12 + m of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int m = 0; m < 2; m++) {
      const __m512d a = _mm512_castps_pd(u[i + m]), b = _mm512_castps_pd(u[i + 2 + m]);
      q[i + 2 * m] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      q[i + 2 * m + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
#pragma GCC unroll 4
  for (int m = 0; m < 4; m++) {
    const __m512 a = _mm512_shuffle_f32x4(q[m], q[4 + m], 0x88), b = _mm512_shuffle_f32x4(q[8 + m], q[12 + m], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(q[m], q[4 + m], 0xdd), d = _mm512_shuffle_f32x4(q[8 + m], q[12 + m], 0xdd);
    v[m] = (vf)_mm512_shuffle_f32x4(a, b, 0x88);
    v[4 + m] = (vf)_mm512_shuffle_f32x4(c, d, 0x88);
    v[8 + m] = (vf)_mm512_shuffle_f32x4(a, b, 0xdd);
    v[12 + m] = (vf)_mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

OLMOE_INLINE vf broadcast(const float* p) { return (vf)_mm512_set1_ps(*p); }

// Write the indices i + j of lanes that are hit (-1, else 0) after `count` others; the number of all.
OLMOE_INLINE int append_lanes(vi hits, int i, int* ids, int count) {
  const __mmask16 mask = _mm512_movepi32_mask((__m512i)hits);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lanes, _mm512_set1_epi32(i))));
  return count + __builtin_popcount(mask);
}

// kBlock values times `inverse`, rounded to integers of a byte, halves to even; their sum.
OLMOE_INLINE int round_to_bytes(const float* x, float inverse, int8_t* out) {
  __m512i low = _mm512_cvtps_epi32(_mm512_loadu_ps(x) * inverse);
  __m512i high = _mm512_cvtps_epi32(_mm512_loadu_ps(x + 16) * inverse);
  _mm_storeu_si128((__m128i*)out, _mm512_cvtsepi32_epi8(low));
  _mm_storeu_si128((__m128i*)(out + 16), _mm512_cvtsepi32_epi8(high));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
}

inline void pack_bf16(const uint8_t*, size_t, size_t, size_t, float*) {}
constexpr bool kPacksBF16 = false;  // whether pack_bf16 is worth it

}  // namespace
}  // namespace olmoe
