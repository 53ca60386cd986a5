// Attention of a block of queries over the cached keys of their KV head: softmax(q k^T * scale) v with a running
// maximum, so that only one block of keys is processed at a time.
//
// A query's result is the same to the bit whether it is computed alone, as in decoding, or with others, as in a prompt:
// its dot products, its softmax and its weighted sum add in one order, in functions that both cases share.
//
// Keys and values in signed bytes are multiplied as integers: a key's scale is applied to its score, a value's to its
// weight.
#pragma once

#include "simd.h"

namespace olmoe {
namespace {

// out[i * kKeyBlock + j] = q[i] . keys[j] * scale for QUERIES queries, `ld` floats apart, and KEYS consecutive keys, of
// which `keys` is the first. Lanes along the head, which are then added. As many bytes from `ahead` on are fetched
// meanwhile, if it is not null.
template <Type T, int QUERIES, int KEYS>
OLMOE_INLINE void dots(const float* q, size_t ld, const void* keys, size_t key, int head_dim, float scale, float* out,
                       const char* ahead = nullptr) {
  vf dot[QUERIES][KEYS] = {};
  float rest[QUERIES][KEYS] = {};
  int d = 0;
  for (; d + W <= head_dim; d += W) {
    constexpr int kBytes = KEYS * sizeof_type(T);
    if (ahead && size_t(d) * kBytes % 64 == 0) fetch_ahead(ahead + size_t(d) * kBytes, W * kBytes);
    vf k[KEYS];
#pragma GCC unroll 4
    for (int j = 0; j < KEYS; j++) k[j] = load_as<T>(keys, (key + j) * head_dim + d);
#pragma GCC unroll 4
    for (int i = 0; i < QUERIES; i++) {
      const vf a = load(q + i * ld + d);
#pragma GCC unroll 4
      for (int j = 0; j < KEYS; j++) dot[i][j] += a * k[j];
    }
  }
  for (; d < head_dim; d++)
    for (int i = 0; i < QUERIES; i++)
      for (int j = 0; j < KEYS; j++)
        rest[i][j] = multiply_add(q[i * ld + d], scalar_as<T>(keys, (key + j) * head_dim + d), rest[i][j]);
#pragma GCC unroll 4
  for (int i = 0; i < QUERIES; i++) {
    float* to = out + i * kKeyBlock;
    if constexpr (KEYS == 4) {
      v4 tails;
      std::memcpy(&tails, rest[i], sizeof tails);
      const v4 scores = (sum_four(dot[i]) + tails) * scale;
      std::memcpy(to, &scores, sizeof scores);
    } else {
      *to = (sum(dot[i][0]) + rest[i][0]) * scale;
    }
  }
}

// Scores of a block of keys to their exponentials, relative to the largest score so far. `row` holds kKeyBlock scores,
// of which the query sees `seen`, at least one; the exponentials of the others become 0. What was summed before,
// `total` and `sums` (Dh), shrinks where the largest score grew.
OLMOE_INLINE void weigh(float* row, int seen, float& top, float& total, float* sums, int head_dim) {
  for (int s = seen; s < kKeyBlock; s++) row[s] = -INFINITY;
  vf largest = load(row);
  for (int s = W; s < kKeyBlock; s += W) largest = vmax(largest, load(row + s));
  const float block_top = max_of(largest);
  if (block_top > top) {
    const float shrink = top == -INFINITY ? 0.0f : exp_one(top - block_top);
    for (int d = 0; d < head_dim; d++) sums[d] *= shrink;
    total *= shrink;
    top = block_top;
  }
  vf here = {};
  for (int s = 0; s < kKeyBlock; s += W) {
    const vf p = vexp(load(row + s) - top);
    store(row + s, p);
    here += p;
  }
  total += sum(here);
}

// row[s] *= factors[s]. Not inline: a compiler that saw both could round this product and what follows it only once,
// for one query and not for many.
__attribute__((noinline)) inline void multiply_row(float* row, const float* factors, int count) {
  int s = 0;
  for (; s + W <= count; s += W) store(row + s, load(row + s) * load(factors + s));
  for (; s < count; s++) row[s] *= factors[s];
}

// One query: keys and values are read in place. While keys are being multiplied their values are prefetched, and during
// the values the following keys; `next` are those that this thread reads after this head, if that is known.
template <Type T>
inline void attend_one(const float* q, const KeyBlock* blocks, int visible, int head_dim, float scale, float* out,
                       float* scratch, const KeyBlock* next) {
  const size_t row_bytes = size_t(head_dim) * sizeof_type(T);
  float* scores = scratch;
  float top = -INFINITY, total = 0;
  for (int d = 0; d < head_dim; d++) out[d] = 0;
  for (int start = 0; start < visible; start += kKeyBlock, blocks++) {
    const int count = visible - start < kKeyBlock ? visible - start : kKeyBlock;
    const void *k = blocks->keys, *v = blocks->values;
    if constexpr (T == Type::kI8) fetch_ahead(blocks->value_scales, count * sizeof(float));
    int s = 0;
    for (; s + 4 <= count; s += 4)
      dots<T, 1, 4>(q, 0, k, s, head_dim, scale, scores + s, (const char*)v + s * row_bytes);
    for (; s < count; s++) dots<T, 1, 1>(q, 0, k, s, head_dim, scale, scores + s);
    if constexpr (T == Type::kI8) multiply_row(scores, blocks->key_scales, count);
    weigh(scores, count, top, total, out, head_dim);
    const KeyBlock* ahead = start + kKeyBlock >= visible ? next : blocks + 1;
    const char* keys_ahead = ahead ? (const char*)ahead->keys : nullptr;
    if constexpr (T == Type::kI8) {
      multiply_row(scores, blocks->value_scales, count);
      if (ahead) fetch_ahead(ahead->key_scales, count * sizeof(float));
    }
    // As much of the next keys as is read of these values: the CPU drops some of many lines at once.
    auto fetch_keys = [&](int key, int column, int columns) __attribute__((always_inline)) {
      if (keys_ahead)
        fetch_ahead(keys_ahead + key * row_bytes + size_t(column) * sizeof_type(T), columns * sizeof_type(T));
    };
    int d = 0;
    for (; d + 4 * W <= head_dim; d += 4 * W) {
      vf sums[4];
      for (int j = 0; j < 4; j++) sums[j] = load(out + d + j * W);
      for (s = 0; s < count; s++) {
        fetch_keys(s, d, 4 * W);
        for (int j = 0; j < 4; j++) sums[j] += load_as<T>(v, size_t(s) * head_dim + d + j * W) * scores[s];
      }
      for (int j = 0; j < 4; j++) store(out + d + j * W, sums[j]);
    }
    for (; d + W <= head_dim; d += W) {
      vf sums = load(out + d);
      for (s = 0; s < count; s++) {
        fetch_keys(s, d, W);
        sums += load_as<T>(v, size_t(s) * head_dim + d) * scores[s];
      }
      store(out + d, sums);
    }
    for (; d < head_dim; d++)
      for (s = 0; s < count; s++) out[d] = multiply_add(scalar_as<T>(v, size_t(s) * head_dim + d), scores[s], out[d]);
  }
  const float inverse = 1.0f / total;
  for (int d = 0; d < head_dim; d++) out[d] *= inverse;
}

// n numbers of a cache to fp32.
template <Type T>
inline void widen(const void* x, int n, float* out) {
  int i = 0;
  for (; i + W <= n; i += W) store(out + i, load_as<T>(x, i));
  for (; i < n; i++) out[i] = scalar_as<T>(x, i);
}

// sums (QUERIES, Dh) += weights (QUERIES, kKeyBlock) times the first `count` values (kKeyBlock, Dh), key after key.
template <int QUERIES>
OLMOE_INLINE void add_values(const float* weights, const float* values, int count, int head_dim, float* sums) {
  constexpr int kVectors = W == 16 ? 4 : 2;  // of one query's sums that are held in registers, for four queries
  int d = 0;
  for (; d + kVectors * W <= head_dim; d += kVectors * W) {
    vf total[QUERIES][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < QUERIES; i++)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) total[i][j] = load(sums + i * head_dim + d + j * W);
    for (int s = 0; s < count; s++) {
      vf v[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) v[j] = load(values + s * head_dim + d + j * W);
#pragma GCC unroll 4
      for (int i = 0; i < QUERIES; i++) {
        const float p = weights[i * kKeyBlock + s];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) total[i][j] += v[j] * p;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < QUERIES; i++)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) store(sums + i * head_dim + d + j * W, total[i][j]);
  }
  for (; d + W <= head_dim; d += W)
    for (int i = 0; i < QUERIES; i++) {
      vf total = load(sums + i * head_dim + d);
      for (int s = 0; s < count; s++) total += load(values + s * head_dim + d) * weights[i * kKeyBlock + s];
      store(sums + i * head_dim + d, total);
    }
  for (; d < head_dim; d++)
    for (int i = 0; i < QUERIES; i++)
      for (int s = 0; s < count; s++) {
        float& sum = sums[i * head_dim + d];
        sum = multiply_add(values[s * head_dim + d], weights[i * kKeyBlock + s], sum);
      }
}

