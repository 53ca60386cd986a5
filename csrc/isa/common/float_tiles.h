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

// W x W values transposed.
OLMOE_INLINE void transpose(vf (&v)[W]) {
#if defined(__AVX512F__)
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
#elif defined(__AVX2__)
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
#else
  for (int i = 0; i < W; i++)
    for (int j = 0; j < i; j++) {
      const float x = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = x;
    }
#endif
}

OLMOE_INLINE vf broadcast(const float* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(*p);
#elif defined(__AVX2__)
  return (vf)_mm256_broadcast_ss(p);
#else
  return vf{*p, *p, *p, *p};
#endif
}

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

#if defined(__AVX2__) && !defined(__AVX512F__)
// Two steps of eight rows of bf16: transposed as they are, which takes half the shuffles, and widened where they go.
OLMOE_INLINE void pack_bf16(const uint8_t* rows, size_t row_bytes, size_t lane_size, float* place) {
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
    float* lane = place + l * lane_size;
    store(lane, (vf)_mm256_permute2x128_si256(low, high, 0x20));
    store(lane + kTileRows, (vf)_mm256_permute2x128_si256(low, high, 0x31));
  }
}
#endif

// Up to kPanelRows rows, widened: [tile of rows][lane][step][row of the tile]. Rows that do not exist are zeros.
template <Type T>
inline void pack_panel(const uint8_t* weight, size_t row_bytes, int rows, int steps, float* panel) {
  const size_t stride = lane_stride(steps);
  for (int r = 0; r < rows; r += W) {
    float* place = panel + r / kTileRows * W * stride + r % kTileRows;
    const uint8_t* first = weight + r * row_bytes;
    const int count = rows - r < W ? rows - r : W;
    int i = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (T == Type::kBF16 && count == W)
      for (; i + 2 <= steps; i += 2)
        pack_bf16(first + size_t(i) * W * 2, row_bytes, stride, place + size_t(i) * kTileRows);
#endif
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
      for (int l = 0; l < W; l++) store(place + l * stride + size_t(i) * kTileRows, v[l]);
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

// Lines of weights that are needed next, fetched into the second cache in so many parts.
struct Ahead {
  const uint8_t* place;
  size_t lines;
  int part, parts;

  void fetch() {
    if (!place) return;
    const size_t begin = lines * part / parts, end = lines * ++part / parts;
    fetch_ahead(place + 64 * begin, 64 * (end - begin));
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
  const size_t row_bytes = size_t(columns) * (T == Type::kF32 ? 4 : 2);
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
