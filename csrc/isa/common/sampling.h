// Passes over one row of scores, for choosing a token: the largest, exponentials, sums and what lies above a bound.
#pragma once

#include <cfloat>

#include "simd.h"

namespace olmoe {
namespace {

// Values [i, n) as a whole vector; lanes beyond them are `other`.
OLMOE_INLINE vf load_some(const float* x, int i, int n, float other) {
  if (i + W <= n) return load(x + i);
  vf v = splat(other);
  std::memcpy(&v, x + i, size_t(n - i) * sizeof(float));
  return v;
}
OLMOE_INLINE void store_some(float* x, int i, int n, vf v) {
  std::memcpy(x + i, &v, (i + W <= n ? W : size_t(n - i)) * sizeof(float));
}

inline bool any(vi v) {
  uint64_t words[sizeof v / 8], all = 0;
  std::memcpy(words, &v, sizeof v);
  for (uint64_t word : words) all |= word;
  return all != 0;
}

inline float copy_finite(const float* x, int n, float* out) {
  const vi infinite = (vi)splat(__builtin_inff());
  vi broken = {};
  vf top = splat(-FLT_MAX);
  for (int i = 0; i < n; i += W) {
    const vf v = load_some(x, i, n, -FLT_MAX);
    broken |= ((vi)v & infinite) == infinite;
    top = vmax(top, v);
    store_some(out, i, n, v);
  }
  return any(broken) ? __builtin_nanf("") : max_of(top);
}

inline float largest(const float* x, int n) {
  vf top = splat(-__builtin_inff());
  for (int i = 0; i < n; i += W) top = vmax(top, load_some(x, i, n, -__builtin_inff()));
  return max_of(top);
}

inline float smallest_finite(const float* x, int n, float otherwise) {
  vf least = splat(otherwise);
  for (int i = 0; i < n; i += W) {
    const vf v = load_some(x, i, n, otherwise);
    least = vmin(least, v >= -FLT_MAX ? v : splat(otherwise));
  }
  float m = least[0];
  for (int i = 1; i < W; i++) m = least[i] < m ? least[i] : m;
  return m;
}

inline void mask_scores(float* x, int n, const uint32_t* allowed) {
  const int32_t banned = __builtin_bit_cast(int32_t, -__builtin_inff());
  for (int i = 0; i < n; i += 32) {
    const uint32_t word = allowed[i / 32];
    if (word == ~0u) continue;
    const int count = i + 32 < n ? 32 : n - i;
    for (int j = 0; j < count; j++) {
      const int32_t keep = -int32_t(word >> j & 1);  // all ones or none: a branch would be a guess
      const int32_t bits = __builtin_bit_cast(int32_t, x[i + j]);
      x[i + j] = __builtin_bit_cast(float, (bits & keep) | (banned & ~keep));
    }
  }
}

inline void scale_scores(float* x, int n, float top, float temperature) {
  for (int i = 0; i < n; i += W) store_some(x, i, n, (load_some(x, i, n, 0.0f) - top) / temperature);
}

inline void exponentials(const float* x, int n, float shift, float* out) {
  for (int i = 0; i < n; i += W) store_some(out, i, n, vexp(load_some(x, i, n, 0.0f) - shift));
}

inline void drop_below(const float* x, int n, float least, float* shares) {
  for (int i = 0; i < n; i += W) {
    const vf share = load_some(shares, i, n, 0.0f);
    store_some(shares, i, n, load_some(x, i, n, 0.0f) >= least ? share : vf{});
  }
}

inline void block_sums(const float* x, int n, double* sums) {
  constexpr int kDoubles = W / 2;  // vectors that are converted in one instruction
  typedef float vs __attribute__((vector_size(kDoubles * 4)));
  typedef double vd __attribute__((vector_size(kDoubles * 8)));
  for (int begin = 0; begin < n; begin += kSumBlock) {
    const int end = begin + kSumBlock < n ? begin + kSumBlock : n;
    vd totals[4] = {};
    int i = begin;
    for (; i + 4 * kDoubles <= end; i += 4 * kDoubles)
      for (int j = 0; j < 4; j++) {
        vs v;
        std::memcpy(&v, x + i + j * kDoubles, sizeof v);
        totals[j] += __builtin_convertvector(v, vd);
      }
    const vd all = (totals[0] + totals[1]) + (totals[2] + totals[3]);
    double total = 0;
    for (int j = 0; j < kDoubles; j++) total += all[j];
    for (; i < end; i++) total += double(x[i]);
    *sums++ = total;
  }
}

inline void block_maxima(const float* x, int n, float* maxima) {
  for (int begin = 0; begin < n; begin += kMaxBlock) {
    const int end = begin + kMaxBlock < n ? begin + kMaxBlock : n;
    vf top = splat(-__builtin_inff());
    for (int i = begin; i < end; i += W) top = vmax(top, load_some(x, i, end, -__builtin_inff()));
    *maxima++ = max_of(top);
  }
}

// Write the indices i + j of lanes that are hit after `count` others; the number of all.
OLMOE_INLINE int append(vi hits, int i, int* ids, int count) {
  if (!any(hits)) return count;
  return append_lanes(hits, i, ids, count);
}

inline int at_least(const float* x, int n, float least, int* ids) {
  int count = 0;
  for (int i = 0; i < n; i += W) count = append(load_some(x, i, n, __builtin_nanf("")) >= least, i, ids, count);
  return count;
}

inline void digits_below(const float* x, int n, float top, float scale, uint16_t* digits) {
  const vi one = (vi)splat(1.0f), last = vi{} + (kDigits - 1);
  for (int i = 0; i < n; i += W) {
    const vi digit = ((vi)(1.0f + (top - load_some(x, i, n, top)) * scale) - one) >> kDigitShift;
    const vh h = __builtin_convertvector((vu)(digit < last ? digit : last), vh);
    std::memcpy(digits + i, &h, (i + W <= n ? W : size_t(n - i)) * sizeof(uint16_t));
  }
}

inline int with_digit(const uint16_t* digits, int n, int digit, int* ids) {
  int count = 0, i = 0;
  for (; i + W <= n; i += W) {
    vh h;
    std::memcpy(&h, digits + i, sizeof h);
    count = append(__builtin_convertvector(h, vi) == digit, i, ids, count);
  }
  for (; i < n; i++) {
    ids[count] = i;
    count += digits[i] == digit;
  }
  return count;
}

}  // namespace
}  // namespace olmoe
