// Causal attention in training, forward and backward, by the tiles of products.h. Probabilities are not kept: backward
// computes them again from the scores and the logarithm of their sum (FlashAttention-2, Dao 2023).
//
// Scores are computed turned, a row for each key and a column for each query. So sums over keys are those of vectors,
// and probabilities are, as they lie in memory, both factors that they are needed as: rows of A in the gradients of
// keys and values, and a panel of B in the output and the gradient of queries, which are turned as well.
#pragma once

#include "bf16_products.h"
#include "elementwise.h"

namespace olmoe {
namespace {

constexpr int kCausal = 64;  // queries, and keys, of a block of scores
constexpr int kHalf = kCausal / 2;
static_assert(kCausal % kPanelColumns == 0 && kHalf % W == 0);

constexpr float kLog2E = 1.44269504f;

// 2^x for numbers that are not much above zero; what is below 2^-126 becomes about that.
OLMOE_INLINE vf power_of_two(vf x) {
  const vf least = splat(-126.0f);
  x = least > x ? least : x;        // NaN passes
  const float magic = 12582912.0f;  // as in vexp
  const vf shifted = x + magic, r = x - (shifted - magic);
  vf p = splat(0.000153458124f);
  p = p * r + 0.00133999309f;
  p = p * r + 0.00961848907f;
  p = p * r + 0.0555032864f;
  p = p * r + 0.240226462f;
  p = p * r + 0.693147182f;
  p = p * r + 1.0f;
  // Unsigned: for queries that do not see a key, whose result is thrown away, the sum may overflow.
  return (vf)((vu)p + ((vu)shifted << 23));
}

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Memory of a task, part by part.
struct Parts {
  float* next;
  float* take(size_t size) {
    float* part = next;
    next += (size + 15) / 16 * 16;
    return part;
  }
};

// A block of at most kCausal queries of one head, the number of columns that are computed for it, and what is known
// about each: `turned` are its queries as panels of a second factor.
struct Queries {
  int first, count, width;
  float* turned;
};

template <typename Numbers>
struct Causal {
  static constexpr int kPlaces = kCausal / Numbers::kNumbers;  // of a row or column of scores
  static int places(int depth) { return (depth + Numbers::kNumbers - 1) / Numbers::kNumbers; }
  // Floats from row to row of a factor with this depth.
  static size_t row_stride(int depth) { return round_up(places(depth), W); }

  static Factor rows_of(const float* data, size_t ld) { return {data, ld}; }
  static Factor turned(const float* data, size_t ld) { return {data, ld, nullptr, true}; }

  // Rows of a block of queries as panels whose columns these are.
  static float* pack_turned(const float* x, size_t ld, const Queries& queries, int head_dim, Parts& parts) {
    float* panels = parts.take(size_t(places(head_dim)) * kCausal);
    Numbers::pack(turned(x, ld), 0, head_dim, queries.first, queries.count, panels);
    return panels;
  }
  static float* pack_rows(const float* x, size_t ld, const Queries& queries, int head_dim, Parts& parts) {
    float* panels = parts.take(size_t(kPlaces) * round_up(head_dim, W));
    Numbers::pack(rows_of(x, ld), queries.first, queries.count, 0, head_dim, panels);
    return panels;
  }

  // out (keys, kCausal) = rows times panels. On the diagonal the vectors whose queries are all before a tile's keys are
  // left out.
  static void scores(const float* const* rows, int keys, int depth, const float* panels, int width, bool diagonal,
                     float* out) {
    for (int p = 0; p < width; p += kPanelColumns) {
      const int some = width - p < kPanelColumns ? width - p : kPanelColumns;
      for (int i = 0; i < keys;) {
        const int count = tile_rows(keys - i), left = diagonal && i / W * W > p ? i / W * W - p : 0;
        if (left >= some) break;
        tile_of<Numbers>(count, (some - left) / W)(rows + i, 0, depth, panels + size_t(p) * depth + left, some,
                                                   out + size_t(i) * kCausal + p + left, kCausal, some - left, false);
        i += count;
      }
    }
  }

