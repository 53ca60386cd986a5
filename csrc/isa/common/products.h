// Products of fp32 matrices, C = A B, for training. Either factor may be transposed, or have its rows selected by
// indices. Columns of B are packed into panels a few vectors wide, which stay in the cache while the rows of A stream
// past them. Each element of C is summed in order within chunks of kDepth, and over these in order, so that it does not
// depend on how a product is divided by rows and columns.
#pragma once

#include "simd.h"

namespace olmoe {
namespace {

constexpr int kSumRows = 6;                        // of a tile of C that is held in registers
constexpr int kColumnVectors = W == 16 ? 4 : 2;    // of its columns
constexpr int kPanelColumns = kColumnVectors * W;  // of B
constexpr int kPanels = 4;                         // packed together, so that rows of B are read in longer runs
static_assert(kPanels * kPanelColumns <= kProductColumns);

inline const float* row_of(const Factor& f, int r) { return f.data + (f.rows ? f.rows[r] : r) * f.ld; }

// out[c * stride + r] = row r's column `column` + c, for `count` rows and `columns` columns; the values of rows beyond
// these, up to a whole vector of them, become zeros.
inline void turn(const Factor& f, int row, int count, int column, int columns, float* out, size_t stride) {
  for (int r = 0; r < count; r += W) {
    const float* rows[W];
    const int some = count - r < W ? count - r : W;
    for (int j = 0; j < some; j++) rows[j] = row_of(f, row + r + j) + column;
    int c = 0;
    if (some == W)
      for (; c + W <= columns; c += W) {
        vf v[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; j++) v[j] = load(rows[j] + c);
        transpose(v);
#pragma GCC unroll 16
        for (int l = 0; l < W; l++) store(out + (c + l) * stride + r, v[l]);
      }
    for (; c < columns; c++)
      for (int j = 0; j < W; j++) out[c * stride + r + j] = j < some ? rows[j][c] : 0.0f;
  }
}

inline int vectors_of(int columns) { return (columns + W - 1) / W; }

// Columns [column, column + columns) of rows [first, first + depth) of B: panels one after the other, each
// [depth][vectors * W], with zeros where the last vector has no columns.
inline void pack(const Factor& b, int first, int depth, int column, int columns, float* panels) {
  if (b.turned) {
    for (int p = 0; p < columns; p += kPanelColumns) {
      const int some = columns - p < kPanelColumns ? columns - p : kPanelColumns;
      turn(b, column + p, some, first, depth, panels + size_t(p) * depth, vectors_of(some) * W);
    }
    return;
  }
  for (int k = 0; k < depth; k++) {
    const float* row = row_of(b, first + k) + column;
    for (int p = 0; p < columns; p += kPanelColumns) {
      const int some = columns - p < kPanelColumns ? columns - p : kPanelColumns, width = vectors_of(some) * W;
      float* out = panels + size_t(p) * depth + size_t(k) * width;
      int c = 0;
      for (; c + W <= some; c += W) store(out + c, load(row + p + c));
      for (; c < width; c++) out[c] = c < some ? row[p + c] : 0.0f;
    }
  }
}

// How a product reads its factors, here as fp32 numbers; bf16_products.h has the other way.
struct Singles {
  static constexpr int kNumbers = 1;  // along depth that are multiplied at once, in the place of one fp32 number
  static OLMOE_INLINE vf multiply_add(vf x, vf b, vf total) { return total + x * b; }
  static OLMOE_INLINE vf multiplied(vf x) { return x; }  // what numbers become for that
  static void pack(const Factor& b, int first, int depth, int column, int columns, float* panels) {
    olmoe::pack(b, first, depth, column, columns, panels);
  }
  // Rows of A, whose numbers are read one after the other: each one's columns from `first` on, `depth` of them. What
  // has to be put in another place for that lies in `memory`, `stride` floats from row to row.
  static void rows(const Factor& a, int row, int count, int first, int depth, float* memory, const float** rows,
                   size_t stride = kDepth) {
    if (a.turned) turn(a, first, depth, row, count, memory, stride);
    for (int i = 0; i < count; i++) rows[i] = a.turned ? memory + size_t(i) * stride : row_of(a, row + i) + first;
  }
};

// A tile of C: rows of A from place `start` on, and a panel whose rows are `stride` floats apart. A function of its
// own, so that its pointers get all registers.
template <typename Numbers, int ROWS, int VECTORS>
__attribute__((noinline)) void product_tile(const float* const* a, size_t start, int depth, const float* panel,
                                            size_t stride, float* c, size_t ld, int columns, bool add) {
  const float* rows[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) rows[r] = a[r] + start;
  vf total[ROWS][VECTORS] = {};
  ptrdiff_t k = 0;
  do {
    vf b[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) b[v] = load(panel + v * W);
    panel += stride;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const vf x = splat(rows[r][k]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) total[r][v] = Numbers::multiply_add(x, b[v], total[r][v]);
    }
  } while (++k < depth);
  if (columns == VECTORS * W) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) {
        float* out = c + r * ld + v * W;
        store(out, add ? load(out) + total[r][v] : total[r][v]);
      }
    return;
  }
  for (int r = 0; r < ROWS; r++) {
    float line[VECTORS * W];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) store(line + v * W, total[r][v]);
    for (int i = 0; i < columns; i++) c[r * ld + i] = add ? c[r * ld + i] + line[i] : line[i];
  }
}

