// Products of 16 interleaved rows of int4, int5 or int8 codes with int8 activations, for whatever the baseline is:
// vectors of 16 bytes that multiply pairs of 16-bit integers and add the two products.
//
// A block's codes are decoded once for all tokens of a tile, to pairs in the order in which masks and shifts leave
// them: of the four columns 4j..4j+3 of a row, which lie together, the even ones and the odd ones. Those of an
// activation are taken apart in the same way. Integers are exact, so the order matters to nothing but speed.
#pragma once

#include "../common/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace olmoe {
namespace {

static_assert(W == 4);
typedef int16_t vs __attribute__((vector_size(16)));

constexpr int kRowVectors = kGroup / W;  // of rows
constexpr int kPairs = kBlock / 2;       // of columns: 2j has 4j and 4j+2, 2j+1 has 4j+1 and 4j+3

// a[2i] * b[2i] + a[2i+1] * b[2i+1]
OLMOE_INLINE vi multiply_pairs(vs a, vs b) {
#if defined(__SSE2__)
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const vi x = (vi)a, y = (vi)b;
  return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

// The fifth bits, in their place, of the even and the odd columns of quad j for the rows of vector v.
OLMOE_INLINE void fifth_bits(const uint8_t* block, int j, int v, vi& even, vi& odd) {
  const int low = block[8 * j + 2 * v], high = block[8 * j + 2 * v + 1];
  const vi bits = {low & 15, low >> 4, high & 15, high >> 4};
  even = (bits & 1) << 4 | (bits & 4) << 18;
  odd = (bits & 2) << 3 | (bits & 8) << 17;
}

// Codes of a block: pairs[p][v] has those of pair p for the rows of vector v.
template <Type T>
OLMOE_INLINE void decode(const uint8_t* block, vs (&pairs)[kPairs][kRowVectors]) {
  auto put = [&](int quad, int v, vi even, vi odd) {
    if constexpr (Packed<T>::kBits == 5) {
      vi fifth_even, fifth_odd;
      fifth_bits(block, quad, v, fifth_even, fifth_odd);
      even |= fifth_even, odd |= fifth_odd;
    }
    pairs[2 * quad][v] = (vs)even, pairs[2 * quad + 1][v] = (vs)odd;
  };
  for (int j = 0; j < (Packed<T>::kBits < 8 ? 4 : 8); j++)
    for (int v = 0; v < kRowVectors; v++) {
      vi x;
      if constexpr (Packed<T>::kBits < 8) {
        constexpr int kNibbles = 0x000f000f;
        std::memcpy(&x, block + Packed<T>::kNibblesAt + 64 * j + 16 * v, sizeof x);
        put(j, v, x & kNibbles, x >> 8 & kNibbles);
        put(4 + j, v, x >> 4 & kNibbles, x >> 12 & kNibbles);
      } else {
        constexpr int kBytes = 0x00ff00ff;
        std::memcpy(&x, block + 64 * j + 16 * v, sizeof x);
        put(j, v, x & kBytes, x >> 8 & kBytes);
      }
    }
}

// The products of a decoded block with one token's, added to `total`.
OLMOE_INLINE void add_block(const vs (&pairs)[kPairs][kRowVectors], const vf (&scale)[kRowVectors],
                            const ActivationBlock& x, vf (&total)[kRowVectors]) {
  vi s[kRowVectors];
  for (int v = 0; v < kRowVectors; v++) s[v] = vi{} + x.correction;
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    vs q;
    std::memcpy(&q, x.q + 16 * half, sizeof q);
    const vi even = (vi)(q << 8 >> 8), odd = (vi)(q >> 8);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
      for (int v = 0; v < kRowVectors; v++) {
        const int pair = 2 * (4 * half + j);
        s[v] += multiply_pairs(pairs[pair][v], (vs)(vi{} + even[j]));
        s[v] += multiply_pairs(pairs[pair + 1][v], (vs)(vi{} + odd[j]));
      }
  }
  for (int v = 0; v < kRowVectors; v++)
    total[v] = multiply_add(__builtin_convertvector(s[v], vf), scale[v] * x.d, total[v]);
}

// See Kernels::rows.
template <Type T>
inline void packed_rows(const uint8_t* group, int rows, int columns, const ActivationRow* x, int tokens, float* out,
                        int ld, const uint8_t*) {
  constexpr int kTile = 32;  // tokens whose sums and blocks stay in the first cache
  const int blocks = columns / kBlock;
  for (int r = 0; r < rows; r += kGroup, group += Packed<T>::group_bytes(blocks)) {
    const uint8_t* scales = group + size_t(blocks) * Packed<T>::kCodeBytes;
    const size_t bytes = size_t(rows - r < kGroup ? rows - r : kGroup) * sizeof(float);
    for (int t = 0; t < tokens; t += kTile) {
      const int count = tokens - t < kTile ? tokens - t : kTile;
      vf total[kTile][kRowVectors];
      for (int i = 0; i < count; i++)
        for (vf& sum : total[i]) sum = vf{};
      for (int b = 0; b < blocks; b++) {
        vs pairs[kPairs][kRowVectors];
        vf scale[kRowVectors];
        decode<T>(group + size_t(b) * Packed<T>::kCodeBytes, pairs);
        uint16_t halves[kGroup];
        std::memcpy(halves, scales + size_t(b) * Packed<T>::kScaleBytes, sizeof halves);
        for (int v = 0; v < kRowVectors; v++) scale[v] = load_f16(halves + W * v);
        for (int i = 0; i < count; i++) add_block(pairs, scale, x[t + i].blocks[b], total[i]);
      }
      for (int i = 0; i < count; i++) std::memcpy(out + size_t(t + i) * ld + r, total[i], bytes);
    }
  }
}

}  // namespace
}  // namespace olmoe
