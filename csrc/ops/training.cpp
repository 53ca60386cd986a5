#include "training.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../core/team.h"

namespace olmoe {
namespace {

// Tokens per task in operations that compute each token by itself.
constexpr int kTokens = 64;
// Tokens per partial sum of a norm's weight gradient.
constexpr int kNormTokens = 128;
// The fewest rows of a product per task: each task packs the second factor again.
constexpr int kLeastRows = 48;

float* aligned(std::vector<float>& memory, size_t size) {
  if (memory.size() < size + 16) memory.resize(size + 16);
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / sizeof(float);
}

void product(Products in, const Factor& a, int m, int depth, const Factor& b, int n, float* c, size_t ld,
             bool add = false) {
  static thread_local std::vector<float> memory;
  const auto kernel = in == Products::kBF16 ? kernels().bf16_product : kernels().product;
  kernel(a, m, depth, b, n, c, ld, add, aligned(memory, kProductScratch));
}

// The part of a factor from a row and a column on.
Factor part(Factor f, int row, int column = 0) {
  if (f.rows)
    f.rows += row;
  else
    f.data += row * f.ld;
  f.data += column;
  return f;
}

struct Block {
  int expert, first, rows;
};

// The rows of all experts, each expert's in blocks of about equal size and at most kProductRows.
std::vector<Block> blocks_of(const RoutedRows& routed) {
  std::vector<Block> blocks;
  for (int e = 0; e < routed.experts; e++) {
    const int begin = routed.offsets[e], count = routed.offsets[e + 1] - begin;
    const int parts = (count + kProductRows - 1) / kProductRows;
    for (int i = 0; i < parts; i++) {
      const int first = int(int64_t(count) * i / parts), end = int(int64_t(count) * (i + 1) / parts);
      blocks.push_back({e, begin + first, end - first});
    }
  }
  return blocks;
}

// The sum of each token's rows in the order of k, each times its weight if there are any. (M, D), (N, K) -> (N, D)
void combine(const float* results, const float* weights, const RoutedRows& routed, int d, float* out) {
  share((routed.tokens + kTokens - 1) / kTokens, [&](int task) {
    const size_t first = size_t(task) * kTokens, k = routed.k;
    kernels().combine(results, routed.positions + first * k, weights ? weights + first * k : nullptr,
                      std::min(kTokens, routed.tokens - int(first)), routed.k, d, out + first * d);
  });
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// `product`, with rows and columns of the result divided among the threads.
void shared_product(Products in, const Factor& a, int m, int depth, const Factor& b, int n, float* c, size_t ld,
                    bool add = false) {
  const int tall = std::clamp(ceil_div(m, get_threads()), kLeastRows, kProductRows);
  const int bands = ceil_div(n, kProductColumns);
  share(ceil_div(m, tall) * bands, [&](int task) {
    const int i = task / bands * tall, j = task % bands * kProductColumns;
    product(in, a.turned ? part(a, 0, i) : part(a, i), std::min(tall, m - i), depth,
            b.turned ? part(b, j) : part(b, 0, j), std::min(kProductColumns, n - j), c + i * ld + j, ld, add);
  });
}

}  // namespace

void sort_rows(const int64_t* ids, int64_t first, const RoutedRows& routed) {
  std::fill_n(routed.offsets, routed.experts + 1, 0);
  const auto is_ours = [&](int64_t id) { return id >= first && id < first + routed.experts; };
  for (int i = 0; i < routed.choices(); i++)
    if (is_ours(ids[i])) routed.offsets[ids[i] - first + 1]++;
  for (int e = 0; e < routed.experts; e++) routed.offsets[e + 1] += routed.offsets[e];
  std::vector<int32_t> next(routed.offsets, routed.offsets + routed.experts);
  for (int i = 0; i < routed.choices(); i++) {
    routed.positions[i] = -1;
    if (!is_ours(ids[i])) continue;
    const int row = next[ids[i] - first]++;
    routed.order[row] = i, routed.token_ids[row] = i / routed.k, routed.positions[i] = row;
  }
}

void experts_forward(Products in, const float* x, const float* weights, const RoutedRows& routed,
                     const ExpertWeights& experts, float* units, float* results, float* out) {
  const int d = experts.hidden, f = experts.width;
  const Factor inputs{x, size_t(d), routed.token_ids};
  const std::vector<Block> blocks = blocks_of(routed);
  share(int(blocks.size()), [&](int task) {
    const auto [e, first, rows] = blocks[task];
    const Factor gate_up{experts.gate_up + size_t(e) * 2 * f * d, size_t(d), nullptr, true};
    const Factor down{experts.down + size_t(e) * d * f, size_t(f), nullptr, true};
    float* unit = units + size_t(first) * 2 * f;
    product(in, part(inputs, first), rows, d, gate_up, 2 * f, unit, 2 * f);
    static thread_local std::vector<float> memory;
    float* hidden = aligned(memory, size_t(rows) * f);
    for (int r = 0; r < rows; r++, unit += 2 * f) kernels().swiglu(unit, unit + f, f, hidden + size_t(r) * f);
    product(in, {hidden, size_t(f)}, rows, f, down, d, results + size_t(first) * d, d);
  });
  combine(results, weights, routed, d, out);
}

namespace {

// What the gradients of experts are computed from; rows of inputs and of the output's gradient are found by token.
struct ExpertRows {
  Products in;
  Factor inputs, grads;
  const float* weights;
  const RoutedRows& routed;
  const ExpertWeights& experts;
  const float* units;
  const ExpertGradients& gradients;

