// Attention over the KV cache: new keys and values are stored, then every block of queries attends.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace olmoe {

void attention(const float* q, const float* k, const float* v, int batch, const int64_t* tokens, const int64_t* lengths,
               int heads, int kv_heads, int head_dim, const Cache& cache, float* out) {
  const Kernels& kernel = kernels();
  const size_t element = cache.type == Type::kF32 ? 4 : 2;
  const size_t head_bytes = size_t(cache.capacity) * head_dim * element;
  const int group = heads / kv_heads;
  // One item a (sequence, head, block of queries); the longest come last in a causal prompt, so start with them.
  struct Item {
    int sequence, head, query, count;
    int64_t first_token;
  };
  std::vector<Item> items;
  std::vector<int64_t> starts(batch);
  int64_t total = 0;
  for (int b = 0; b < batch; b++) {
    starts[b] = total;
    total += tokens[b];
  }
  // A token of one sequence is stored before another thread would have woken up.
  pool().run(batch * kv_heads, total > 1 ? 1 : kv_heads, [&](int begin, int end, int) {
    for (int i = begin; i < end; i++) {
      const int b = i / kv_heads, g = i % kv_heads;
      for (int64_t t = 0; t < tokens[b]; t++) {
        const size_t from = (size_t(starts[b] + t) * kv_heads + g) * head_dim;
        const size_t to = (size_t(b) * kv_heads + g) * head_bytes + size_t(lengths[b] + t) * head_dim * element;
        kernel.store(k + from, head_dim, cache.type, cache.keys + to);
        kernel.store(v + from, head_dim, cache.type, cache.values + to);
      }
    }
  });
  for (int b = 0; b < batch; b++)
    for (int64_t block = (tokens[b] + kQueryBlock - 1) / kQueryBlock - 1; block >= 0; block--)
      for (int h = 0; h < heads; h++) {
        const int query = int(block) * kQueryBlock;
        items.push_back({b, h, query, std::min<int>(kQueryBlock, int(tokens[b]) - query), starts[b]});
      }
  const float scale = 1.0f / std::sqrt(float(head_dim));
  pool().run(int(items.size()), 1, [&](int begin, int end, int) {
    static thread_local std::vector<float> scratch;
    scratch.resize(attention_scratch(head_dim));
    for (int i = begin; i < end; i++) {
      const Item& item = items[i];
      const size_t offset = (size_t(item.sequence) * kv_heads + item.head / group) * head_bytes;
      const size_t place = (size_t(item.first_token + item.query) * heads + item.head) * head_dim;
      kernel.attention(q + place, item.count, heads * head_dim, cache.keys + offset, cache.values + offset, cache.type,
                       int(lengths[item.sequence]) + item.query + 1, head_dim, scale, out + place, scratch.data());
    }
  });
}

}  // namespace olmoe
