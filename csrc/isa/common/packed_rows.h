// Products of 16 interleaved rows of int4, int5 or int8 codes with int8 activations, a tile of tokens at a time.
//
// Codes are unsigned (value + 8, + 16, + 128) and activations signed, as the dot-product instructions want them; the
// activation's `correction` takes the offset out again, in exact integers. Each block of 32 columns is summed in
// int32, then scaled and added in fp32.
#pragma once

#include "simd.h"

namespace olmoe {
namespace {

#if defined(__AVX2__)
// Fetch a part of `bytes` into the second cache, the lines of slot number `slot` of `slots`. Where few tokens make
// memory what counts, the hardware's own prefetching is too late: it stops at the ends of pages and at the scales of
// each group. So while a thread reads some groups, it fetches those that it reads next, in one stream from end to end,
// block by block the part that takes as long. Spread over the block's work, because the CPU drops some of many at once;
// `sum`, which each seems to change, keeps the compiler from gathering them.
template <typename Vector>
OLMOE_INLINE void fetch(const uint8_t* place, int bytes, int slot, int slots, Vector& sum) {
  const int lines = (bytes + 63) / 64;
  for (int line = slot * lines / slots; line < (slot + 1) * lines / slots; line++)
    asm volatile("prefetcht1 %1" : "+v"(sum) : "m"(place[64 * line]));
}
#endif

// TOKENS columns of activations against GROUPS groups `group_bytes` apart, `rows` rows in all. `scales` follow the
// codes of each group (see Matrix).
#if defined(__AVX512VNNI__)

// The codes of columns 4j..4j+3 (`low`) and 16+4j..16+4j+3 of 16 rows, of a block in 4 or 5 bits.
template <Type T>
OLMOE_INLINE void unpack(const uint8_t* codes, int j, __m512i& low, __m512i& high) {
  const __m512i low_nibble = _mm512_set1_epi8(15);
  const __m512i v = _mm512_loadu_si512(codes + low_bits_at(T) + 64 * j);
  low = _mm512_and_si512(v, low_nibble);
  high = _mm512_and_si512(_mm512_srli_epi16(v, 4), low_nibble);
  if constexpr (T == Type::kQ5) {
    const __m512i fifth = _mm512_set1_epi8(16);
    uint64_t bits[2];
    std::memcpy(&bits[0], codes + 8 * j, 8);
    std::memcpy(&bits[1], codes + 8 * (4 + j), 8);
    low = _mm512_mask_add_epi8(low, bits[0], low, fifth);
    high = _mm512_mask_add_epi8(high, bits[1], high, fifth);
  }
}

template <Type T, int GROUPS, int TOKENS>
OLMOE_INLINE void packed_tile(const uint8_t* group, size_t group_bytes, ptrdiff_t, int blocks, int rows,
                              const ActivationRow* x, float* out, int ld) {
  constexpr int kBytes = code_bytes(T);
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
      if constexpr (T != Type::kQ8) {
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
  for (int g = 0; g < GROUPS; g++) {
    const int count = rows - g * kGroup;
    const __mmask16 mask = count >= kGroup ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
    for (int t = 0; t < TOKENS; t++) _mm512_mask_storeu_ps(out + size_t(t) * ld + g * kGroup, mask, total[g][t]);
  }
}

// Few tokens against GROUPS groups side by side: memory is what counts, and several streams of it flow faster than one.
template <Type T, int GROUPS, int TOKENS>
OLMOE_INLINE void packed_streams(const uint8_t* group, size_t group_bytes, ptrdiff_t ahead, int blocks, int rows,
                                 const ActivationRow* x, float* out, int ld) {
  constexpr int kBytes = code_bytes(T);
  __m512 total[GROUPS][TOKENS];
  const ActivationBlock* a[TOKENS];
  for (int t = 0; t < TOKENS; t++) {
    a[t] = x[t].blocks;
    for (int g = 0; g < GROUPS; g++) total[g][t] = _mm512_setzero_ps();
  }
  for (int b = 0; b < blocks; b++) {
    constexpr int kSoon = GROUPS * (kBytes + 2 * kGroup);
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
        if constexpr (T != Type::kQ8) {
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
  for (int g = 0; g < GROUPS; g++) {
    const int count = rows - g * kGroup;
    const __mmask16 mask = count >= kGroup ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
    for (int t = 0; t < TOKENS; t++) _mm512_mask_storeu_ps(out + size_t(t) * ld + g * kGroup, mask, total[g][t]);
  }
}
// Up to so many tokens weights are read in several streams, which fetch; tiles are for more, and need not.
constexpr int kStreamedTokens = 8, kFetchedTokens = 0;

#elif defined(__AVX2__)

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
  const __m256i v = _mm256_loadu_si256((const __m256i*)(block + low_bits_at(T) + 64 * j + 32 * half));
  low = _mm256_and_si256(v, low_nibble);
  high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low_nibble);
  if constexpr (T == Type::kQ5) {
    // Each byte gets the byte of bits that its own is in, then keeps that bit alone.
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
  if constexpr (T == Type::kQ4) return _mm256_madd_epi16(_mm256_add_epi16(s0, s1), ones);
  return _mm256_add_epi32(_mm256_madd_epi16(s0, ones), _mm256_madd_epi16(s1, ones));
}

// Half a group: 8 rows, in the lower (half = 0) or upper 32 bytes of each 64. What lies `ahead` bytes further on is
// fetched, unless that is 0.
template <Type T, int TOKENS>
OLMOE_INLINE void packed_half(const uint8_t* codes, int blocks, int half, const ActivationRow* x, ptrdiff_t ahead,
                              __m256* out) {
  __m256 total[TOKENS];
  constexpr int kBytes = code_bytes(T);
  const uint8_t* scales = codes + size_t(blocks) * kBytes + 16 * half;
  const __m256i ones = _mm256_set1_epi16(1);
  const ActivationBlock* a[TOKENS];
  for (int t = 0; t < TOKENS; t++) total[t] = _mm256_setzero_ps(), a[t] = x[t].blocks;
  for (int b = 0; b < blocks; b++) {
    const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(scales + b * 2 * kGroup)));
    if (ahead) fetch(codes + ahead + size_t(b) * (kBytes + 2 * kGroup), kBytes + 2 * kGroup, 0, 1, total[0]);
    if constexpr (T != Type::kQ8) {
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
  constexpr int kBytes = code_bytes(T);
  const __m256i ones = _mm256_set1_epi16(1), offset = _mm256_set1_epi8(-128);
  __m256 total[GROUPS][2];
  for (int g = 0; g < GROUPS; g++) total[g][0] = total[g][1] = _mm256_setzero_ps();
  for (int b = 0; b < blocks; b++) {
    constexpr int kSoon = GROUPS * (kBytes + 2 * kGroup);
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
        if constexpr (T != Type::kQ8) {
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

// Up to so many tokens the next group is fetched; among more, products take longer than memory does.
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
      float* place = out + size_t(t) * ld + 8 * half;
      if (count >= 8) {
        _mm256_storeu_ps(place, total[t]);
      } else {
        _mm256_storeu_ps(spilled, total[t]);
        std::memcpy(place, spilled, size_t(count) * 4);
      }
    }
  }
}

#else

constexpr int kFetchedTokens = 0;

template <Type T, int GROUPS, int TOKENS>
inline void packed_tile(const uint8_t* codes, size_t, ptrdiff_t, int blocks, int rows, const ActivationRow* x,
                        float* out, int ld) {
  static_assert(GROUPS == 1);
  constexpr int kBytes = code_bytes(T);
  const uint8_t* scales = codes + size_t(blocks) * kBytes;
  for (int t = 0; t < TOKENS; t++) {
    float total[kGroup] = {};
    for (int b = 0; b < blocks; b++) {
      const ActivationBlock& block = x[t].blocks[b];
      int32_t s[kGroup];
      for (int r = 0; r < kGroup; r++) s[r] = block.correction;
      const uint8_t* c = codes + size_t(b) * kBytes;
      for (int j = 0; j < (T == Type::kQ8 ? 8 : 4); j++)
        for (int r = 0; r < kGroup; r++)
          for (int i = 0; i < 4; i++) {
            const int code = c[low_bits_at(T) + 64 * j + 4 * r + i];
            if constexpr (T == Type::kQ8) {
              s[r] += code * block.q[4 * j + i];
            } else {
              int low = code & 15, high = code >> 4;
              if constexpr (T == Type::kQ5) {
                const int bit = 4 * r + i;
                low |= (c[8 * j + bit / 8] >> bit % 8 & 1) << 4;
                high |= (c[8 * (4 + j) + bit / 8] >> bit % 8 & 1) << 4;
              }
              s[r] += low * block.q[4 * j + i] + high * block.q[16 + 4 * j + i];
            }
          }
      for (int r = 0; r < kGroup; r++) {
        uint16_t half;
        std::memcpy(&half, scales + (size_t(b) * kGroup + r) * 2, 2);
        total[r] += float(s[r]) * (half_to_float(half) * block.d);
      }
    }
    std::memcpy(out + size_t(t) * ld, total, size_t(rows) * 4);
  }
}

#endif

template <Type T, int GROUPS>
inline void packed_band(const uint8_t* group, size_t group_bytes, ptrdiff_t ahead, int blocks, int rows,
                        const ActivationRow* x, int tokens, float* out, int ld) {
  // As many tokens as there are registers for their sums.
  constexpr int kTile = W < 16 ? 4 : GROUPS > 1 ? 6 : 8;
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
  const size_t group_bytes = size_t(blocks) * (code_bytes(T) + 2 * kGroup);
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
#if defined(__AVX2__)
  if (tokens <= kStreamedTokens) {
    auto streams = [&]<int TOKENS>(int t) {
      for (int r = 0; r < rows; r += 4 * kGroup) {
        const uint8_t* first = group + r / kGroup * group_bytes;
        float* place = out + size_t(t) * ld + r;
        if (rows - r > 3 * kGroup)
          packed_streams<T, 4, TOKENS>(first, group_bytes, ahead(r, 4), blocks, rows - r, x + t, place, ld);
        else
          for (int s = 0; s < rows - r; s += kGroup)
            packed_streams<T, 1, TOKENS>(first + s / kGroup * group_bytes, group_bytes, ahead(r + s, 1), blocks,
                                         rows - r - s, x + t, place + s, ld);
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
#endif
#if defined(__AVX512VNNI__)
  while (r + kGroup < rows) band.template operator()<2>();
#endif
  while (r < rows) band.template operator()<1>();
}

}  // namespace
}  // namespace olmoe