// Up to kQueryBlock queries: a block of keys, and then of values, is widened once for all of them.
template <Type T>
inline void attend_block(const float* q, int queries, int ld, const KeyBlock* blocks, int first, int head_dim,
                         float scale, float* out, float* scratch, const KeyBlock* next) {
  constexpr int kTile = W == 16 ? 4 : 2;  // queries whose scores of four keys are summed in registers
  const size_t row_bytes = size_t(head_dim) * sizeof_type(T);
  float* wide = scratch;                                   // (kKeyBlock, Dh): keys, then values
  float* scores = wide + size_t(kKeyBlock) * head_dim;     // (queries, kKeyBlock)
  float* sums = scores + size_t(kQueryBlock) * kKeyBlock;  // (queries, Dh)
  float* tops = sums + size_t(kQueryBlock) * head_dim;     // (queries)
  float* totals = tops + kQueryBlock;                      // (queries)
  for (int t = 0; t < queries; t++) tops[t] = -INFINITY, totals[t] = 0;
  for (int i = 0; i < queries * head_dim; i++) sums[i] = 0;
  const int longest = first + queries - 1;  // what the last query sees
  for (int start = 0; start < longest; start += kKeyBlock, blocks++) {
    const int count = longest - start < kKeyBlock ? longest - start : kKeyBlock;
    // How many of these keys a query sees. What no query of a tile sees is left out.
    auto seen_by = [&](int t) {
      const int visible = first + t - start;
      return visible < 0 ? 0 : visible < count ? visible : count;
    };
    widen<T>(blocks->keys, count * head_dim, wide);
    auto score = [&]<int QUERIES>(int t) {
      const float* from = q + size_t(t) * ld;
      const int seen = seen_by(t + QUERIES - 1);
      fetch_ahead((const char*)blocks->values + t * row_bytes, QUERIES * row_bytes);
      int s = 0;
      for (; s + 4 <= seen; s += 4)
        dots<Type::kF32, QUERIES, 4>(from, ld, wide, s, head_dim, scale, scores + t * kKeyBlock + s);
      for (; s < seen; s++)
        dots<Type::kF32, QUERIES, 1>(from, ld, wide, s, head_dim, scale, scores + t * kKeyBlock + s);
    };
    int t = 0;
    for (; t + kTile <= queries; t += kTile) score.template operator()<kTile>(t);
    for (; t < queries; t++) score.template operator()<1>(t);

    for (t = 0; t < queries; t++) {
      float* row = scores + t * kKeyBlock;
      if (const int seen = seen_by(t); seen > 0) {
        if constexpr (T == Type::kI8) multiply_row(row, blocks->key_scales, seen);
        weigh(row, seen, tops[t], totals[t], sums + t * head_dim, head_dim);
        if constexpr (T == Type::kI8) multiply_row(row, blocks->value_scales, seen);
      } else {
        for (int s = 0; s < kKeyBlock; s++) row[s] = 0;
      }
    }

    widen<T>(blocks->values, count * head_dim, wide);
    const KeyBlock* ahead = start + kKeyBlock < longest ? blocks + 1 : next;
    auto add = [&]<int QUERIES>(int t) {
      if (ahead) fetch_ahead((const char*)ahead->keys + t * row_bytes, QUERIES * row_bytes);
      add_values<QUERIES>(scores + t * kKeyBlock, wide, seen_by(t + QUERIES - 1), head_dim, sums + t * head_dim);
    };
    t = 0;
    for (; t + 4 <= queries; t += 4) add.template operator()<4>(t);
    for (; t < queries; t++) add.template operator()<1>(t);
  }
  for (int t = 0; t < queries; t++) {
    const float inverse = 1.0f / totals[t];
    for (int d = 0; d < head_dim; d++) out[size_t(t) * ld + d] = sums[t * head_dim + d] * inverse;
  }
}

template <Type T>
inline void attend_type(const float* q, int queries, int ld, const KeyBlock* blocks, int first, int head_dim,
                        float scale, float* out, float* scratch, const KeyBlock* next) {
  if (queries == 1)
    attend_one<T>(q, blocks, first, head_dim, scale, out, scratch, next);
  else
    attend_block<T>(q, queries, ld, blocks, first, head_dim, scale, out, scratch, next);
}

inline void attention(const float* q, int queries, int ld, const KeyBlock* blocks, Type cache, int first, int head_dim,
                      float scale, float* out, float* scratch, const KeyBlock* next) {
  switch (cache) {
    case Type::kF32: return attend_type<Type::kF32>(q, queries, ld, blocks, first, head_dim, scale, out, scratch, next);
    case Type::kBF16:
      return attend_type<Type::kBF16>(q, queries, ld, blocks, first, head_dim, scale, out, scratch, next);
    case Type::kI8: return attend_type<Type::kI8>(q, queries, ld, blocks, first, head_dim, scale, out, scratch, next);
    default: return attend_type<Type::kF16>(q, queries, ld, blocks, first, head_dim, scale, out, scratch, next);
  }
}

}  // namespace
}  // namespace olmoe
