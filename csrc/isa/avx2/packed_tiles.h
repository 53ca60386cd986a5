// Products with packed matrices by AVX2; see isa/common/packed_rows.h, which is over them.
#pragma once

#include "../common/fetch.h"

namespace olmoe {
namespace {

// Four activations for all rows. Read one by one: of a copy of all 32, GCC makes a detour over the stack.
OLMOE_INLINE __m256i four(const int8_t* q) {
  int32_t v;
  std::memcpy(&v, q, 4);
  return _mm256_set1_epi32(v);
}

// The codes of columns 4j..4j+3 (`low`) and 16+4j..16+4j+3 of 8 rows, half a group, of a block in 4 or 5 bits.
template <Type T>
OLMOE_INLINE void unpack(const uint8_t* block, int half, int j, __m256i& low, __m256i& high) {
  const __m256i low_nibble = _mm256_set1_epi8(15);
  const __m256i v = _mm256_loadu_si256((const __m256i*)(block + Packed<T>::kNibblesAt + 64 * j + 32 * half));
  low = _mm256_and_si256(v, low_nibble);
  high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low_nibble);
  if constexpr (Packed<T>::kBits == 5) {
    // Each byte gets the byte of bits that its own is in, then keeps only that bit.
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3,
                                            3, 3, 3, 3, 3, 3, 3);
    const __m256i own = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i fifth = _mm256_set1_epi8(16);
    auto add = [&](__m256i codes, int word) {
      int32_t bits;
      std::memcpy(&bits, block + 8 * word + 4 * half, 4);
      const __m256i here = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread), own);
      return _mm256_or_si256(codes, _mm256_and_si256(_mm256_cmpeq_epi8(here, own), fifth));
    };
    low = add(low, j);
    high = add(high, 4 + j);
  }
}

// Eight 32-bit sums of two vectors that each hold 16-bit sums of 8 products. 16 products of at most 15 * 127 stay below
// 2^15, and so do 8 of at most 31 * 127.
template <Type T>
OLMOE_INLINE __m256i sum16(__m256i s0, __m256i s1) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (Packed<T>::kBits == 4) return _mm256_madd_epi16(_mm256_add_epi16(s0, s1), ones);
  return _mm256_add_epi32(_mm256_madd_epi16(s0, ones), _mm256_madd_epi16(s1, ones));
}

// Half a group: 8 rows, in the lower (half = 0) or upper 32 bytes of each 64. What lies `ahead` bytes further on is
// fetched, unless that is 0.
template <Type T, int TOKENS>
OLMOE_INLINE void packed_half(const uint8_t* codes, int blocks, int half, const ActivationRow* x, ptrdiff_t ahead,
                              __m256* out) {
  __m256 total[TOKENS];
  constexpr int kBytes = Packed<T>::kCodeBytes;
  const uint8_t* scales = codes + size_t(blocks) * kBytes + 16 * half;
  const __m256i ones = _mm256_set1_epi16(1);
  const ActivationBlock* a[TOKENS];
  for (int t = 0; t < TOKENS; t++) total[t] = _mm256_setzero_ps(), a[t] = x[t].blocks;
  for (int b = 0; b < blocks; b++) {
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(scales + b * 2 * kGroup)));
    if (ahead)
      fetch(codes + ahead + size_t(b) * (kBytes + Packed<T>::kScaleBytes), kBytes + Packed<T>::kScaleBytes, 0, 1,
            total[0]);
    if constexpr (Packed<T>::kBits < 8) {
      __m256i w[8];
      for (int j = 0; j < 4; j++) unpack<T>(codes + size_t(b) * kBytes, half, j, w[j], w[4 + j]);
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t++) {
        const ActivationBlock& block = a[t][b];
        __m256i s0 = _mm256_maddubs_epi16(w[0], four(block.q));
        __m256i s1 = _mm256_maddubs_epi16(w[1], four(block.q + 4));
        for (int j = 2; j < 8; j += 2) {
          s0 = _mm256_add_epi16(s0, _mm256_maddubs_epi16(w[j], four(block.q + 4 * j)));
          s1 = _mm256_add_epi16(s1, _mm256_maddubs_epi16(w[j + 1], four(block.q + 4 * j + 4)));
        }
        __m256i s = sum16<T>(s0, s1);
        s = _mm256_add_epi32(s, _mm256_set1_epi32(block.correction));
        total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), _mm256_mul_ps(scale, _mm256_set1_ps(block.d)), total[t]);
      }
    } else {
      // maddubs saturates on 255 * 127 * 2: the signed product is taken as |w| * sign(w) x instead.
      const __m256i offset = _mm256_set1_epi8(-128);
      __m256i w[8];
      for (int j = 0; j < 8; j++)
        w[j] = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(codes + b * kBytes + 64 * j + 32 * half)), offset);
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t++) {
        const ActivationBlock& block = a[t][b];
        __m256i s = _mm256_setzero_si256();
        for (int j = 0; j < 8; j++) {
          __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8(w[j]), _mm256_sign_epi8(four(block.q + 4 * j), w[j]));
          s = _mm256_add_epi32(s, _mm256_madd_epi16(p, ones));
        }
        total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), _mm256_mul_ps(scale, _mm256_set1_ps(block.d)), total[t]);
      }
    }
  }
  for (int t = 0; t < TOKENS; t++) out[t] = total[t];
}