  // The gated unit of a block's rows again, and its gradients: hidden (rows, F), grad_units (rows, 2 F).
  void differentiate(const Block& block, float* hidden, float* grad_units) const {
    static thread_local std::vector<float> memory;
    const auto [e, first, rows] = block;
    const int d = experts.hidden, f = experts.width;
    float* grad_hidden = aligned(memory, size_t(rows) * f);
    product(in, part(grads, first), rows, d, {experts.down + size_t(e) * d * f, size_t(f)}, f, grad_hidden, f);
    for (int r = 0; r < rows; r++) {
      const int choice = routed.order[first + r];
      const float* unit = units + size_t(first + r) * 2 * f;
      float* grad_unit = grad_units + size_t(r) * 2 * f;
      // The gradient of a row's weight is <grad, result>, which is <grad down, hidden>: results need not be kept.
      const float weight = kernels().swiglu_backward(unit, unit + f, grad_hidden + size_t(r) * f, weights[choice], f,
                                                     hidden + size_t(r) * f, grad_unit, grad_unit + f);
      if (gradients.weights) gradients.weights[choice] = weight;
    }
    if (gradients.x)
      product(in, {grad_units, size_t(2) * f}, rows, 2 * f, {experts.gate_up + size_t(e) * 2 * f * d, size_t(d)}, d,
              gradients.grad_rows + size_t(first) * d, d);
  }

  // Rows [i, i + count) of the gradients of an expert's weights, or what a block's rows add to them.
  void gate_up(const Block& block, int i, int count, const float* grad_units, bool add) const {
    const int d = experts.hidden, f = experts.width;
    product(in, {grad_units + i, size_t(2) * f, nullptr, true}, count, block.rows, part(inputs, block.first), d,
            gradients.gate_up + (size_t(block.expert) * 2 * f + i) * d, d, add);
  }
  void down(const Block& block, int i, int count, const float* hidden, bool add) const {
    const int d = experts.hidden, f = experts.width;
    Factor turned = part(grads, block.first, i);
    turned.turned = true;
    product(in, turned, count, block.rows, {hidden, size_t(f)}, f, gradients.down + (size_t(block.expert) * d + i) * f,
            f, add);
  }

