// Products with packed matrices by AVX-512 with VNNI; see isa/common/packed_rows.h, which is over them.
#pragma once

#include "../common/fetch.h"

namespace olmoe {
namespace {

// The codes of columns 4j..4j+3 (`low`) and 16+4j..16+4j+3 of 16 rows, of a block in 4 or 5 bits.
template <Type T>
OLMOE_INLINE void unpack(const uint8_t* codes, int j, __m512i& low, __m512i& high) {
  const __m512i low_nibble = _mm512_set1_epi8(15);
  const __m512i v = _mm512_loadu_si512(codes + Packed<T>::kNibblesAt + 64 * j);
  low = _mm512_and_si512(v, low_nibble);
  high = _mm512_and_si512(_mm512_srli_epi16(v, 4), low_nibble);
  if constexpr (Packed<T>::kBits == 5) {
    const __m512i fifth = _mm512_set1_epi8(16);
    uint64_t bits[2];
    std::memcpy(&bits[0], codes + 8 * j, 8);
    std::memcpy(&bits[1], codes + 8 * (4 + j), 8);
    low = _mm512_mask_add_epi8(low, bits[0], low, fifth);
    high = _mm512_mask_add_epi8(high, bits[1], high, fifth);
  }
}

// Sums of a tile that has `rows` rows to where they go.
template <int GROUPS, int TOKENS>
OLMOE_INLINE void store_sums(const __m512 (&total)[GROUPS][TOKENS], int rows, float* out, int ld) {
  for (int g = 0; g < GROUPS; g++) {
    const int count = rows - g * kGroup;
    const __mmask16 mask = count >= kGroup ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
    for (int t = 0; t < TOKENS; t++) _mm512_mask_storeu_ps(out + size_t(t) * ld + g * kGroup, mask, total[g][t]);
  }
}

template <Type T, int GROUPS, int TOKENS>
OLMOE_INLINE void packed_tile(const uint8_t* group, size_t group_bytes, ptrdiff_t, int blocks, int rows,
                              const ActivationRow* x, float* out, int ld) {
  constexpr int kBytes = Packed<T>::kCodeBytes;
  __m512 total[GROUPS][TOKENS];
  const ActivationBlock* a[TOKENS];
  for (int t = 0; t < TOKENS; t++) {
    a[t] = x[t].blocks;
    for (int g = 0; g < GROUPS; g++) total[g][t] = _mm512_setzero_ps();
  }
  for (int b = 0; b < blocks; b++) {
    __m512i w[GROUPS][8];
    __m512 scale[GROUPS];
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      const uint8_t* codes = group + g * group_bytes + size_t(b) * kBytes;
      const uint8_t* scales = group + g * group_bytes + size_t(blocks) * kBytes + size_t(b) * 2 * kGroup;
      if constexpr (Packed<T>::kBits < 8) {
        for (int j = 0; j < 4; j++) unpack<T>(codes, j, w[g][j], w[g][4 + j]);
      } else {
        for (int j = 0; j < 8; j++) w[g][j] = _mm512_loadu_si512(codes + 64 * j);
      }
      scale[g] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)scales));
    }
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; t++) {
      const ActivationBlock& block = a[t][b];
      int32_t q[8];
      std::memcpy(q, block.q, sizeof q);
      __m512i s[GROUPS], odd[GROUPS];
      for (int g = 0; g < GROUPS; g++) s[g] = _mm512_set1_epi32(block.correction), odd[g] = _mm512_setzero_si512();
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        __m512i a4 = _mm512_set1_epi32(q[j]);
        // Broadcast once into a register where two groups share it: loads are what this loop would wait for.
        if constexpr (GROUPS > 1) asm("" : "+v"(a4));
        for (int g = 0; g < GROUPS; g++) {
          // Few tokens would wait for their one chain of sums, so they get two.
          __m512i& chain = TOKENS <= 2 && j % 2 ? odd[g] : s[g];
          chain = _mm512_dpbusd_epi32(chain, w[g][j], a4);
        }
      }
      const __m512 d = _mm512_set1_ps(block.d);
      for (int g = 0; g < GROUPS; g++) {
        if constexpr (TOKENS <= 2) s[g] = _mm512_add_epi32(s[g], odd[g]);
        total[g][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(s[g]), _mm512_mul_ps(scale[g], d), total[g][t]);
      }
    }
  }
  store_sums(total, rows, out, ld);
}

// Few tokens against GROUPS groups side by side: memory is what counts, and several streams of it flow faster than one.
template <Type T, int GROUPS, int TOKENS>
OLMOE_INLINE void packed_streams(const uint8_t* group, size_t group_bytes, ptrdiff_t ahead, int blocks, int rows,
                                 const ActivationRow* x, float* out, int ld) {
  constexpr int kBytes = Packed<T>::kCodeBytes;
  __m512 total[GROUPS][TOKENS];
  const ActivationBlock* a[TOKENS];
  for (int t = 0; t < TOKENS; t++) {
    a[t] = x[t].blocks;
    for (int g = 0; g < GROUPS; g++) total[g][t] = _mm512_setzero_ps();
  }
  for (int b = 0; b < blocks; b++) {
    constexpr int kSoon = GROUPS * (kBytes + Packed<T>::kScaleBytes);
    const uint8_t* soon = group + ahead + size_t(b) * kSoon;
    int32_t q[TOKENS][8];
    for (int t = 0; t < TOKENS; t++) std::memcpy(q[t], a[t][b].q, sizeof q[t]);
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      const uint8_t* codes = group + g * group_bytes + size_t(b) * kBytes;
      const uint8_t* scales = group + g * group_bytes + size_t(blocks) * kBytes + size_t(b) * 2 * kGroup;
      __m512i even[TOKENS], odd[TOKENS];
      for (int t = 0; t < TOKENS; t++) even[t] = _mm512_set1_epi32(a[t][b].correction), odd[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        fetch(soon, kSoon, 4 * g + j, 4 * GROUPS, even[0]);
        __m512i low, high;
        if constexpr (Packed<T>::kBits < 8) {
          unpack<T>(codes, j, low, high);
        } else {
          low = _mm512_loadu_si512(codes + 64 * j), high = _mm512_loadu_si512(codes + 256 + 64 * j);
        }
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) {
          even[t] = _mm512_dpbusd_epi32(even[t], low, _mm512_set1_epi32(q[t][j]));
          odd[t] = _mm512_dpbusd_epi32(odd[t], high, _mm512_set1_epi32(q[t][4 + j]));
        }
      }
      const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)scales));
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; t++)
        total[g][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(even[t], odd[t])),
                                      _mm512_mul_ps(scale, _mm512_set1_ps(a[t][b].d)), total[g][t]);
    }
  }
  store_sums(total, rows, out, ld);
}
// Up to this many tokens weights are read in several streams, which fetch; tiles are for more, and need not.
constexpr int kStreamedTokens = 8, kFetchedTokens = 0;

// As many tokens as there are registers for their sums.
constexpr int kTileGroups = 2;
template <int GROUPS>
constexpr int kPackedTile = GROUPS > 1 ? 6 : 8;

}  // namespace
}  // namespace olmoe
