// Attention of a block of queries over the cached keys of their KV head: softmax(q k^T * scale) v with a running
// maximum, so that only one block of keys is looked at at a time.
#pragma once

#include "simd.h"

namespace olmoe {
namespace {

// One query: scores by dot products along the head, no copies of keys. While it looks at keys it fetches their values, and
// meanwhile the keys after them, of which `next` are those that the thread looks at after this head, if that is known.
template <Type T>
inline void attend_one(const float* q, const void* keys, const void* values, int visible, int head_dim, float scale,
                       float* out, float* scratch, const void* next) {
  const size_t row_bytes = size_t(head_dim) * sizeof_type(T);
  float* scores = scratch;
  float top = -INFINITY, total = 0;
  for (int d = 0; d < head_dim; d++) out[d] = 0;
  for (int start = 0; start < visible; start += kKeyBlock) {
    const int count = visible - start < kKeyBlock ? visible - start : kKeyBlock;
    float block_top = -INFINITY;
    int s = 0;
    for (; s + 4 <= count; s += 4) {
      fetch_ahead((const char*)values + size_t(start + s) * row_bytes, 4 * row_bytes);
      vf dot[4] = {};
      float rest[4] = {};
      int d = 0;
      for (; d + W <= head_dim; d += W) {
        vf a = load(q + d);
        for (int j = 0; j < 4; j++) dot[j] += a * load_as<T>(keys, size_t(start + s + j) * head_dim + d);
      }
      for (; d < head_dim; d++)
        for (int j = 0; j < 4; j++) rest[j] += q[d] * scalar_as<T>(keys, size_t(start + s + j) * head_dim + d);
      for (int j = 0; j < 4; j++) scores[s + j] = (sum(dot[j]) + rest[j]) * scale;
    }
    for (; s < count; s++) {
      vf dot = {};
      float rest = 0;
      int d = 0;
      for (; d + W <= head_dim; d += W) dot += load(q + d) * load_as<T>(keys, size_t(start + s) * head_dim + d);
      for (; d < head_dim; d++) rest += q[d] * scalar_as<T>(keys, size_t(start + s) * head_dim + d);
      scores[s] = (sum(dot) + rest) * scale;
    }
    for (s = 0; s < count; s++) block_top = scores[s] > block_top ? scores[s] : block_top;
    if (block_top > top) {
      const float shrink = top == -INFINITY ? 0.0f : exp_one(top - block_top);
      for (int d = 0; d < head_dim; d++) out[d] *= shrink;
      total *= shrink;
      top = block_top;
    }
    for (s = 0; s + W <= count; s += W) store(scores + s, vexp(load(scores + s) - top));
    for (; s < count; s++) scores[s] = exp_one(scores[s] - top);
    for (s = 0; s < count; s++) total += scores[s];
    const bool last = start + kKeyBlock >= visible;
    const char* keys_ahead = last ? (const char*)next : (const char*)keys + size_t(start + kKeyBlock) * row_bytes;
    int d = 0;
    for (; d + 4 * W <= head_dim; d += 4 * W) {
      vf sums[4];
      for (int j = 0; j < 4; j++) sums[j] = load(out + d + j * W);
      for (s = 0; s < count; s++) {
        if (d == 0 && keys_ahead) fetch_ahead(keys_ahead + s * row_bytes, row_bytes);
        for (int j = 0; j < 4; j++)
          sums[j] += load_as<T>(values, size_t(start + s) * head_dim + d + j * W) * scores[s];
      }
      for (int j = 0; j < 4; j++) store(out + d + j * W, sums[j]);
    }
    for (; d + W <= head_dim; d += W) {
      vf total = load(out + d);
      for (s = 0; s < count; s++) total += load_as<T>(values, size_t(start + s) * head_dim + d) * scores[s];
      store(out + d, total);
    }
    for (; d < head_dim; d++)
      for (s = 0; s < count; s++) out[d] += scalar_as<T>(values, size_t(start + s) * head_dim + d) * scores[s];
  }
  const float inverse = 1.0f / total;
  for (int d = 0; d < head_dim; d++) out[d] *= inverse;
}

// `count` rows of keys (Dh) to columns: out[d * kKeyBlock + s], zeros where there is no key.
template <Type T>
inline void transpose_keys(const void* keys, int start, int count, int head_dim, float* out) {
  for (int s = 0; s < count; s++) {
    const size_t row = size_t(start + s) * head_dim;
    int d = 0;
    for (; d + W <= head_dim; d += W) {
      const vf v = load_as<T>(keys, row + d);
      for (int j = 0; j < W; j++) out[(d + j) * kKeyBlock + s] = v[j];
    }
    for (; d < head_dim; d++) out[d * kKeyBlock + s] = scalar_as<T>(keys, row + d);
  }
  for (int d = 0; d < head_dim && count < kKeyBlock; d++)
    for (int s = count; s < kKeyBlock; s++) out[d * kKeyBlock + s] = 0;
}

// Up to kQueryBlock queries: a block of keys is transposed once for all of them, so that neighbouring keys are lanes.
template <Type T>
inline void attend_block(const float* q, int queries, int ld, const void* keys, const void* values, int first,
                         int head_dim, float scale, float* out, float* scratch) {
  float* transposed = scratch;                                // (Dh, kKeyBlock); later the values (kKeyBlock, Dh)
  float* scores = transposed + size_t(kKeyBlock) * head_dim;  // (queries, kKeyBlock)
  float* sums = scores + size_t(kQueryBlock) * kKeyBlock;     // (queries, Dh)
  float* tops = sums + size_t(kQueryBlock) * head_dim;        // (queries)
  float* totals = tops + kQueryBlock;                         // (queries)
  for (int t = 0; t < queries; t++) tops[t] = -INFINITY, totals[t] = 0;
  for (int i = 0; i < queries * head_dim; i++) sums[i] = 0;
  constexpr int kVectors = W == 16 ? 4 : 2;  // of one query's sums that are held in registers, for four queries
  const int longest = first + queries - 1;   // what the last query sees
  for (int start = 0; start < longest; start += kKeyBlock) {
    const int count = longest - start < kKeyBlock ? longest - start : kKeyBlock;
    transpose_keys<T>(keys, start, count, head_dim, transposed);
    int t = 0;
    auto dots = [&]<int QUERIES>() {
      for (int s = 0; s < kKeyBlock; s += kVectors * W) {
        vf dot[QUERIES][kVectors] = {};
        for (int d = 0; d < head_dim; d++) {
          vf k[kVectors];
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; j++) k[j] = load(transposed + d * kKeyBlock + s + j * W);
#pragma GCC unroll 4
          for (int i = 0; i < QUERIES; i++) {
            const float a = q[size_t(t + i) * ld + d];
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; j++) dot[i][j] += k[j] * a;
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < QUERIES; i++)
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; j++) store(scores + (t + i) * kKeyBlock + s + j * W, dot[i][j] * scale);
      }
    };
    for (; t + 4 <= queries; t += 4) dots.template operator()<4>();
    for (; t < queries; t++) dots.template operator()<1>();

