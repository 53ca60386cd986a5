// Products of row-major fp32, bf16 or fp16 rows with activations: tiles of rows and tokens held in registers.
#pragma once

#include "simd.h"

namespace olmoe {
namespace {

// ROWS x TOKENS dot products of length `columns`, fp32 activations.
template <Type T, int ROWS, int TOKENS>
OLMOE_INLINE void float_tile(const uint8_t* weight, size_t row_bytes, int columns, const ActivationRow* x, float* out,
                             int ld) {
  vf total[ROWS][TOKENS] = {};
  int i = 0;
  for (; i + W <= columns; i += W) {
    vf a[TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; t++) a[t] = load(x[t].f32 + i);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const vf w = load_as<T>(weight + r * row_bytes, i);
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t++) total[r][t] += w * a[t];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < TOKENS; t++) {
      float s = sum(total[r][t]);
      for (int c = i; c < columns; c++) s = multiply_add(scalar_as<T>(weight + r * row_bytes, c), x[t].f32[c], s);
      out[size_t(t) * ld + r] = s;
    }
}

// ROWS rows against all tokens.
template <Type T, int ROWS>
inline void row_band(const uint8_t* weight, size_t row_bytes, int columns, const ActivationRow* x, int tokens,
                     float* out, int ld) {
  int t = 0;
  constexpr int kTile = W == 16 ? 6 : 3;  // as many sums as there are registers for
  for (; t + kTile <= tokens; t += kTile)
    float_tile<T, ROWS, kTile>(weight, row_bytes, columns, x + t, out + size_t(t) * ld, ld);
  for (; t + 2 <= tokens; t += 2) float_tile<T, ROWS, 2>(weight, row_bytes, columns, x + t, out + size_t(t) * ld, ld);
  if (t < tokens) float_tile<T, ROWS, 1>(weight, row_bytes, columns, x + t, out + size_t(t) * ld, ld);
}

// Eight rows against a single token. Bandwidth dominates: each row is a stream of its own, and the eight rows after
// these are fetched ahead, because rows are often whole pages, at whose ends the hardware's prefetching stops.
template <Type T>
inline void row_vector(const uint8_t* weight, size_t row_bytes, int columns, const float* x, float* out) {
  constexpr int kRows = 8, kElement = sizeof_type(T), kStep = 64 / kElement;  // a cache line of each row
  vf total[kRows] = {};
  int i = 0;
  for (; i + kStep <= columns; i += kStep)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const uint8_t* row = weight + r * row_bytes;
      __builtin_prefetch(row + kRows * row_bytes + size_t(i) * kElement, 0, 2);
#pragma GCC unroll 8
      for (int j = 0; j < kStep; j += W) total[r] += load_as<T>(row, i + j) * load(x + i + j);
    }
  for (; i + W <= columns; i += W)
    for (int r = 0; r < kRows; r++) total[r] += load_as<T>(weight + r * row_bytes, i) * load(x + i);
  for (int r = 0; r < kRows; r++) {
    float s = sum(total[r]);
    for (int c = i; c < columns; c++) s = multiply_add(scalar_as<T>(weight + r * row_bytes, c), x[c], s);
    out[r] = s;
  }
}

template <Type T>
inline void float_rows(const uint8_t* group, int rows, int columns, const ActivationRow* x, int tokens, float* out,
                       int ld) {
  const size_t row_bytes = size_t(columns) * sizeof_type(T);
  int r = 0;
  if (tokens == 1)
    for (; r + 8 <= rows; r += 8) row_vector<T>(group + r * row_bytes, row_bytes, columns, x->f32, out + r);
  for (; r + 4 <= rows; r += 4) row_band<T, 4>(group + r * row_bytes, row_bytes, columns, x, tokens, out + r, ld);
  for (; r < rows; r++) row_band<T, 1>(group + r * row_bytes, row_bytes, columns, x, tokens, out + r, ld);
}

}  // namespace
}  // namespace olmoe