// A single token against GROUPS groups, as for AVX-512 above.
template <Type T, int GROUPS, int TOKENS>
OLMOE_INLINE void packed_streams(const uint8_t* group, size_t group_bytes, ptrdiff_t ahead, int blocks, int rows,
                                 const ActivationRow* x, float* out, int) {
  static_assert(TOKENS == 1);
  const ActivationBlock* a = x->blocks;
  constexpr int kBytes = Packed<T>::kCodeBytes;
  const __m256i ones = _mm256_set1_epi16(1), offset = _mm256_set1_epi8(-128);
  __m256 total[GROUPS][2];
  for (int g = 0; g < GROUPS; g++) total[g][0] = total[g][1] = _mm256_setzero_ps();
  for (int b = 0; b < blocks; b++) {
    constexpr int kSoon = GROUPS * (kBytes + Packed<T>::kScaleBytes);
    const uint8_t* soon = group + ahead + size_t(b) * kSoon;
    const __m256 d = _mm256_set1_ps(a[b].d);
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const uint8_t* codes = group + g * group_bytes + size_t(b) * kBytes;
        const uint8_t* scales = group + g * group_bytes + size_t(blocks) * kBytes + size_t(b) * 2 * kGroup + 16 * half;
        fetch(soon, kSoon, 2 * g + half, 2 * GROUPS, total[g][half]);
        __m256i s;
        if constexpr (Packed<T>::kBits < 8) {
          __m256i s0 = _mm256_setzero_si256(), s1 = _mm256_setzero_si256();
          for (int j = 0; j < 4; j++) {
            __m256i low, high;
            unpack<T>(codes, half, j, low, high);
            s0 = _mm256_add_epi16(s0, _mm256_maddubs_epi16(low, four(a[b].q + 4 * j)));
            s1 = _mm256_add_epi16(s1, _mm256_maddubs_epi16(high, four(a[b].q + 16 + 4 * j)));
          }
          s = sum16<T>(s0, s1);
          s = _mm256_add_epi32(s, _mm256_set1_epi32(a[b].correction));
        } else {
          s = _mm256_setzero_si256();
          for (int j = 0; j < 8; j++) {
            const __m256i w =
                _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(codes + 64 * j + 32 * half)), offset);
            const __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four(a[b].q + 4 * j), w));
            s = _mm256_add_epi32(s, _mm256_madd_epi16(p, ones));
          }
        }
        const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)scales));
        total[g][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), _mm256_mul_ps(scale, d), total[g][half]);
      }
  }
  float sums[GROUPS * kGroup];
  for (int g = 0; g < GROUPS; g++)
    for (int half = 0; half < 2; half++) _mm256_storeu_ps(sums + g * kGroup + 8 * half, total[g][half]);
  std::memcpy(out, sums, size_t(rows < GROUPS * kGroup ? rows : GROUPS * kGroup) * sizeof(float));
}

// Up to this many tokens the next group is fetched; with more, products take longer than memory does.
constexpr int kFetchedTokens = 8, kStreamedTokens = 1;

template <Type T, int GROUPS, int TOKENS>
OLMOE_INLINE void packed_tile(const uint8_t* codes, size_t, ptrdiff_t ahead, int blocks, int rows,
                              const ActivationRow* x, float* out, int ld) {
  static_assert(GROUPS == 1);
  __m256 total[TOKENS];
  float spilled[8];
  for (int half = 0; half < 2 && 8 * half < rows; half++) {
    packed_half<T, TOKENS>(codes, blocks, half, x, half == 0 ? ahead : 0, total);
    const int count = rows - 8 * half;
    for (int t = 0; t < TOKENS; t++) {
      float* target = out + size_t(t) * ld + 8 * half;
      if (count >= 8) {
        _mm256_storeu_ps(target, total[t]);
      } else {
        _mm256_storeu_ps(spilled, total[t]);
        std::memcpy(target, spilled, size_t(count) * 4);
      }
    }
  }
}

// As many tokens as there are registers for their sums.
constexpr int kTileGroups = 1;
template <int GROUPS>
constexpr int kPackedTile = 4;

}  // namespace
}  // namespace olmoe