  // All gradients of an expert and its rows, a block after the other, so that nothing between leaves the cache.
  void whole(int e) const {
    static thread_local std::vector<float> memory;
    const int d = experts.hidden, f = experts.width, begin = routed.offsets[e], count = routed.offsets[e + 1] - begin;
    float* hidden = aligned(memory, size_t(kProductRows) * 3 * f);
    float* grad_units = hidden + size_t(kProductRows) * f;
    const int blocks = std::max(1, ceil_div(count, kProductRows));  // one without rows leaves gradients of zero
    for (int i = 0; i < blocks; i++) {
      const int first = int(int64_t(count) * i / blocks), end = int(int64_t(count) * (i + 1) / blocks);
      const Block block{e, begin + first, end - first};
      if (count) differentiate(block, hidden, grad_units);
      if (gradients.gate_up) gate_up(block, 0, 2 * f, grad_units, i > 0);
      if (gradients.down) down(block, 0, d, hidden, i > 0);
    }
  }
};

// Whether each expert is one task: where its weights are small, and not where few experts have most of the rows.
bool small_experts(const RoutedRows& routed, const ExpertWeights& experts) {
  constexpr size_t kSmall = size_t(1) << 16;  // numbers of both weights
  if (size_t(3) * experts.hidden * experts.width > kSmall) return false;
  int most = 0;
  for (int e = 0; e < routed.experts; e++) most = std::max(most, routed.offsets[e + 1] - routed.offsets[e]);
  return int64_t(most) * 8 <= routed.rows();
}

}  // namespace

void experts_backward(Products in, const float* x, const float* weights, const RoutedRows& routed,
                      const ExpertWeights& experts, const float* units, const float* grad,
                      const ExpertGradients& gradients) {
  const int d = experts.hidden, f = experts.width;
  if (gradients.weights && routed.rows() < routed.choices()) std::fill_n(gradients.weights, routed.choices(), 0.0f);
  const ExpertRows work{
      in,       {x, size_t(d), routed.token_ids}, {grad, size_t(d), routed.token_ids}, weights, routed, experts, units,
      gradients};
  if (small_experts(routed, experts)) {
    share(routed.experts, [&](int e) { work.whole(e); });
  } else {
    const std::vector<Block> blocks = blocks_of(routed);
    share(int(blocks.size()), [&](int task) {
      const size_t first = blocks[task].first;
      work.differentiate(blocks[task], gradients.hidden + first * f, gradients.grad_units + first * 2 * f);
    });
    // Bands of the weights' gradients, each over all rows of its expert.
    const int gate_up_bands = gradients.gate_up ? ceil_div(2 * f, kProductRows) : 0;
    const int down_bands = gradients.down ? ceil_div(d, kProductRows) : 0, bands = gate_up_bands + down_bands;
    share(routed.experts * bands, [&](int task) {
      const int e = task / bands, first = routed.offsets[e], band = task % bands;
      const Block all{e, first, routed.offsets[e + 1] - first};
      if (band < gate_up_bands) {
        const int i = band * kProductRows;
        work.gate_up(all, i, std::min(kProductRows, 2 * f - i), gradients.grad_units + size_t(first) * 2 * f, false);
      } else {
        const int i = (band - gate_up_bands) * kProductRows;
        work.down(all, i, std::min(kProductRows, d - i), gradients.hidden + size_t(first) * f, false);
      }
    });
  }
  if (gradients.x) combine(gradients.grad_rows, nullptr, routed, d, gradients.x);
}

void linear_forward(Products in, const float* x, const float* weight, const float* bias, int n, int rows, int columns,
                    float* y) {
  shared_product(in, {x, size_t(columns)}, n, columns, {weight, size_t(columns), nullptr, true}, rows, y, rows);
  if (!bias) return;
  share(ceil_div(n, kTokens), [&](int task) {
    for (int t = task * kTokens; t < std::min(n, (task + 1) * kTokens); t++)
      kernels().axpy(1.0f, bias, rows, y + size_t(t) * rows);
  });
}

void linear_backward(Products in, const float* x, const float* weight, const float* grad, int n, int rows, int columns,
                     float* grad_x, float* grad_weight) {
  if (grad_x) shared_product(in, {grad, size_t(rows)}, n, rows, {weight, size_t(columns)}, columns, grad_x, columns);
  if (grad_weight)
    shared_product(in, {grad, size_t(rows), nullptr, true}, rows, n, {x, size_t(columns)}, columns, grad_weight,
                   columns);
}

void norm_forward(const float* x, const float* weight, float eps, int n, int d, float* y) {
  share(ceil_div(n, kTokens), [&](int task) {
    for (size_t t = task * kTokens; t < size_t(std::min(n, (task + 1) * kTokens)); t++)
      kernels().rms_norm(x + t * d, weight, eps, d, y + t * d);
  });
}

void norm_backward(const float* x, const float* weight, const float* grad, float eps, int n, int d, float* grad_x,
                   float* grad_weight) {
  const int tasks = ceil_div(n, kNormTokens);
  std::vector<float> shares(size_t(tasks) * d);
  share(tasks, [&](int task) {
    for (size_t t = size_t(task) * kNormTokens; t < std::min(size_t(n), (size_t(task) + 1) * kNormTokens); t++)
      kernels().rms_norm_backward(x + t * d, weight, grad + t * d, eps, d, grad_x ? grad_x + t * d : nullptr,
                                  shares.data() + size_t(task) * d);
  });
  if (!grad_weight) return;
  std::fill_n(grad_weight, d, 0.0f);
  for (int task = 0; task < tasks; task++) kernels().axpy(1.0f, shares.data() + size_t(task) * d, d, grad_weight);
}

void rotate(const float* x, const float* cos, const float* sin, int n, int heads, int head_dim, bool back, float* y) {
  const size_t row = size_t(heads) * head_dim, half = head_dim / 2;
  share(ceil_div(n, kTokens), [&](int task) {
    for (size_t t = size_t(task) * kTokens; t < std::min(size_t(n), (size_t(task) + 1) * kTokens); t++)
      kernels().rotate(x + t * row, cos + t * half, sin + t * half, heads, head_dim, back, y + t * row);
  });
}

void route_forward(const float* logits, int tokens, int experts, int k, float* probabilities, float* weights,
                   int64_t* ids) {
  share(ceil_div(tokens, kTokens), [&](int task) {
    std::vector<float> best(k);
    for (int t = task * kTokens; t < std::min(tokens, (task + 1) * kTokens); t++) {
      float* p = probabilities + size_t(t) * experts;
      std::copy_n(logits + size_t(t) * experts, experts, p);
      kernels().softmax(p, experts);
      int64_t* chosen = ids + size_t(t) * k;
      for (int e = 0; e < experts; e++) {
        if (e >= k && !(p[e] > best[k - 1])) continue;
        int at = std::min(e, k - 1);
        for (; at > 0 && p[e] > best[at - 1]; at--) best[at] = best[at - 1], chosen[at] = chosen[at - 1];
        best[at] = p[e], chosen[at] = e;
      }
      std::copy_n(best.data(), k, weights + size_t(t) * k);
    }
  });
}

void route_backward(const float* probabilities, const int64_t* ids, const float* grad, int tokens, int experts, int k,
                    float* grad_logits) {
  share(ceil_div(tokens, kTokens), [&](int task) {
    for (int t = task * kTokens; t < std::min(tokens, (task + 1) * kTokens); t++) {
      const float *p = probabilities + size_t(t) * experts, *g = grad + size_t(t) * k;
      const int64_t* chosen = ids + size_t(t) * k;
      float* out = grad_logits + size_t(t) * experts;
      float dot = 0;
      for (int i = 0; i < k; i++) dot += p[chosen[i]] * g[i];
      for (int e = 0; e < experts; e++) out[e] = -p[e] * dot;
      for (int i = 0; i < k; i++) out[chosen[i]] = p[chosen[i]] * (g[i] - dot);
    }
  });
}

namespace {

// Consecutive tokens of an example that see one another.
struct Text {
  int b, first, tokens;
};

// Whole examples, or the texts of the only one; the longest come first, so that no thread ends with one.
std::vector<Text> texts_of(const AttentionShape& shape) {
  std::vector<Text> texts;
  if (shape.lengths.empty())
    for (int b = 0; b < shape.batch; b++) texts.push_back({b, 0, shape.tokens});
  int first = 0;
  for (const int tokens : shape.lengths) {
    texts.push_back({0, first, tokens});
    first += tokens;
  }
  std::stable_sort(texts.begin(), texts.end(), [](const Text& a, const Text& b) { return a.tokens > b.tokens; });
  return texts;
}

float* rows_at(const HeadRows& rows, const Text& text, int h) { return rows.at(text.b, h) + text.first * rows.token; }

// Where a head's numbers in (B, H, T) begin.
size_t sums_at(const AttentionShape& shape, const Text& text, int h) {
  return (size_t(text.b) * shape.heads + h) * shape.tokens + text.first;
}

CausalHead causal_head(const AttentionShape& shape, const HeadRows& q, const HeadRows& k, const HeadRows& v,
                       const Text& text, int h) {
  const int g = h / (shape.heads / shape.kv_heads);
  return {rows_at(q, text, h), rows_at(k, text, g), rows_at(v, text, g),
          size_t(q.token),     size_t(k.token),     size_t(v.token),
          text.tokens,         shape.head_dim,      float(1.0 / std::sqrt(double(shape.head_dim)))};
}

}  // namespace

void causal_forward(Products in, const AttentionShape& shape, const HeadRows& q, const HeadRows& k, const HeadRows& v,
                    const HeadRows& out, float* sums) {
  const auto kernel = in == Products::kBF16 ? kernels().bf16_causal_attention : kernels().causal_attention;
  struct Piece {
    Text text;
    int h, first;  // of its queries
  };
  std::vector<Piece> pieces;
  for (const Text& text : texts_of(shape))
    for (int h = 0; h < shape.heads; h++)  // those with the most keys first
      for (int chunk = ceil_div(text.tokens, kQueryChunk) - 1; chunk >= 0; chunk--)
        pieces.push_back({text, h, chunk * kQueryChunk});
  share(int(pieces.size()), [&](int task) {
    static thread_local std::vector<float> memory;
    const auto& [text, h, first] = pieces[task];
    kernel(causal_head(shape, q, k, v, text, h), first, rows_at(out, text, h), size_t(out.token),
           sums + sums_at(shape, text, h), aligned(memory, causal_scratch(shape.head_dim)));
  });
}

void causal_backward(Products in, const AttentionShape& shape, const HeadRows& q, const HeadRows& k, const HeadRows& v,
                     const HeadRows& out, const float* sums, const HeadRows& grad,
                     const AttentionGradients& gradients) {
  const auto kernel = in == Products::kBF16 ? kernels().bf16_causal_backward : kernels().causal_backward;
  const int group = shape.heads / shape.kv_heads;
  const std::vector<Text> texts = texts_of(shape);
  share(int(texts.size()) * shape.kv_heads, [&](int task) {
    static thread_local std::vector<float> memory;
    const Text& text = texts[task / shape.kv_heads];
    const int g = task % shape.kv_heads;
    for (int h = g * group; h < (g + 1) * group; h++)
      kernel(causal_head(shape, q, k, v, text, h),
             {rows_at(out, text, h), rows_at(grad, text, h), sums + sums_at(shape, text, h), size_t(out.token),
              size_t(grad.token), rows_at(gradients.q, text, h), rows_at(gradients.k, text, g),
              rows_at(gradients.v, text, g), size_t(gradients.q.token), size_t(gradients.k.token),
              size_t(gradients.v.token), h > g * group},
             aligned(memory, causal_scratch(shape.head_dim)));
  });
}

double cross_entropy(Products in, const float* x, const float* weight, const int64_t* labels, int64_t ignored, int n,
                     int d, int words, float* logits, float* grad_x, float* grad_weight) {
  constexpr int kLogitTokens = 8;  // of one task of the softmax
  std::vector<double> losses(n);
  const bool gradient = grad_x || grad_weight;
  for (int first = 0; first < n; first += kLossTokens) {
    const int count = std::min(kLossTokens, n - first);
    const Factor inputs{x + size_t(first) * d, size_t(d)}, delta{logits, size_t(words)};
    shared_product(in, inputs, count, d, {weight, size_t(d), nullptr, true}, words, logits, words);
    share(ceil_div(count, kLogitTokens), [&](int task) {
      for (int t = task * kLogitTokens; t < std::min(count, (task + 1) * kLogitTokens); t++) {
        float* row = logits + size_t(t) * words;
        const int64_t label = labels[first + t];
        if (label == ignored) {
          if (gradient) std::fill_n(row, words, 0.0f);
          continue;
        }
        losses[first + t] = kernels().cross_entropy(row, words, int(label), gradient);
      }
    });
    if (grad_x) shared_product(in, delta, count, words, {weight, size_t(d)}, d, grad_x + size_t(first) * d, d);
    if (grad_weight) {
      Factor turned = delta;
      turned.turned = true;
      shared_product(in, turned, words, count, inputs, d, grad_weight, d, first > 0);
    }
  }
  double total = 0;
  for (double loss : losses) total += loss;
  return total;
}

}  // namespace olmoe
