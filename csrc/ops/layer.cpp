#include "layer.h"

#include <algorithm>
#include <numeric>

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

}  // namespace

void attention_inputs(const LayerWeights& w, const float* x, const float* cos, const float* sin, int tokens, float* q,
                      float* k, float* v) {
  static thread_local std::vector<float> normed;
  static thread_local Activations inputs;
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

void attention_output(const LayerWeights& w, const float* x, const float* attended, int tokens, float* y, float* logits,
                      float* weights, int64_t* ids) {
  static thread_local std::vector<float> normed;
  static thread_local Activations inputs;
  normed.resize(size_t(tokens) * w.hidden);
  inputs.set(w.o, attended, tokens, w.hidden, pool());
  linear(w.o, inputs, w.o_bias, x, y, w.hidden);
  rms_norm(y, w.post_norm, w.eps, tokens, w.hidden, normed.data());
  inputs.set(w.router, normed.data(), tokens, w.hidden, pool());
  linear(w.router, inputs, nullptr, nullptr, logits, w.experts.count);
  route(logits, tokens, w.experts.count, w.top_k, w.norm_topk_prob, weights, ids);
  // Some tokens at a time: the outputs of all their experts are in memory together.
  constexpr int kTokens = 1024;
  for (int t = 0; t < tokens; t += kTokens) {
    const size_t first = size_t(t) * w.hidden, chosen = size_t(t) * w.top_k;
    moe(w.experts, normed.data() + first, weights + chosen, ids + chosen, std::min(kTokens, tokens - t), w.top_k,
        y + first, y + first);
  }
}

void layer(const LayerWeights& w, const float* x, const float* cos, const float* sin, int batch, const int64_t* tokens,
           const int64_t* lengths, const Cache& cache, float* y, float* logits, float* weights, int64_t* ids) {
  static thread_local std::vector<float> buffer;
  const size_t total = std::accumulate(tokens, tokens + batch, size_t(0)), kv_width = size_t(w.kv_heads) * w.head_dim;
  buffer.resize(2 * total * (w.hidden + kv_width));
  float *q = buffer.data(), *attended = q + total * w.hidden, *k = attended + total * w.hidden, *v = k + total * kv_width;
  attention_inputs(w, x, cos, sin, int(total), q, k, v);
  attention(q, k, v, batch, tokens, lengths, w.heads, w.kv_heads, w.head_dim, cache, attended);
  attention_output(w, x, attended, int(total), y, logits, weights, ids);
}

void layers(const std::vector<const LayerWeights*>& stack, const float* x, const float* cos, const float* sin, int batch,
            const int64_t* tokens, const int64_t* lengths, const std::vector<Cache>& caches, float* y, float* logits,
            float* weights, int64_t* ids) {
  static thread_local std::vector<float> between;
  const size_t total = std::accumulate(tokens, tokens + batch, size_t(0));
  for (size_t i = 0; i < stack.size(); i++) {
    const LayerWeights& w = *stack[i];
    layer(w, x, cos, sin, batch, tokens, lengths, caches[i], y, logits, weights, ids);
    logits += total * w.experts.count, weights += total * w.top_k, ids += total * w.top_k;
    if (i + 1 == stack.size()) break;
    between.assign(y, y + total * w.hidden);  // o_proj adds its input to its output, so these must be two places
    x = between.data();
  }
}

}  // namespace olmoe
