// Choosing codes for blocks of weights, on one thread: the arithmetic of olmoe/quant/search.py, operation by operation
// and in its order, so that both give the same bits. Lanes are rows: what depends only on a column is a scalar.
#pragma once

#include "simd.h"

namespace olmoe {
namespace {

// Where the extreme value of a block may land, TARGETS / 8 of olmoe/quant/search.py; and how often a scale is refined.
constexpr double kTargets[] = {8.6, 8.3, 8.0, 7.7, 7.4, 7.1, 6.8, -6.4, -6.7, -7.0, -7.3, -7.6};
constexpr int kRefinements = 2;
// Columns between values of a block whose products are added first: the order of torch's sums.
constexpr int kFold = 8;

// A product that is rounded before it is added to: without this, compilers make one operation of both.
OLMOE_INLINE vf rounded(vf x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFuses = true;
#else
constexpr bool kFuses = false;  // a call for each: torch is faster
#endif

// NaN stays NaN.
OLMOE_INLINE vf clamp(vf x, float low, float high) {
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
}

// Integers of at most 2^22, halves to even.
OLMOE_INLINE vf to_integers(vf x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  return rounded(rounded(x) + magic) - magic;
}

OLMOE_INLINE vf finite_reciprocal(vf x) {
  const vf inverse = 1.0f / x;
  return inverse - inverse == 0.0f ? inverse : vf{};
}

// What rounding to a scale does, as BlockFormat.round of olmoe/quant/formats/blocks.py: codes as stored, still fp32.
OLMOE_INLINE vf code_of(vf x, vf inverse_scale, int zero) {
  const vf cut = clamp(rounded(x * inverse_scale) + (zero + 0.5f), 0.0f, float(2 * zero - 1));
  return __builtin_convertvector(__builtin_convertvector(cut, vi), vf);
}

// The least-squares scale of integers `q(column)` and by how much it lowers the error; see `_fit`.
template <typename Integers>
OLMOE_INLINE void fit(const float* blocks, int ld, const float* importance, const Integers& q, vf& scale, vf& gain) {
  vf dot{}, norm{};
  for (int i = 0; i < kFold; i++) {
    vf dot_i{}, norm_i{};
    for (int c = i; c < kBlock; c += kFold) {
      const vf x = load(blocks + c * ld), integers = q(x);
      const vf weighted = rounded(importance[c] * x), wide = rounded(importance[c] * integers);
      dot_i += rounded(weighted * integers);
      norm_i += rounded(wide * integers);
    }
    dot += dot_i;
    norm += norm_i;
  }
  scale = norm > 0.0f ? dot / norm : vf{};
  gain = rounded(scale * dot);
}

// The scales of least weighted error, as fp16, of W rows with their columns `ld` floats apart; see `search`.
OLMOE_INLINE void search_scales(const float* blocks, int ld, const float* importance, int zero, uint16_t* out) {
  vf top = load(blocks), most = top < 0.0f ? -top : top;
  for (int c = 1; c < kBlock; c++) {
    const vf x = load(blocks + c * ld), size = x < 0.0f ? -x : x;
    top = size > most ? x : top;
    most = vmax(size, most);
  }
  const vf inverse = top == 0.0f ? vf{} : 1.0f / top;
  const float low = float(-zero), high = float(zero - 1);
  vf best = splat(-1.0f), scales{};
  for (const double target : kTargets) {
    const vf factor = inverse * float(-zero * (target / 8));
    vf scale, gain;
    fit(blocks, ld, importance, [&](vf x) { return to_integers(clamp(x * factor, low, high)); }, scale, gain);
    const auto better = gain > best;
    best = better ? gain : best;
    scales = better ? scale : scales;
  }
  for (int i = 0; i < kRefinements; i++) {
    const vf reciprocal = finite_reciprocal(scales);
    vf gain;
    fit(blocks, ld, importance, [&](vf x) { return code_of(x, reciprocal, zero) - float(zero); }, scales, gain);
  }
  store_f16(out, scales);
}

// Codes as stored of a block of kGroup rows (column by column, `ld` apart) to their slot; blocks.py has the layout.
inline void store_codes(const float* codes, int ld, Type type, uint8_t* out) {
  auto code = [&](int row, int column) { return uint32_t(codes[column * ld + row]); };
  if (type == Type::kQ5) {
    for (int j = 0; j < 8; j++) {
      uint64_t word = 0;
      for (int r = 0; r < kGroup; r++)
        for (int i = 0; i < 4; i++) word |= uint64_t(code(r, 4 * j + i) >> 4) << (4 * r + i);
      std::memcpy(out + 8 * j, &word, 8);
    }
    out += Packed<Type::kQ5>::kNibblesAt;
  }
  for (int j = 0; j < 4; j++)
    for (int v = 0; v < kGroup; v += W) {
      vi word{};
      for (int i = 0; i < 4; i++) {
        const vi first = __builtin_convertvector(load(codes + (4 * j + i) * ld + v), vi) & 15;
        const vi second = __builtin_convertvector(load(codes + (16 + 4 * j + i) * ld + v), vi) & 15;
        word |= (first | second << 4) << (8 * i);
      }
      std::memcpy(out + 64 * j + 4 * v, &word, sizeof word);
    }
}

// Some rows of a row-major matrix, transposed: out[column * kPanel + row], and zeros for rows that are not there.
template <Type T>
inline void transpose(const void* weight, int rows, int columns, int stride, float* out) {
  constexpr int kTile = 16;  // columns, which are a line of the cache or half of one
  for (int c = 0; c < columns; c += kTile)
    for (int r = 0; r < kPanel; r++)
      for (int i = c; i < c + kTile; i++)
        out[size_t(i) * kPanel + r] = r < rows ? scalar_as<T>(weight, size_t(r) * stride + i) : 0.0f;
}

inline void transpose(Type type, const uint8_t* weight, int rows, int columns, int stride, float* out) {
  if (type == Type::kF32) transpose<Type::kF32>(weight, rows, columns, stride, out);
  if (type == Type::kBF16) transpose<Type::kBF16>(weight, rows, columns, stride, out);
  if (type == Type::kF16) transpose<Type::kF16>(weight, rows, columns, stride, out);
}

// Where a block of a group goes: codes of all blocks, then scales, and groups one after the other.
struct Slot {
  uint8_t* codes;
  uint8_t* scales;
};
inline Slot slot_of(uint8_t* out, Type type, int blocks, int group, int block) {
  return with_packed(type, [&]<typename Format>() -> Slot {
    uint8_t* start = out + group * Format::group_bytes(blocks);
    return {start + size_t(block) * Format::kCodeBytes,
            start + size_t(blocks) * Format::kCodeBytes + block * Format::kScaleBytes};
  });
}

// See Kernels::search.
inline void search(const uint8_t* weight, Type stored, int rows, int columns, Type type, uint8_t* out) {
  alignas(64) float block[kBlock * kPanel], ones[kBlock];
  alignas(64) uint16_t scales[kPanel];
  for (float& one : ones) one = 1.0f;
  const int blocks = columns / kBlock, zero = zero_of(type);
  for (int b = 0; b < blocks; b++) {
    transpose(stored, weight + size_t(b) * kBlock * sizeof_type(stored), rows, kBlock, columns, block);
    for (int v = 0; v < rows; v += W) {
      search_scales(block + v, kPanel, ones, zero, scales + v);
      const vf inverse = finite_reciprocal(load_f16(scales + v));
      for (int c = 0; c < kBlock; c++) {
        float* x = block + c * kPanel + v;
        store(x, code_of(load(x), inverse, zero));
      }
    }
    for (int g = 0; g < rows / kGroup; g++) {
      const Slot slot = slot_of(out, type, blocks, g, b);
      store_codes(block + g * kGroup, kPanel, type, slot.codes);
      std::memcpy(slot.scales, scales + g * kGroup, 2 * kGroup);
    }
  }
}

// w[c] -= sum over k of factor[k][c] * errors[k] for kColumns columns of kVectors vectors; the sum first, by itself.
constexpr int kVectors = W == 16 ? 4 : 2;
OLMOE_INLINE void make_up(const float* factor, const float* errors, float* w) {
  vf sums[kColumns][kVectors] = {};
  for (int k = 0; k < kBlock; k++) {
    vf error[kVectors];
    for (int v = 0; v < kVectors; v++) error[v] = load(errors + k * kPanel + v * W);
    for (int c = 0; c < kColumns; c++)
      for (int v = 0; v < kVectors; v++) sums[c][v] = fused(splat(factor[k * kColumns + c]), error[v], sums[c][v]);
  }
  for (int c = 0; c < kColumns; c++)
    for (int v = 0; v < kVectors; v++) {
      float* target = w + c * kPanel + v * W;
      store(target, load(target) - sums[c][v]);
    }
}

// Rounds the columns of one block of W rows from left to right, each making up for what those before it changed.
// `block` ends as codes, `errors` as what later blocks make up for. See `compensate`.
OLMOE_INLINE void round_block(float* block, const float* u, const uint16_t* scales, int zero, float* errors) {
  const vf scale = load_f16(scales);
  const vf inverse = scale == 0.0f ? vf{} : 1.0f / scale;
  for (int c = 0; c < kBlock; c++) {
    const vf x = load(block + c * kPanel);
    const vf chosen = to_integers(clamp(x * inverse, float(-zero), float(zero - 1)));
    const vf error = (x - rounded(chosen * scale)) / u[c * kBlock + c];
    store(errors + c * kPanel, error);
    store(block + c * kPanel, chosen + float(zero));
    for (int j = c + 1; j < kBlock; j++) {
      float* target = block + j * kPanel;
      store(target, fused(splat(-u[c * kBlock + j]), error, load(target)));
    }
  }
}

// See Kernels::compensate.
inline void compensate(const uint8_t* weight, Type stored, int rows, int columns, const float* factor, Type type,
                       uint8_t* out, float* w) {
  alignas(64) float errors[kBlock * kPanel], importance[kBlock];
  alignas(64) uint16_t scales[kPanel];
  transpose(stored, weight, rows, columns, columns, w);
  const int blocks = columns / kBlock, zero = zero_of(type);
  for (int b = 0; b < blocks; b++) {
    float* block = w + size_t(b) * kBlock * kPanel;
    const float* u = factor;
    for (int c = 0; c < kBlock; c++) {
      const float square = u[c * kBlock + c] * u[c * kBlock + c];
      importance[c] = 1.0f / square;
    }
    for (int v = 0; v < kPanel; v += W) {
      search_scales(block + v, kPanel, importance, zero, scales + v);
      round_block(block + v, u, scales + v, zero, errors + v);
    }
    for (int g = 0; g < rows / kGroup; g++) {
      const Slot slot = slot_of(out, type, blocks, g, b);
      store_codes(block + g * kGroup, kPanel, type, slot.codes);
      std::memcpy(slot.scales, scales + g * kGroup, 2 * kGroup);
    }
    factor += kBlock * kBlock;
    for (int c = (b + 1) * kBlock; c < columns; c += kColumns, factor += kBlock * kColumns)
      for (int v = 0; v < kPanel; v += kVectors * W) make_up(factor, errors + v, w + size_t(c) * kPanel + v);
  }
}

}  // namespace
}  // namespace olmoe
