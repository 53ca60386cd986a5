// Products for training with factors rounded to bf16, ties to even. Two numbers that follow each other along the depth
// take the 32 bits of one fp32 number, and one instruction multiplies and adds both. Sums are in fp32; subnormal
// numbers count as zero. For CPUs with AVX512-BF16.
#pragma once

#include "products.h"

#if defined(__AVX512BF16__)

namespace olmoe {
namespace {

// The first `count` of W numbers, then zeros.
OLMOE_INLINE vf load_some(const float* p, int count) {
  return (vf)_mm512_maskz_loadu_ps(count <= 0 ? 0 : count >= W ? __mmask16(-1) : __mmask16((1u << count) - 1), p);
}

// The pairs of 2 W numbers that follow each other, or of the first `count` of them.
OLMOE_INLINE vf neighbours(const float* p) { return (vf)_mm512_cvtne2ps_pbh((__m512)load(p + W), (__m512)load(p)); }
OLMOE_INLINE vf neighbours(const float* p, int count) {
  return (vf)_mm512_cvtne2ps_pbh((__m512)load_some(p + W, count - W), (__m512)load_some(p, count));
}

// The pairs of two rows' numbers.
OLMOE_INLINE vf pairs(vf first, vf second) {
  const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                          21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vf)_mm512_permutexvar_epi16(places, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

// out[l * stride + j] = pair l of the numbers that row j, of `count` rows, has from `column` on: `depth` of them.
inline void turn_neighbours(const float* const* rows, int count, int column, int depth, float* out, size_t stride) {
  for (int k = 0; k < depth; k += 2 * W, out += W * stride) {
    vf v[W];
    if (count == W && depth - k >= 2 * W) {
#pragma GCC unroll 16
      for (int j = 0; j < W; j++) v[j] = neighbours(rows[j] + column + k);
      transpose(v);
#pragma GCC unroll 16
      for (int l = 0; l < W; l++) store(out + l * stride, v[l]);
      continue;
    }
    for (int j = 0; j < W; j++) v[j] = j < count ? neighbours(rows[j] + column + k, depth - k) : vf{};
    transpose(v);
    for (int l = 0; l < W && 2 * l < depth - k; l++) store(out + l * stride, v[l]);
  }
}

// out[i * stride + j] = the pair of column i, of `columns`, in rows 2 j and 2 j + 1, of `count` of at most 2 W rows.
inline void turn_pairs(const float* const* rows, int count, int columns, float* out, size_t stride) {
  for (int i = 0; i < columns; i += W, out += W * stride) {
    vf v[W];
    if (count == 2 * W && columns - i >= W) {
#pragma GCC unroll 16
      for (int j = 0; j < W; j++) v[j] = pairs(load(rows[2 * j] + i), load(rows[2 * j + 1] + i));
      transpose(v);
#pragma GCC unroll 16
      for (int l = 0; l < W; l++) store(out + l * stride, v[l]);
      continue;
    }
    for (int j = 0; j < W; j++)
      v[j] = pairs(2 * j < count ? load_some(rows[2 * j] + i, columns - i) : vf{},
                   2 * j + 1 < count ? load_some(rows[2 * j + 1] + i, columns - i) : vf{});
    transpose(v);
    for (int l = 0; l < W && l < columns - i; l++) store(out + l * stride, v[l]);
  }
}

// How many rows ahead of the one being packed to prefetch: rows selected by indices follow no pattern.
constexpr int kAhead = 8;

// See Singles.
struct Pairs {
  static constexpr int kNumbers = 2;
  static OLMOE_INLINE vf multiply_add(vf x, vf b, vf total) {
    return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)x, (__m512bh)b);
  }
  static OLMOE_INLINE vf multiplied(vf x) {
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
  }

  static void pack(const Factor& b, int first, int depth, int column, int columns, float* panels) {
    const int places = (depth + 1) / 2;
    if (b.turned) {
      for (int p = 0; p < columns; p += kPanelColumns) {
        const int some = columns - p < kPanelColumns ? columns - p : kPanelColumns, width = vectors_of(some) * W;
        for (int c = 0; c < some; c += W) {
          const float* rows[W];
          const int count = some - c < W ? some - c : W;
          for (int j = 0; j < count; j++) rows[j] = row_of(b, column + p + c + j);
          turn_neighbours(rows, count, first, depth, panels + size_t(p) * places + c, width);
        }
      }
      return;
    }
    for (int k = 0; k < depth; k += 2) {
      const bool both = k + 1 < depth;
      for (int ahead = k + kAhead; ahead < k + kAhead + 2 && ahead < depth; ahead++)
        fetch_ahead(row_of(b, first + ahead) + column, size_t(columns) * sizeof(float));
      const float *row = row_of(b, first + k) + column, *next = both ? row_of(b, first + k + 1) + column : row;
      for (int p = 0; p < columns; p += kPanelColumns) {
        const int some = columns - p < kPanelColumns ? columns - p : kPanelColumns, width = vectors_of(some) * W;
        float* out = panels + size_t(p) * places + size_t(k / 2) * width;
        if (both && some == kPanelColumns) {
#pragma GCC unroll 8
          for (int c = 0; c < kPanelColumns; c += W) store(out + c, pairs(load(row + p + c), load(next + p + c)));
          continue;
        }
        for (int c = 0; c < some; c += W)
          store(out + c, pairs(load_some(row + p + c, some - c), load_some(next + p + c, both ? some - c : 0)));
      }
    }
  }

  static void rows(const Factor& a, int row, int count, int first, int depth, float* memory, const float** rows,
                   size_t stride = kDepth) {
    for (int i = 0; i < count; i++) rows[i] = memory + size_t(i) * stride;
    if (a.turned) {
      for (int k = 0; k < depth; k += 2 * W) {
        const float* from[2 * W];
        const int some = depth - k < 2 * W ? depth - k : 2 * W;
        for (int j = 0; j < some; j++) from[j] = row_of(a, first + k + j) + row;
        turn_pairs(from, some, count, memory + k / 2, stride);
      }
      return;
    }
    for (int i = 0; i < count; i++) {
      const float* from = row_of(a, row + i) + first;
      if (i + kAhead < count) fetch_ahead(row_of(a, row + i + kAhead) + first, size_t(depth) * sizeof(float));
      float* out = memory + size_t(i) * stride;
      int k = 0;
      for (; k + 2 * W <= depth; k += 2 * W) store(out + k / 2, neighbours(from + k));
      if (k < depth) store(out + k / 2, neighbours(from + k, depth - k));
    }
  }
};
static_assert(kDepth % W == 0);  // whole vectors of pairs are written

inline void bf16_product(const Factor& a, int m, int depth, const Factor& b, int n, float* c, size_t ld, bool add,
                         float* scratch) {
  product<Pairs>(a, m, depth, b, n, c, ld, add, scratch);
}

}  // namespace
}  // namespace olmoe

#endif
