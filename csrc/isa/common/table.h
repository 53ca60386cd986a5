// The kernels of the instruction set that the including file is compiled for, as one table. That file has included what
// multiplies packed rows, `packed_rows`.
#pragma once

#include "attention.h"
#include "bf16_products.h"
#include "bf16_rows.h"
#include "causal.h"
#include "elementwise.h"
#include "encode.h"
#include "float_rows.h"
#include "float_tiles.h"
#include "four_bit.h"
#include "gradients.h"
#include "products.h"
#include "sampling.h"

namespace olmoe {
namespace {

inline void rows(Type type, const uint8_t* group, int rows, int columns, const ActivationRow* x, int tokens, float* out,
                 int ld, const uint8_t* next) {
  switch (type) {
    case Type::kBF16: return float_rows<Type::kBF16>(group, rows, columns, x, tokens, out, ld);
    case Type::kF16: return float_rows<Type::kF16>(group, rows, columns, x, tokens, out, ld);
    case Type::kF32: return float_rows<Type::kF32>(group, rows, columns, x, tokens, out, ld);
    default:
      return with_packed(
          type, [&]<typename Format>() { packed_rows<Format::kType>(group, rows, columns, x, tokens, out, ld, next); });
  }
}

// Vectors of 16 have enough registers for rows and tokens that widening half precision as it is read costs nothing.
constexpr bool kHalfTiles = W < 16;
constexpr int kNever = 1 << 30, kManyHalf = kHalfTiles ? 12 : kNever;

inline void tiles(Type type, const uint8_t* group, int rows, int columns, const ActivationRow* x, int tokens,
                  float* out, int ld, float* scratch, const uint8_t* next) {
  if (type == Type::kF32) return float_tiles<Type::kF32>(group, rows, columns, x, tokens, out, ld, scratch, next);
  if constexpr (kHalfTiles) {
    if (type == Type::kBF16) return float_tiles<Type::kBF16>(group, rows, columns, x, tokens, out, ld, scratch, next);
    if (type == Type::kF16) return float_tiles<Type::kF16>(group, rows, columns, x, tokens, out, ld, scratch, next);
  }
}

#if defined(__AVX512BF16__)
constexpr auto kBF16Rows = &bf16_rows;
constexpr auto kBF16Product = &bf16_product;
#else
constexpr decltype(Kernels::bf16_product) kBF16Product = nullptr;
constexpr decltype(Kernels::bf16_rows) kBF16Rows = nullptr;
#endif

inline Kernels make_table(const char* name) {
  return Kernels{.name = name,
                 .rms_norm = rms_norm,
                 .quantize = quantize,
                 .rows = rows,
                 .bf16_rows = kBF16Rows,
                 .lanes = W,
                 .many = {16, kManyHalf, kManyHalf},
                 .tiles = tiles,
                 .split_lanes = split_lanes,
                 .swiglu = swiglu,
                 .rope = rope,
                 .softmax = softmax,
                 .axpy = axpy,
                 .attention = attention,
                 .read = read,
                 .quantize_row = quantize_row,
                 .store = store_as,
                 .load = load_from,
                 .search = search,
                 .compensate = kFuses ? &compensate : nullptr,
                 .decode_book = decode_book,
                 .encode_book = encode_book,
                 .copy_finite = copy_finite,
                 .largest = largest,
                 .smallest_finite = smallest_finite,
                 .mask_scores = mask_scores,
                 .scale_scores = scale_scores,
                 .exponentials = exponentials,
                 .drop_below = drop_below,
                 .block_sums = block_sums,
                 .block_maxima = block_maxima,
                 .at_least = at_least,
                 .digits_below = digits_below,
                 .with_digit = with_digit,
                 .rotate = rotate,
                 .combine = combine,
                 .swiglu_backward = swiglu_backward,
                 .rms_norm_backward = rms_norm_backward,
                 .cross_entropy = cross_entropy,
                 .product = product,
                 .bf16_product = kBF16Product,
                 .causal_attention = causal_attention<Singles>,
                 .causal_backward = causal_backward<Singles>,
                 .bf16_causal_attention = kBF16Causal,
                 .bf16_causal_backward = kBF16CausalBackward};
}

}  // namespace
}  // namespace olmoe