    for (t = 0; t < queries; t++) {
      float* row = scores + t * kKeyBlock;
      const int visible = first + t - start;  // how many of these keys the query sees
      const int seen = visible < 0 ? 0 : visible < count ? visible : count;
      if (seen == 0) {
        for (int s = 0; s < kKeyBlock; s++) row[s] = 0;
        continue;
      }
      for (int s = seen; s < kKeyBlock; s++) row[s] = -INFINITY;  // whose exponential is 0
      vf largest = load(row);
      for (int s = W; s < kKeyBlock; s += W) largest = vmax(largest, load(row + s));
      const float block_top = max_of(largest);
      if (block_top > tops[t]) {
        const float shrink = tops[t] == -INFINITY ? 0.0f : exp_one(tops[t] - block_top);
        for (int d = 0; d < head_dim; d++) sums[t * head_dim + d] *= shrink;
        totals[t] *= shrink;
        tops[t] = block_top;
      }
      vf total = {};
      for (int s = 0; s < kKeyBlock; s += W) {
        const vf p = vexp(load(row + s) - tops[t]);
        store(row + s, p);
        total += p;
      }
      totals[t] += sum(total);
    }

    float* wide = transposed;
    int i = 0;
    for (const int n = count * head_dim; i + W <= n; i += W)
      store(wide + i, load_as<T>(values, size_t(start) * head_dim + i));
    for (; i < count * head_dim; i++) wide[i] = scalar_as<T>(values, size_t(start) * head_dim + i);
    t = 0;
    auto add = [&]<int QUERIES>() {
      int d = 0;
      for (; d + kVectors * W <= head_dim; d += kVectors * W) {
        vf total[QUERIES][kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < QUERIES; i++)
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; j++) total[i][j] = load(sums + (t + i) * head_dim + d + j * W);
        for (int s = 0; s < count; s++) {
          vf v[kVectors];
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; j++) v[j] = load(wide + s * head_dim + d + j * W);
#pragma GCC unroll 4
          for (int i = 0; i < QUERIES; i++) {
            const float p = scores[(t + i) * kKeyBlock + s];
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; j++) total[i][j] += v[j] * p;
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < QUERIES; i++)
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; j++) store(sums + (t + i) * head_dim + d + j * W, total[i][j]);
      }
      for (; d < head_dim; d++)
#pragma GCC unroll 4
        for (int i = 0; i < QUERIES; i++)
          for (int s = 0; s < count; s++)
            sums[(t + i) * head_dim + d] += wide[s * head_dim + d] * scores[(t + i) * kKeyBlock + s];
    };
    for (; t + 4 <= queries; t += 4) add.template operator()<4>();
    for (; t < queries; t++) add.template operator()<1>();
  }
  for (int t = 0; t < queries; t++) {
    const float inverse = 1.0f / totals[t];
    for (int d = 0; d < head_dim; d++) out[size_t(t) * ld + d] = sums[t * head_dim + d] * inverse;
  }
}

template <Type T>
inline void attend_type(const float* q, int queries, int ld, const void* keys, const void* values, int first,
                        int head_dim, float scale, float* out, float* scratch, const void* next) {
  if (queries == 1)
    attend_one<T>(q, keys, values, first, head_dim, scale, out, scratch, next);
  else
    attend_block<T>(q, queries, ld, keys, values, first, head_dim, scale, out, scratch);
}

inline void attention(const float* q, int queries, int ld, const void* keys, const void* values, Type cache, int first,
                      int head_dim, float scale, float* out, float* scratch, const void* next) {
  if (cache == Type::kF32)
    attend_type<Type::kF32>(q, queries, ld, keys, values, first, head_dim, scale, out, scratch, next);
  else if (cache == Type::kBF16)
    attend_type<Type::kBF16>(q, queries, ld, keys, values, first, head_dim, scale, out, scratch, next);
  else
    attend_type<Type::kF16>(q, queries, ld, keys, values, first, head_dim, scale, out, scratch, next);
}

}  // namespace
}  // namespace olmoe
