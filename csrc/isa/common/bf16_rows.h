// Products of row-major bf16 rows by the instruction for them, which multiplies pairs of bf16 numbers into sums in
// fp32. Activations are rounded to bf16 first, as every product of the bf16 format takes them.
//
// Weights and activations lie along the columns alike, so nothing has to be rearranged: a sum has 16 lanes, lane l
// taking the pairs l, l + 16, ..., and these are added at the end. Every tile does so in the same order, so that a
// token's result is the same to the last bit whichever tokens are multiplied with it.
#pragma once

#include "simd.h"

#if defined(__AVX512BF16__)
namespace olmoe {
namespace {

constexpr int kDotRows = 4, kDotTokens = 6;  // 24 sums, and registers left for the rows
constexpr int kDotStep = 32;                 // columns that one instruction takes

// Sums of the lanes of four vectors.
OLMOE_INLINE __m128 sum_each(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // a b a b in each quarter
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d ab2 = _mm512_castps_pd(ab), cd2 = _mm512_castps_pd(cd);
  const __m512 quarters =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// ROWS x TOKENS dot products. x points to bf16 rows.
template <int ROWS, int TOKENS>
__attribute__((noinline)) void dot_tile(const uint16_t* weight, int columns, const uint16_t* const* x, float* out,
                                        int ld) {
  __m512 total[TOKENS][ROWS];
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) total[t][r] = _mm512_setzero_ps();
  const uint16_t* a[TOKENS];
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++) a[t] = x[t];
  const size_t stride = columns, vectors = stride / kDotStep * kDotStep;
  const uint16_t *row = weight, *next = weight + ROWS * stride;
  size_t i = 0;
  for (; i < vectors; i += kDotStep, row += kDotStep, next += kDotStep) {
    __m512bh w[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      w[r] = (__m512bh)_mm512_loadu_si512(row + r * stride);
      // The next tile's rows to the second cache: in the first, they would push out the activations.
      _mm_prefetch((const char*)(next + r * stride), _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      const __m512bh v = (__m512bh)_mm512_loadu_si512(a[t] + i);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) total[t][r] = _mm512_dpbf16_ps(total[t][r], w[r], v);
    }
  }
  if (i < stride) {
    const __mmask32 mask = (1u << (stride - i)) - 1;
    __m512bh w[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) w[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, row + r * stride);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) {
      const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, a[t] + i);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) total[t][r] = _mm512_dpbf16_ps(total[t][r], w[r], v);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; t++) {
    if constexpr (ROWS == 4) {
      _mm_storeu_ps(out + size_t(t) * ld, sum_each(total[t][0], total[t][1], total[t][2], total[t][3]));
    } else {
      static_assert(ROWS == 1);
      const __m512 none = _mm512_setzero_ps();
      out[size_t(t) * ld] = _mm_cvtss_f32(sum_each(total[t][0], none, none, none));
    }
  }
}

// Eight rows against a single token: see row_vector of float_rows.h.
inline void dot_vector(const uint16_t* weight, int columns, const uint16_t* x, float* out) {
  constexpr int kRows = 8;
  __m512 total[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) total[r] = _mm512_setzero_ps();
  int i = 0;
  for (; i + kDotStep <= columns; i += kDotStep) {
    const __m512bh v = (__m512bh)_mm512_loadu_si512(x + i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const uint16_t* row = weight + size_t(r) * columns + i;
      _mm_prefetch((const char*)(row + size_t(kRows) * columns), _MM_HINT_T1);
      total[r] = _mm512_dpbf16_ps(total[r], (__m512bh)_mm512_loadu_si512(row), v);
    }
  }
  if (i < columns) {
    const __mmask32 mask = (1u << (columns - i)) - 1;
    const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i);
    for (int r = 0; r < kRows; r++)
      total[r] =
          _mm512_dpbf16_ps(total[r], (__m512bh)_mm512_maskz_loadu_epi16(mask, weight + size_t(r) * columns + i), v);
  }
  _mm_storeu_ps(out, sum_each(total[0], total[1], total[2], total[3]));
  _mm_storeu_ps(out + 4, sum_each(total[4], total[5], total[6], total[7]));
}

// All rows times up to TOKENS tokens, whose activations stay in the first cache while the rows pass by.
template <int TOKENS>
inline void dot_rows(const uint16_t* weight, int rows, int columns, const uint16_t* const* x, int tokens, float* out,
                     int ld) {
  if constexpr (TOKENS > 1) {
    if (tokens < TOKENS) return dot_rows<TOKENS - 1>(weight, rows, columns, x, tokens, out, ld);
  }
  int r = 0;
  if constexpr (TOKENS == 1)
    for (; r + 8 <= rows; r += 8) dot_vector(weight + size_t(r) * columns, columns, x[0], out + r);
  for (; r + kDotRows <= rows; r += kDotRows)
    dot_tile<kDotRows, TOKENS>(weight + size_t(r) * columns, columns, x, out + r, ld);
  for (; r < rows; r++) dot_tile<1, TOKENS>(weight + size_t(r) * columns, columns, x, out + r, ld);
}

inline void bf16_rows(const uint8_t* group, int rows, int columns, const ActivationRow* x, int tokens, float* out,
                      int ld) {
  for (int t = 0; t < tokens; t += kDotTokens) {
    const int count = tokens - t < kDotTokens ? tokens - t : kDotTokens;
    const uint16_t* a[kDotTokens];
    for (int i = 0; i < count; i++) a[i] = x[t + i].bf16;
    dot_rows<kDotTokens>(reinterpret_cast<const uint16_t*>(group), rows, columns, a, count, out + size_t(t) * ld, ld);
  }
}

}  // namespace
}  // namespace olmoe
#endif
