// Products of 16 interleaved rows of int4, int5 or int8 codes with int8 activations, a tile of tokens at a time.
//
// Codes are unsigned (value + 8, + 16, + 128) and activations signed, as the dot-product instructions want them; the
// activation's `correction` takes the offset out again, in exact integers. Each block of 32 columns is summed in
// int32, then scaled and added in fp32.
//
// This is what instruction sets with wide vectors share. The file that includes this has, for TOKENS columns of
// activations against GROUPS groups `group_bytes` apart, `rows` rows in all:
// - packed_tile, for many tokens: kPackedTile<GROUPS> at a time, of kTileGroups groups;
// - packed_streams, for at most kStreamedTokens: memory is what counts then, and several streams of it flow faster
//   than one. What lies `ahead` bytes further on is fetched; by tiles too, among at most kFetchedTokens.
#pragma once

#include "simd.h"

namespace olmoe {
namespace {

template <Type T, int GROUPS>
inline void packed_band(const uint8_t* group, size_t group_bytes, ptrdiff_t ahead, int blocks, int rows,
                        const ActivationRow* x, int tokens, float* out, int ld) {
  // As many tokens as there are registers for their sums.
  constexpr int kTile = kPackedTile<GROUPS>;
  int t = 0;
  auto tile = [&]<int TOKENS>() {
    const bool fetch_next = tokens <= kFetchedTokens && t == 0;
    packed_tile<T, GROUPS, TOKENS>(group, group_bytes, fetch_next ? ahead : 0, blocks, rows, x + t,
                                   out + size_t(t) * ld, ld);
    t += TOKENS;
  };
  while (t + kTile <= tokens) tile.template operator()<kTile>();
  if constexpr (kTile > 4)
    if (t + 4 <= tokens) tile.template operator()<4>();
  if (t + 2 <= tokens) tile.template operator()<2>();
  while (t < tokens) tile.template operator()<1>();
}

template <Type T>
inline void packed_rows(const uint8_t* group, int rows, int columns, const ActivationRow* x, int tokens, float* out,
                        int ld, const uint8_t* next) {
  const int blocks = columns / kBlock;
  const size_t group_bytes = Packed<T>::group_bytes(blocks);
  int r = 0;
  // How far it is from the `count` groups from row r on to what comes after them; 0 where that is not known.
  auto ahead = [&](int r, int count) {
    const uint8_t* here = group + r / kGroup * group_bytes;
    return rows - r > count * kGroup ? ptrdiff_t(count * group_bytes) : next ? next - here : 0;
  };
  auto band = [&]<int GROUPS>() {
    packed_band<T, GROUPS>(group + r / kGroup * group_bytes, group_bytes, ahead(r, GROUPS), blocks,
                           rows - r < GROUPS * kGroup ? rows - r : GROUPS * kGroup, x, tokens, out + r, ld);
    r += GROUPS * kGroup;
  };
  if (tokens <= kStreamedTokens) {
    auto streams = [&]<int TOKENS>(int t) {
      for (int r = 0; r < rows; r += 4 * kGroup) {
        const uint8_t* first = group + r / kGroup * group_bytes;
        float* target = out + size_t(t) * ld + r;
        if (rows - r > 3 * kGroup)
          packed_streams<T, 4, TOKENS>(first, group_bytes, ahead(r, 4), blocks, rows - r, x + t, target, ld);
        else
          for (int s = 0; s < rows - r; s += kGroup)
            packed_streams<T, 1, TOKENS>(first + s / kGroup * group_bytes, group_bytes, ahead(r + s, 1), blocks,
                                         rows - r - s, x + t, target + s, ld);
      }
    };
    int t = 0;
    if constexpr (kStreamedTokens >= 4)
      for (; t + 4 <= tokens; t += 4) streams.template operator()<4>(t);
    if constexpr (kStreamedTokens >= 2) {
      if (tokens - t == 3) return streams.template operator()<3>(t);
      if (tokens - t == 2) return streams.template operator()<2>(t);
    }
    if (t < tokens) streams.template operator()<1>(t);
    return;
  }
  if constexpr (kTileGroups == 2)
    while (r + kGroup < rows) band.template operator()<2>();
  while (r < rows) band.template operator()<1>();
}

}  // namespace
}  // namespace olmoe
