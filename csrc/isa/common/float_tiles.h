// Products of row-major fp32, bf16 or fp16 rows with many activations: weights are widened to fp32 once, into a panel
// that stays in the cache, and multiplied by tiles of tokens held in registers.
//
// The products of a row with a single token (float_rows.h) add in W lanes, lane l taking the columns l, l + W, ..., and
// then add the lanes two by two. Here a lane is a pass of its own, over the columns of one residue modulo W, and the
// passes are added in the same pairs. So the result is the same to the last bit, whichever of the two computes it.
#pragma once

#include "simd.h"

namespace olmoe {
namespace {

constexpr int kTileRows = 2 * W;               // two vectors of rows
constexpr int kTileTokens = W == 16 ? 12 : 6;  // as many sums as there are registers for
constexpr int kTilesInPanel = kPanelRows / kTileRows;
static_assert(kPanelRows % kTileRows == 0);

// Activations by residue: x[column + i] to lanes[(column + i) % W * steps + (column + i) / W], for i below `count`.
// `column` is a multiple of W; columns beyond the last whole vector are left out.
inline void split_lanes(const float* x, int column, int count, int columns, float* lanes) {
  const int steps = columns / W;
  for (int i = 0; i + W <= count; i += W)
    for (int l = 0; l < W; l++) lanes[size_t(l) * steps + (column + i) / W] = x[i + l];
}

// Floats from the values of one lane to those of the next: not a power of two, or all would fall into the same few
// sets of the cache.
inline size_t lane_stride(int steps) { return size_t(steps) * kTileRows + 16; }

// Up to kPanelRows rows, widened: [tile of rows][lane][step][row of the tile]. Rows that do not exist are zeros.
template <Type T>
inline void pack_panel(const uint8_t* weight, size_t row_bytes, int rows, int steps, float* panel) {
  const size_t stride = lane_stride(steps);
  for (int r = 0; r < rows; r += W) {
    float* target = panel + r / kTileRows * W * stride + r % kTileRows;
    const uint8_t* first = weight + r * row_bytes;
    const int count = rows - r < W ? rows - r : W;
    int i = 0;
    if (kPacksBF16 && T == Type::kBF16 && count == W)
      for (; i + 2 <= steps; i += 2)
        pack_bf16(first + size_t(i) * W * 2, row_bytes, stride, kTileRows, target + size_t(i) * kTileRows);
    for (; i < steps; i++) {
      vf v[W];
      if (count == W) {
#pragma GCC unroll 16
        for (int j = 0; j < W; j++) v[j] = load_as<T>(first + j * row_bytes, size_t(i) * W);
      } else {
        for (int j = 0; j < W; j++) v[j] = j < count ? load_as<T>(first + j * row_bytes, size_t(i) * W) : vf{};
      }
      transpose(v);
#pragma GCC unroll 16
      for (int l = 0; l < W; l++) store(target + l * stride + size_t(i) * kTileRows, v[l]);
    }
  }
  for (int r = (rows + W - 1) / W * W; r % kTileRows; r += W)
    for (int l = 0; l < W; l++)
      for (int i = 0; i < steps; i++)
        store(panel + r / kTileRows * W * stride + l * stride + size_t(i) * kTileRows + r % kTileRows, vf{});
}

// One lane's share of kTileRows rows times TOKENS tokens, added to the shares of the lanes before it. Shares are added
// as a binary counter is: the n-th (from 0) to as many earlier sums as n ends in ones. sums [level][token][kPanelRows].
// A function of its own, so that its pointers get all registers.
template <int TOKENS>
__attribute__((noinline)) void lane_tile(const float* panel, int steps, const ActivationRow* x, size_t start, int n,
                                         float* sums, size_t level_size) {
  const float* a[TOKENS];
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; t++) a[t] = x[t].lanes + start;
  vf total[TOKENS][2] = {};
  ptrdiff_t i = 0;
  do {
    const vf b0 = load(panel), b1 = load(panel + W);
    panel += kTileRows;
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
      const vf v = broadcast(a[t] + i);
      total[t][0] += b0 * v;
      total[t][1] += b1 * v;
    }
  } while (++i < steps);
  for (; n & 1; n >>= 1, sums += level_size)
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
      total[t][0] = load(sums + t * kPanelRows) + total[t][0];
      total[t][1] = load(sums + t * kPanelRows + W) + total[t][1];
    }
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; t++) {
    store(sums + t * kPanelRows, total[t][0]);
    store(sums + t * kPanelRows + W, total[t][1]);
  }
}

