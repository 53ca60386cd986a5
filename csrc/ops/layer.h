// One decoder layer in one call over one of our KV caches, or in two with attention between them left to the caller: a
// decoding step would spend more time going back and forth between Python and here, and on tensors in between, than on
// arithmetic.
#pragma once

#include "ops.h"

namespace olmoe {

struct LayerWeights {
  int hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, top_k = 0;
  float eps = 1e-5f, clip_qkv = 0;  // 0: no clipping
  bool norm_topk_prob = false;
  Matrix q, k, v, o;
  const float *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *o_bias = nullptr;
  const float *input_norm = nullptr, *post_norm = nullptr, *q_norm = nullptr, *k_norm = nullptr;
  Matrix router;
  Experts experts;
};

// x (N, D), cos and sin (N, Dh/2) -> q (N, H*Dh), k and v (N, G*Dh): norm, projections, QK-norm, clipping, RoPE.
void attention_inputs(const LayerWeights& w, const float* x, const float* cos, const float* sin, int tokens, float* q,
                      float* k, float* v);

// What the routers of a call decide: for each layer logits (N, E), weights and ids (N, K).
struct Routed {
  float *logits, *weights;
  int64_t* ids;
};

// x (N, D) and what attention gave (N, H*Dh) -> y (N, D), the layer's output, and what its router decided. y may not be
// x. With `policies`, of which those for `index` count, K is theirs (see `route`).
void attention_output(const LayerWeights& w, const float* x, const float* attended, int tokens, float* y,
                      const Routed& routed, const Policies* policies = nullptr, int index = 0);

// Both, and between them attention over layer `index` of a KV cache, for sequences that lie end to end.
void layer(const LayerWeights& w, const float* x, const float* cos, const float* sin, const Sequences& sequences,
           const CacheView& cache, int index, float* y, const Routed& routed, const Policies* policies = nullptr);

}  // namespace olmoe
