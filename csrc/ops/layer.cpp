#include "layer.h"

#include <algorithm>

namespace olmoe {
namespace {

// QK-norm over the whole width, then clipping, then the rotation of each head; of queries and of keys.
void finish_heads(const LayerWeights& w, float* q, float* k, const float* cos, const float* sin, int tokens) {
  const Kernels& kernel = kernels();
  const int half = w.head_dim / 2;
  pool().run(2 * tokens, std::min(tokens, 8), [&](int begin, int end, int) {
    for (int i = begin; i < end; i++) {
      const bool queries = i < tokens;
      const int t = queries ? i : i - tokens, heads = queries ? w.heads : w.kv_heads, width = heads * w.head_dim;
      float* row = (queries ? q : k) + size_t(t) * width;
      kernel.rms_norm(row, queries ? w.q_norm : w.k_norm, w.eps, width, row);
      if (w.clip_qkv > 0)
        for (int j = 0; j < width; j++) row[j] = std::clamp(row[j], -w.clip_qkv, w.clip_qkv);
      for (int h = 0; h < heads; h++)
        kernel.rope(row + h * w.head_dim, cos + size_t(t) * half, sin + size_t(t) * half, w.head_dim);
    }
  });
}

// A layer with fewer multiplications than this is not worth other threads: its parts take microseconds.
constexpr int64_t kAloneProducts = 1 << 21;

// Multiplications of one token by the weights of a layer.
int64_t products_of_token(const LayerWeights& w) {
  const int64_t attention = 2 * int64_t(w.hidden) * w.hidden + 2 * int64_t(w.kv_heads) * w.head_dim * w.hidden;
  return attention + 3 * int64_t(w.top_k) * w.experts.width * w.hidden + int64_t(w.experts.count) * w.hidden;
}

// `met` is the number of keys that a head attends to, summed over the tokens.
bool is_small(const LayerWeights& w, int tokens, int64_t met = 0) {
  return tokens * products_of_token(w) + 2 * met * w.hidden < kAloneProducts;
}

}  // namespace

void attention_inputs(const LayerWeights& w, const float* x, const float* cos, const float* sin, int tokens, float* q,
                      float* k, float* v) {
  static thread_local Aligned<float> normed;
  static thread_local Activations inputs;
  const ThreadPool::Alone alone(pool(), is_small(w, tokens));
  normed.resize(size_t(tokens) * w.hidden);
  rms_norm(x, w.input_norm, w.eps, tokens, w.hidden, normed.data());
  const int kv_width = w.kv_heads * w.head_dim;
  const Product products[] = {{&w.q, w.q_bias, nullptr, q, w.hidden},
                              {&w.k, w.k_bias, nullptr, k, kv_width},
                              {&w.v, w.v_bias, nullptr, v, kv_width}};
  inputs.set(w.q, normed.data(), tokens, w.hidden, pool());
  auto alike = [](const Matrix& a, const Matrix& b) { return a.type == b.type && a.bf16_inputs == b.bf16_inputs; };
  if (alike(w.q, w.k) && alike(w.q, w.v)) {
    linear({products[0], products[1], products[2]}, inputs);
  } else {
    const Matrix* last = &w.q;
    for (const Product& product : products) {
      if (!alike(*product.m, *last)) inputs.set(*product.m, normed.data(), tokens, w.hidden, pool());
      last = product.m;
      linear({product}, inputs);
    }
  }
  finish_heads(w, q, k, cos, sin, tokens);
  if (w.clip_qkv > 0)
    for (size_t i = 0; i < size_t(tokens) * kv_width; i++) v[i] = std::clamp(v[i], -w.clip_qkv, w.clip_qkv);
}

void attention_output(const LayerWeights& w, const float* x, const float* attended, int tokens, float* y,
                      const Routed& routed, const Policies* policies, int index) {
  static thread_local Aligned<float> normed;
  static thread_local Activations inputs;
  const ThreadPool::Alone alone(pool(), is_small(w, tokens));
  normed.resize(size_t(tokens) * w.hidden);
  inputs.set(w.o, attended, tokens, w.hidden, pool());
  linear(w.o, inputs, w.o_bias, x, y, w.hidden);
  rms_norm(y, w.post_norm, w.eps, tokens, w.hidden, normed.data());
  inputs.set(w.router, normed.data(), tokens, w.hidden, pool());
  linear(w.router, inputs, nullptr, nullptr, routed.logits, w.experts.count);
  route(routed.logits, tokens, w.experts.count, w.top_k, w.norm_topk_prob, routed.weights, routed.ids, policies, index);
  const int k = policies ? policies->largest : w.top_k;
  // In chunks of tokens, because the outputs of all their experts are in memory at once.
  constexpr int kTokens = 1024;
  for (int t = 0; t < tokens; t += kTokens) {
    const size_t first = size_t(t) * w.hidden, chosen = size_t(t) * k;
    moe(w.experts, normed.data() + first, routed.weights + chosen, routed.ids + chosen, std::min(kTokens, tokens - t),
        k, y + first, y + first);
  }
}

void layer(const LayerWeights& w, const float* x, const float* cos, const float* sin, const Sequences& sequences,
           const CacheView& cache, int index, float* y, const Routed& routed, const Policies* policies) {
  static thread_local Aligned<float> buffer;
  const int tokens = sequences.tokens();
  int64_t met = 0;
  for (int b = 0; b < sequences.batch; b++) met += sequences.counts[b] * (sequences.lengths[b] + sequences.counts[b]);
  const bool small = is_small(w, tokens, met);
  const size_t kv_width = size_t(w.kv_heads) * w.head_dim;
  buffer.resize(2 * size_t(tokens) * (w.hidden + kv_width));
  float *q = buffer.data(), *attended = q + size_t(tokens) * w.hidden, *k = attended + size_t(tokens) * w.hidden;
  float* v = k + tokens * kv_width;
  attention_inputs(w, x, cos, sin, tokens, q, k, v);
  {
    const ThreadPool::Alone alone(pool(), small);
    attention(q, k, v, sequences, w.heads, cache, index, attended);
  }
  attention_output(w, x, attended, tokens, y, routed, policies, index);
}

}  // namespace olmoe