// lane_tile for `count` tokens, up to TOKENS.
template <int TOKENS>
inline void lane_tile_of(int count, const float* panel, int steps, const ActivationRow* x, size_t start, int n,
                         float* sums, size_t level_size) {
  if (count == TOKENS) return lane_tile<TOKENS>(panel, steps, x, start, n, sums, level_size);
  if constexpr (TOKENS > 1) lane_tile_of<TOKENS - 1>(count, panel, steps, x, start, n, sums, level_size);
}

// Lines of weights that are needed next, fetched into the second-level cache in this many parts.
struct Ahead {
  const uint8_t* address;
  size_t lines;
  int part, parts;

  void fetch() {
    if (!address) return;
    const size_t begin = lines * part / parts, end = lines * ++part / parts;
    fetch_ahead(address + 64 * begin, 64 * (end - begin));
  }
};

inline int tiles_of(int tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

// lane_tile for all tokens. The last two tiles are about equal: with few sums at a time a tile waits for their latency.
inline void lane_tiles(const float* panel, int steps, const ActivationRow* x, int tokens, size_t start, int n,
                       float* sums, size_t level_size, Ahead& ahead) {
  while (tokens > 0) {
    const int count = tokens <= kTileTokens ? tokens : tokens < 2 * kTileTokens ? (tokens + 1) / 2 : kTileTokens;
    ahead.fetch();
    lane_tile_of<kTileTokens>(count, panel, steps, x, start, n, sums, level_size);
    tokens -= count, x += count, sums += count * kPanelRows;
  }
}

template <Type T>
inline void float_tiles(const uint8_t* group, int rows, int columns, const ActivationRow* x, int tokens, float* out,
                        int ld, float* scratch, const uint8_t* next) {
  const size_t row_bytes = size_t(columns) * sizeof_type(T);
  const int steps = columns / W;
  const size_t stride = lane_stride(steps), level_size = size_t(tokens) * kPanelRows;
  float* panel = scratch;
  float* sums = scratch + kTilesInPanel * W * stride;
  for (int r0 = 0; r0 < rows; r0 += kPanelRows) {
    const int count = rows - r0 < kPanelRows ? rows - r0 : kPanelRows;
    const uint8_t* weight = group + r0 * row_bytes;
    pack_panel<T>(weight, row_bytes, count, steps, panel);
    const bool more = r0 + kPanelRows < rows;
    const int left = rows - r0 - kPanelRows, after = more && left < kPanelRows ? left : kPanelRows;
    Ahead ahead{more ? weight + kPanelRows * row_bytes : next, after * row_bytes / 64, 0,
                W * ((count + kTileRows - 1) / kTileRows) * tiles_of(tokens)};
    int lane = 0, levels = 0;
    for (int n = 0; n < W; n++) {
      for (int r = 0; r < count; r += kTileRows)
        lane_tiles(panel + (r / kTileRows * W + lane) * stride, steps, x, tokens, size_t(lane) * steps, n, sums + r,
                   level_size, ahead);
      int bit = W / 2;  // the next lane: a counter whose highest bit counts first, as halves of a vector are added
      for (; lane & bit; bit /= 2) lane ^= bit;
      lane ^= bit;
    }
    for (int w = W; w > 1; w /= 2) levels++;
    for (int t = 0; t < tokens; t++) {
      const float* total = sums + levels * level_size + size_t(t) * kPanelRows;
      float* y = out + size_t(t) * ld + r0;
      if (columns % W == 0) {
        std::memcpy(y, total, size_t(count) * sizeof(float));
        continue;
      }
      for (int r = 0; r < count; r++) {
        float s = total[r];
        for (int c = steps * W; c < columns; c++)
          s = multiply_add(scalar_as<T>(weight + r * row_bytes, c), x[t].f32[c], s);
        y[r] = s;
      }
    }
  }
}

}  // namespace
}  // namespace olmoe