  // Probabilities, or their gradients, as panels of a second factor.
  struct Panels {
    const float* data;
    int depth;  // places
    // Where column p begins, and the floats from row to row; `some` columns are its panel's.
    const float* at(int p) const { return Numbers::kNumbers == 1 ? data + p : data + size_t(p) * depth; }
    size_t stride(int some) const { return Numbers::kNumbers == 1 ? kCausal : some; }
  };
  static Panels panels_of(const float* block, int keys, int width, float* memory) {
    if (Numbers::kNumbers == 1) return {block, keys};
    Numbers::pack(rows_of(block, kCausal), 0, keys, 0, width, memory);
    return {memory, places(keys)};
  }

  // out (head_dim, kCausal) = or += rows (head_dim, keys) times a block (keys, width). On the diagonal the second half
  // of the keys has nothing for the first half of the queries.
  static void add_columns(const float* const* rows, int head_dim, int keys, const Panels& block, int width,
                          bool diagonal, bool add, float* out) {
    const int half = diagonal && keys > kHalf ? places(kHalf) : block.depth;
    for (int p = 0; p < width; p += kPanelColumns) {
      const int some = width - p < kPanelColumns ? width - p : kPanelColumns;
      const size_t stride = block.stride(some);
      for (int i = 0; i < head_dim;) {
        const int count = tile_rows(head_dim - i);
        float* c = out + size_t(i) * kCausal + p;
        tile_of<Numbers>(count, some / W)(rows + i, 0, half, block.at(p), stride, c, kCausal, some, add);
        const int left = p < kHalf ? kHalf - p : 0;
        if (half < block.depth && left < some)
          tile_of<Numbers>(count, (some - left) / W)(rows + i, half, block.depth - half,
                                                     block.at(p) + half * stride + left, stride, c + left, kCausal,
                                                     some - left, true);
        i += count;
      }
    }
  }

  // out (keys, head_dim) = or += rows (keys, queries) times panels (queries, head_dim). On the diagonal a key's first
  // query is itself.
  static void add_rows(const float* const* rows, int keys, int queries, const float* panels, int head_dim,
                       bool diagonal, bool add, float* out, size_t ld) {
    const int depth = places(queries);
    for (int p = 0; p < head_dim; p += kPanelColumns) {
      const int some = head_dim - p < kPanelColumns ? head_dim - p : kPanelColumns, vectors = vectors_of(some);
      for (int i = 0; i < keys;) {
        const int count = tile_rows(keys - i), start = diagonal ? i / Numbers::kNumbers : 0;
        tile_of<Numbers>(count, vectors)(rows + i, start, depth - start,
                                         panels + size_t(p) * depth + size_t(start) * vectors * W, vectors * W,
                                         out + i * ld + p, ld, some, add);
        i += count;
      }
    }
  }

