// Blocks of kBookBlock values, each stored as a 4-bit index into a code book whose entries are scaled by the block's
// largest magnitude (olmoe/quant/formats/four_bit.py). A byte holds two values, the first in its upper half.
#pragma once

#include "elementwise.h"

namespace olmoe {
namespace {

template <Type T>
inline void decode_book_as(const uint8_t* codes, const float* scales, int blocks, const float* entries, void* out) {
  const Book book(entries);
  for (int b = 0; b < blocks; b++) {
    const vf scale = splat(scales[b]);
    for (int i = 0; i < kBookBlock; i += W) {
      const size_t at = size_t(b) * kBookBlock + i;
      const vf values = book.at(codes + at / 2) * scale;
      if constexpr (T == Type::kF32) store((float*)out + at, values);
      if constexpr (T == Type::kBF16) store_bf16((uint16_t*)out + at, values);
      if constexpr (T == Type::kF16) store_f16((uint16_t*)out + at, values);
    }
  }
}

inline void decode_book(const uint8_t* codes, const float* scales, int blocks, const float* entries, Type type,
                        void* out) {
  if (type == Type::kBF16) return decode_book_as<Type::kBF16>(codes, scales, blocks, entries, out);
  if (type == Type::kF16) return decode_book_as<Type::kF16>(codes, scales, blocks, entries, out);
  decode_book_as<Type::kF32>(codes, scales, blocks, entries, out);
}

template <Type T>
inline void encode_book_as(const void* x, int blocks, const float* bounds, const uint8_t* numbers, uint8_t* codes,
                           float* scales) {
  constexpr int kVectors = kBookBlock / W;
  constexpr float kTiny = 1e-38f;  // keeps the inverse of a block of zeros finite
  typedef uint8_t vb __attribute__((vector_size(W)));
  for (int b = 0; b < blocks; b++) {
    vf v[kVectors];
    vi most = {};
    for (int i = 0; i < kVectors; i++) {
      v[i] = load_as<T>(x, size_t(b) * kBookBlock + i * W);
      const vi magnitude = magnitude_bits(v[i]);
      most = magnitude > most ? magnitude : most;
    }
    const float largest = number_of(largest_lane(most));
    scales[b] = largest;
    const vf inverse = splat(1.0f / (largest < kTiny ? kTiny : largest));  // NaN passes
    uint8_t ranks[kBookBlock];
    for (int i = 0; i < kVectors; i++) {
      const vf scaled = v[i] * inverse;
      vi rank = {};
      for (int j = 0; j < kBookEntries - 1; j++) rank -= scaled > splat(bounds[j]);
      const vb bytes = __builtin_convertvector(rank, vb);
      std::memcpy(ranks + i * W, &bytes, W);
    }
    uint8_t* target = codes + size_t(b) * kBookBlock / 2;
    for (int i = 0; i < kBookBlock / 2; i++)
      target[i] = uint8_t(numbers[ranks[2 * i]] << 4 | numbers[ranks[2 * i + 1]]);
  }
}

inline void encode_book(const void* x, Type type, int blocks, const float* bounds, const uint8_t* numbers,
                        uint8_t* codes, float* scales) {
  if (type == Type::kBF16) return encode_book_as<Type::kBF16>(x, blocks, bounds, numbers, codes, scales);
  if (type == Type::kF16) return encode_book_as<Type::kF16>(x, blocks, bounds, numbers, codes, scales);
  encode_book_as<Type::kF32>(x, blocks, bounds, numbers, codes, scales);
}

}  // namespace
}  // namespace olmoe
