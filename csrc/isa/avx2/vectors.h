// What the compiler's own vector types cannot say, or not as fast, for AVX2.
#pragma once

#include <immintrin.h>

namespace olmoe {
namespace {

constexpr int W = 8;

}  // namespace
}  // namespace olmoe

#include "../common/vector_types.h"

namespace olmoe {
namespace {

OLMOE_INLINE float sum(vf v) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}

// a * b + c, rounded once.
OLMOE_INLINE vf fused(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }

inline uint16_t float_to_half(float x) {  // round to nearest even
  return _cvtss_sh(x, 0);
}

OLMOE_INLINE vf load_f16(const uint16_t* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

OLMOE_INLINE vf load_i8(const int8_t* p) {
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

// As float_to_half, W at a time.
OLMOE_INLINE void store_f16(uint16_t* p, vf v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }

// The sums of the lanes of four vectors, each in the order of `sum`.
OLMOE_INLINE v4 sum_four(const vf (&v)[4]) { return v4{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])}; }

// Entries of a table of 16 by the nibbles of W / 2 bytes, that of a byte's upper half first.
struct Book {
  __m256 low, high;
  explicit Book(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
  OLMOE_INLINE vf at(const uint8_t* p) const {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    const __m128i bytes = _mm_cvtsi32_si128(word), half = _mm_set1_epi8(15);
    const __m256i numbers = _mm256_cvtepu8_epi32(
        _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), half), _mm_and_si128(bytes, half)));
    // The fourth bit of a number, where the sign is, says which half of the table.
    return (vf)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, numbers), _mm256_permutevar8x32_ps(high, numbers),
                                _mm256_castsi256_ps(_mm256_slli_epi32(numbers, 28)));
  }
};

// W x W values transposed.
OLMOE_INLINE void transpose(vf (&v)[W]) {
  __m256 u[8], q[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    u[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    u[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  // q[4 i + m]: columns m and 4 + m of rows 4 i to 4 i + 3.
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int m = 0; m < 2; m++) {
      const __m256d a = _mm256_castps_pd(u[i + m]), b = _mm256_castps_pd(u[i + 2 + m]);
      q[i + 2 * m] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      q[i + 2 * m + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
#pragma GCC unroll 4
  for (int m = 0; m < 4; m++) {
    v[m] = (vf)_mm256_permute2f128_ps(q[m], q[4 + m], 0x20);
    v[4 + m] = (vf)_mm256_permute2f128_ps(q[m], q[4 + m], 0x31);
  }
}

OLMOE_INLINE vf broadcast(const float* p) { return (vf)_mm256_broadcast_ss(p); }

// The numbers of the lanes that are hit, rising, for each set of them; then zeros.
struct HitLanes {
  uint8_t lanes[1 << W][W] = {};
  constexpr HitLanes() {
    for (int set = 0; set < 1 << W; set++)
      for (int j = 0, count = 0; j < W; j++)
        if (set >> j & 1) lanes[set][count++] = uint8_t(j);
  }
};
constexpr HitLanes kHitLanes;

// Write the indices i + j of lanes that are hit (-1, else 0) after `count` others; the number of all.
OLMOE_INLINE int append_lanes(vi hits, int i, int* ids, int count) {
  const int set = _mm256_movemask_ps((__m256)hits);
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kHitLanes.lanes[set]));
  _mm256_storeu_si256((__m256i*)(ids + count), _mm256_add_epi32(lanes, _mm256_set1_epi32(i)));
  return count + __builtin_popcount(set);
}

// kBlock values times `inverse`, rounded to integers of a byte, halves to even; their sum.
OLMOE_INLINE int round_to_bytes(const float* x, float inverse, int8_t* out) {
  int total = 0;
  __m256i q[4], sums = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) {
    q[i] = _mm256_cvtps_epi32(_mm256_loadu_ps(x + 8 * i) * inverse);
    sums = _mm256_add_epi32(sums, q[i]);
  }
  // Packing works within halves of 128 bits, so words of four bytes have to be put in order.
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)out, _mm256_permutevar8x32_epi32(packed, order));
  for (int i = 0; i < 8; i++) total += ((vi)sums)[i];
  return total;
}

// Two steps of eight rows of bf16: transposed as they are, which takes half the shuffles, and widened where they go,
// lanes and steps this many floats apart.
OLMOE_INLINE void pack_bf16(const uint8_t* rows, size_t row_bytes, size_t lane_size, size_t step_size, float* target) {
  __m256i a[8], b[8];
#pragma GCC unroll 4
  for (int j = 0; j < 8; j += 2) {
    const __m256i u = _mm256_loadu_si256((const __m256i*)(rows + j * row_bytes));
    const __m256i v = _mm256_loadu_si256((const __m256i*)(rows + (j + 1) * row_bytes));
    a[j] = _mm256_unpacklo_epi16(u, v), a[j + 1] = _mm256_unpackhi_epi16(u, v);
  }
  // b[4 i + m]: columns 2 m and 2 m + 1 of rows 4 i to 4 i + 3; of each step in a half.
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int m = 0; m < 2; m++) {
      b[i + 2 * m] = _mm256_unpacklo_epi32(a[i + m], a[i + 2 + m]);
      b[i + 2 * m + 1] = _mm256_unpackhi_epi32(a[i + m], a[i + 2 + m]);
    }
#pragma GCC unroll 8
  for (int l = 0; l < 8; l++) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i column =
        l % 2 ? _mm256_unpackhi_epi64(b[l / 2], b[4 + l / 2]) : _mm256_unpacklo_epi64(b[l / 2], b[4 + l / 2]);
    const __m256i low = _mm256_unpacklo_epi16(zero, column), high = _mm256_unpackhi_epi16(zero, column);
    float* lane = target + l * lane_size;
    store(lane, (vf)_mm256_permute2x128_si256(low, high, 0x20));
    store(lane + step_size, (vf)_mm256_permute2x128_si256(low, high, 0x31));
  }
}
constexpr bool kPacksBF16 = true;  // whether pack_bf16 is worth it

}  // namespace
}  // namespace olmoe