using Tile = decltype(&product_tile<Singles, 1, 1>);

template <typename Numbers, int ROWS>
inline Tile tile_of(int vectors) {
  if (vectors == 1) return &product_tile<Numbers, ROWS, 1>;
  if (vectors == 2) return &product_tile<Numbers, ROWS, 2>;
  if constexpr (kColumnVectors > 2) {
    if (vectors == 3) return &product_tile<Numbers, ROWS, 3>;
    return &product_tile<Numbers, ROWS, 4>;
  }
  __builtin_unreachable();
}

template <typename Numbers>
inline Tile tile_of(int rows, int vectors) {
  switch (rows) {
    case 1: return tile_of<Numbers, 1>(vectors);
    case 2: return tile_of<Numbers, 2>(vectors);
    case 3: return tile_of<Numbers, 3>(vectors);
    case 4: return tile_of<Numbers, 4>(vectors);
    case 5: return tile_of<Numbers, 5>(vectors);
    default: return tile_of<Numbers, kSumRows>(vectors);
  }
}

// Rows of C in tiles; the last two are about equal: with few sums at a time a tile waits for their latency.
inline int tile_rows(int left) { return left <= kSumRows ? left : left < 2 * kSumRows ? (left + 1) / 2 : kSumRows; }

template <typename Numbers = Singles>
inline void product(const Factor& a, int m, int depth, const Factor& b, int n, float* c, size_t ld, bool add,
                    float* scratch) {
  float* panels = scratch;
  float* row_memory = scratch + size_t(kDepth) * kProductColumns;
  if (depth == 0 && !add)
    for (int i = 0; i < m; i++) std::memset(c + i * ld, 0, size_t(n) * sizeof(float));
  const float* rows[kProductRows];
  constexpr int kPart = kDepth * Numbers::kNumbers;
  for (int i0 = 0; i0 < m; i0 += kProductRows) {
    const int tall = m - i0 < kProductRows ? m - i0 : kProductRows;
    for (int k0 = 0; k0 < depth; k0 += kPart) {
      const int part = depth - k0 < kPart ? depth - k0 : kPart;
      const int places = (part + Numbers::kNumbers - 1) / Numbers::kNumbers;
      Numbers::rows(a, i0, tall, k0, part, row_memory, rows);
      for (int j0 = 0; j0 < n; j0 += kPanels * kPanelColumns) {
        const int wide = n - j0 < kPanels * kPanelColumns ? n - j0 : kPanels * kPanelColumns;
        Numbers::pack(b, k0, part, j0, wide, panels);
        for (int p = 0; p < wide; p += kPanelColumns) {
          const int columns = wide - p < kPanelColumns ? wide - p : kPanelColumns;
          for (int i = 0; i < tall;) {
            const int count = tile_rows(tall - i), vectors = vectors_of(columns);
            tile_of<Numbers>(count, vectors)(rows + i, 0, places, panels + size_t(p) * places, vectors * W,
                                             c + (i0 + i) * ld + j0 + p, ld, columns, add || k0 > 0);
            i += count;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace olmoe
