#include "decoder.h"

#include <algorithm>

namespace olmoe {
namespace {

// An output head with fewer multiplications than this is not worth other threads.
constexpr int64_t kAloneProducts = 1 << 20;

}  // namespace

void forward(const DecoderWeights& w, const Tokens& tokens, const Sequences& sequences, const CacheView& cache,
             const Policies* policies, const Wanted& wanted) {
  static thread_local Aligned<float> hidden, angles, decided;
  static thread_local std::vector<int64_t> ids;
  const int count = sequences.tokens(), d = w.hidden(), half = w.layers.front().head_dim / 2;
  const int experts = w.layers.front().experts.count, k = policies ? policies->largest : w.top_k();
  const size_t size = size_t(count) * d;
  // Two buffers that alternate, because a layer's output must not overwrite its input.
  hidden.resize(2 * size);
  float *x = hidden.data(), *y = x + size;
  embed(w.embedding, tokens.ids, count, x);
  angles.resize(2 * size_t(count) * half);
  float *cos = angles.data(), *sin = cos + size_t(count) * half;
  for (int t = 0; t < count; t++) {
    std::copy_n(tokens.cos + tokens.angles[t] * half, half, cos + size_t(t) * half);
    std::copy_n(tokens.sin + tokens.angles[t] * half, half, sin + size_t(t) * half);
  }
  decided.resize(size_t(count) * (experts + k));
  ids.resize(size_t(count) * k);
  const Routed routed{decided.data(), decided.data() + size_t(count) * experts, ids.data()};
  const int layers = int(w.layers.size());
  for (int i = 0; i < layers; i++) {
    layer(w.layers[i], x, cos, sin, sequences, cache, i, y, routed, policies);
    std::swap(x, y);
    for (int r = 0; r < wanted.traced_count; r++) {
      const size_t from = size_t(wanted.traced[r]) * k, to = (size_t(r) * layers + i) * k;
      std::copy_n(routed.weights + from, k, wanted.weights + to);
      std::copy_n(routed.ids + from, k, wanted.ids + to);
    }
  }
  if (!wanted.count) return;
  for (int r = 0; r < wanted.count; r++)  // each into a row that is free: y is no longer needed
    std::copy_n(x + wanted.rows[r] * d, d, y + size_t(r) * d);
  const ThreadPool::Alone alone(pool(), int64_t(wanted.count) * w.head.rows * d < kAloneProducts);
  rms_norm(y, w.norm, w.eps, wanted.count, d, y);
  static thread_local Activations inputs;
  inputs.set(w.head, y, wanted.count, d, pool());
  linear(w.head, inputs, nullptr, nullptr, wanted.logits, w.head.rows);
}

}  // namespace olmoe