  // Rows (keys, queries) of a block as a first factor.
  static void rows_of_block(const float* block, int keys, int queries, float* memory, const float** rows) {
    Numbers::rows(rows_of(block, kCausal), 0, keys, 0, queries, memory, rows, kPlaces);
  }
};

// Lane l of a vector of queries that begins `before` queries before a key: whether the key is its own or earlier.
OLMOE_INLINE vi sees(int before) {
  vi lanes;
  for (int l = 0; l < W; l++) lanes[l] = l;
  return lanes >= before;
}

// Of a vector of queries, how many keys of a block are looked at: those after it are not, on the diagonal.
OLMOE_INLINE int keys_seen(int column, int keys, bool diagonal) {
  return diagonal && column + W < keys ? column + W : keys;
}

OLMOE_INLINE void clear_unseen(float* block, int seen, int keys) {
  for (int j = seen; j < keys; j++) store(block + size_t(j) * kCausal, vf{});
}

// Scores (keys, width) to 2^(score * scale - top), `tops` being the largest so far in that measure and `totals` the
// sums; out (head_dim, kCausal) is what has been added up by the former tops.
inline void exponentials_of(float* scores, int keys, int width, bool diagonal, float scale, bool begins, float* tops,
                            float* totals, float* out, int head_dim) {
  for (int c = 0; c < width; c += W) {
    float* column = scores + c;
    const int seen = keys_seen(c, keys, diagonal), whole = diagonal && c < seen ? c : seen;
    const vf before = begins ? splat(-INFINITY) : load(tops + c);
    vf highest[2] = {splat(-INFINITY), splat(-INFINITY)};
    int j = 0;
    for (; j + 2 <= whole; j += 2)
      for (int i = 0; i < 2; i++) highest[i] = vmax(load(column + size_t(j + i) * kCausal), highest[i]);
    for (; j < whole; j++) highest[0] = vmax(load(column + size_t(j) * kCausal), highest[0]);
    for (; j < seen; j++)
      highest[0] = vmax(sees(j - c) ? load(column + size_t(j) * kCausal) : splat(-INFINITY), highest[0]);
    const vf top = vmax(vmax(highest[0], highest[1]) * scale, before);
    vf sums = {};
    for (j = 0; j < whole; j++) {
      const vf p = power_of_two(load(column + size_t(j) * kCausal) * scale - top);
      sums += p;
      store(column + size_t(j) * kCausal, p);
    }
    for (; j < seen; j++) {
      const vf p = sees(j - c) ? power_of_two(load(column + size_t(j) * kCausal) * scale - top) : vf{};
      sums += p;
      store(column + size_t(j) * kCausal, p);
    }
    clear_unseen(column, seen, keys);
    store(tops + c, top);
    if (begins) {
      store(totals + c, sums);
      continue;
    }
    const vf less = power_of_two(before - top);
    store(totals + c, load(totals + c) * less + sums);
    for (int i = 0; i < head_dim; i++) store(out + size_t(i) * kCausal + c, load(out + size_t(i) * kCausal + c) * less);
  }
}

// The first `count` columns of a block (head_dim, kCausal) as rows.
inline void turn_back(const float* block, int head_dim, int count, float* out, size_t ld) {
  if (head_dim % W == 0) {
    turn({block, kCausal}, 0, head_dim, 0, count, out, ld);
    return;
  }
  for (int t = 0; t < count; t++)
    for (int i = 0; i < head_dim; i++) out[t * ld + i] = block[size_t(i) * kCausal + t];
}

template <typename Numbers>
inline void causal_attention(const CausalHead& head, int first, float* out, size_t ld, float* sums, float* scratch) {
  using Blocks = Causal<Numbers>;
  const int d = head.head_dim, places = Blocks::places(d);
  const int end = head.tokens - first < kQueryChunk ? head.tokens : first + kQueryChunk;
  const float scale = head.scale * kLog2E;
  struct Block : Queries {
    float *out, *tops, *totals;
  } blocks[kQueryChunk / kCausal];
  Parts parts{scratch};
  int count = 0;
  for (int i = first; i < end; i += kCausal) {
    Block& block = blocks[count++];
    block.first = i, block.count = end - i < kCausal ? end - i : kCausal, block.width = round_up(block.count, W);
    block.turned = Blocks::pack_turned(head.q, head.q_ld, block, d, parts);
    block.out = parts.take(size_t(d) * kCausal), block.tops = parts.take(kCausal), block.totals = parts.take(kCausal);
  }
  float *scores = parts.take(kCausal * kCausal), *panels = parts.take(kCausal * kCausal);
  float *key_memory = parts.take(kCausal * Blocks::row_stride(d)), *value_memory = parts.take(size_t(d) * kCausal);
  const float *keys[kCausal], *values[kCausalDim];
  for (int j = 0; j < end; j += kCausal) {
    const int some = end - j < kCausal ? end - j : kCausal;
    Numbers::rows(Blocks::rows_of(head.k, head.k_ld), j, some, 0, d, key_memory, keys, Blocks::row_stride(d));
    Numbers::rows(Blocks::turned(head.v, head.v_ld), 0, d, j, some, value_memory, values, Blocks::kPlaces);
    for (int b = 0; b < count; b++) {
      Block& block = blocks[b];
      if (block.first < j) continue;
      const bool diagonal = block.first == j;
      Blocks::scores(keys, some, places, block.turned, block.width, diagonal, scores);
      exponentials_of(scores, some, block.width, diagonal, scale, j == 0, block.tops, block.totals, block.out, d);
      Blocks::add_columns(values, d, some, Blocks::panels_of(scores, some, block.width, panels), block.width, diagonal,
                          j > 0, block.out);
    }
  }
  for (int b = 0; b < count; b++) {
    Block& block = blocks[b];
    for (int c = 0; c < block.width; c += W) {
      const vf share = 1.0f / load(block.totals + c);
      for (int i = 0; i < d; i++)
        store(block.out + size_t(i) * kCausal + c, load(block.out + size_t(i) * kCausal + c) * share);
    }
    turn_back(block.out, d, block.count, out + size_t(block.first) * ld, ld);
    for (int t = 0; t < block.count; t++) sums[block.first + t] = block.tops[t] + std::log2(block.totals[t]);
  }
}

// Scores and gradients of probabilities, (keys, width) each, to probabilities and gradients of scores. `dots` are the
// sums of a query's output times its gradient.
inline void score_gradients(float* scores, float* grads, int keys, int width, bool diagonal, float scale,
                            const float* sums, const float* dots) {
  for (int c = 0; c < width; c += W) {
    float *column = scores + c, *grad = grads + c;
    const int seen = keys_seen(c, keys, diagonal), whole = diagonal && c < seen ? c : seen;
    const vf sum = load(sums + c), dot = load(dots + c);
    const float log_scale = scale * kLog2E;
    for (int j = 0; j < seen; j++) {
      vf p = power_of_two(load(column + size_t(j) * kCausal) * log_scale - sum);
      if (j >= whole) p = sees(j - c) ? p : vf{};
      store(column + size_t(j) * kCausal, p);
      store(grad + size_t(j) * kCausal, p * (load(grad + size_t(j) * kCausal) - dot) * scale);
    }
    clear_unseen(column, seen, keys), clear_unseen(grad, seen, keys);
  }
}

// The sum of a row times one of numbers as they are multiplied, as it is for the gradients of its probabilities.
template <typename Numbers>
inline float dot(const float* row, const float* numbers, int n) {
  vf totals = {};
  int i = 0;
  for (; i + W <= n; i += W) totals += load(row + i) * Numbers::multiplied(load(numbers + i));
  float total = sum(totals);
  for (; i < n; i++) total += row[i] * Numbers::multiplied(splat(numbers[i]))[0];
  return total;
}

template <typename Numbers>
inline void causal_backward(const CausalHead& head, const CausalGradients& gradients, float* scratch) {
  using Blocks = Causal<Numbers>;
  const int d = head.head_dim, places = Blocks::places(d), n = head.tokens;
  struct Block : Queries {
    float *grads_turned, *rows, *grads, *sums, *dots, *out;
  } blocks[kQueryChunk / kCausal];
  const int chunk = d > 64 ? kQueryChunk / 2 : kQueryChunk;  // so that it stays in the second cache
  for (int first = 0; first < n; first += chunk) {
    const int end = n - first < chunk ? n : first + chunk;
    Parts parts{scratch};
    int count = 0;
    for (int i = first; i < end; i += kCausal) {
      Block& block = blocks[count++];
      block.first = i, block.count = end - i < kCausal ? end - i : kCausal, block.width = round_up(block.count, W);
      block.turned = Blocks::pack_turned(head.q, head.q_ld, block, d, parts);
      block.grads_turned = Blocks::pack_turned(gradients.grad, gradients.grad_ld, block, d, parts);
      block.rows = Blocks::pack_rows(head.q, head.q_ld, block, d, parts);
      block.grads = Blocks::pack_rows(gradients.grad, gradients.grad_ld, block, d, parts);
      block.out = parts.take(size_t(d) * kCausal), block.sums = parts.take(kCausal), block.dots = parts.take(kCausal);
      for (int t = 0; t < kCausal; t++) {
        const size_t row = i + t;
        block.sums[t] = t < block.count ? gradients.sums[row] : 0.0f;
        block.dots[t] = t < block.count ? dot<Numbers>(gradients.out + row * gradients.out_ld,
                                                       gradients.grad + row * gradients.grad_ld, d)
                                        : 0.0f;
      }
    }
    float *scores = parts.take(kCausal * kCausal), *grads = parts.take(kCausal * kCausal);
    float *row_memory = parts.take(kCausal * kCausal), *panels = parts.take(kCausal * kCausal);
    float* key_memory = parts.take(kCausal * Blocks::row_stride(d));
    float* value_memory = parts.take(kCausal * Blocks::row_stride(d));
    float* turned_memory = parts.take(size_t(d) * kCausal);
    const float *keys[kCausal], *values[kCausal], *turned[kCausalDim], *rows[kCausal];
    for (int j = 0; j < end; j += kCausal) {
      const int some = end - j < kCausal ? end - j : kCausal;
      Numbers::rows(Blocks::rows_of(head.k, head.k_ld), j, some, 0, d, key_memory, keys, Blocks::row_stride(d));
      Numbers::rows(Blocks::rows_of(head.v, head.v_ld), j, some, 0, d, value_memory, values, Blocks::row_stride(d));
      Numbers::rows(Blocks::turned(head.k, head.k_ld), 0, d, j, some, turned_memory, turned, Blocks::kPlaces);
      float *grad_k = gradients.k + j * gradients.k_ld, *grad_v = gradients.v + j * gradients.v_ld;
      for (int b = 0; b < count; b++) {
        Block& block = blocks[b];
        if (block.first < j) continue;
        const bool diagonal = block.first == j, add = gradients.add || !diagonal;
        Blocks::scores(keys, some, places, block.turned, block.width, diagonal, scores);
        Blocks::scores(values, some, places, block.grads_turned, block.width, diagonal, grads);
        score_gradients(scores, grads, some, block.width, diagonal, head.scale, block.sums, block.dots);
        if (block.first == 0) grads[0] = 0;  // the first token sees itself alone, whatever its score
        Blocks::rows_of_block(scores, some, block.count, row_memory, rows);
        Blocks::add_rows(rows, some, block.count, block.grads, d, diagonal, add, grad_v, gradients.v_ld);
        Blocks::rows_of_block(grads, some, block.count, row_memory, rows);
        Blocks::add_rows(rows, some, block.count, block.rows, d, diagonal, add, grad_k, gradients.k_ld);
        Blocks::add_columns(turned, d, some, Blocks::panels_of(grads, some, block.width, panels), block.width, diagonal,
                            j > 0, block.out);
      }
    }
    for (int b = 0; b < count; b++)
      turn_back(blocks[b].out, d, blocks[b].count, gradients.q + size_t(blocks[b].first) * gradients.q_ld,
                gradients.q_ld);
  }
}

#if defined(__AVX512BF16__)
constexpr auto kBF16Causal = &causal_attention<Pairs>;
constexpr auto kBF16CausalBackward = &causal_backward<Pairs>;
#else
constexpr decltype(Kernels::bf16_causal_attention) kBF16Causal = nullptr;
constexpr decltype(Kernels::bf16_causal_backward) kBF16CausalBackward = nullptr;
#endif

}  // namespace
}  // namespace olmoe
