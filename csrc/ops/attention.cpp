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
  static thread_local std::vector<Item> items;
  items.clear();
  int64_t total = 0;
  bool steps = true;  // one new token of each sequence
  for (int b = 0; b < batch; b++) {
    for (int64_t block = (tokens[b] + kQueryBlock - 1) / kQueryBlock - 1; block >= 0; block--)
      for (int h = 0; h < heads; h++) {
        const int query = int(block) * kQueryBlock;
        items.push_back({b, h, query, std::min<int>(kQueryBlock, int(tokens[b]) - query), total});
      }
    total += tokens[b];
    steps = steps && tokens[b] == 1;
  }
  auto store = [&](int sequence, int g, int64_t first_token) {
    for (int64_t t = 0; t < tokens[sequence]; t++) {
      const size_t from = (size_t(first_token + t) * kv_heads + g) * head_dim;
      const size_t to = (size_t(sequence) * kv_heads + g) * head_bytes +
                        size_t(lengths[sequence] + t) * head_dim * element;
      kernel.store(k + from, head_dim, cache.type, cache.keys + to);
      kernel.store(v + from, head_dim, cache.type, cache.values + to);
    }
  };
  // Where heads have keys and values of their own, and a single query, they store them themselves.
  const bool own = steps && group == 1;
  const auto& items_ = items;  // a thread_local named inside the lambda would be the helper's own
  if (!own)
    pool().run(batch * kv_heads, total > 1 ? 1 : kv_heads, [&](int begin, int end, int) {
      for (int i = begin; i < end; i++) {
        int64_t first_token = 0;
        for (int b = 0; b < i / kv_heads; b++) first_token += tokens[b];
        store(i / kv_heads, i % kv_heads, first_token);
      }
    });
  const float scale = 1.0f / std::sqrt(float(head_dim));
  auto offset = [&](const Item& item) {
    return (size_t(item.sequence) * kv_heads + item.head / group) * head_bytes;
  };
  pool().run(int(items.size()), 1, [&](int begin, int end, int next) {
    static thread_local std::vector<float> scratch;
    scratch.resize(attention_scratch(head_dim));
    for (int i = begin; i < end; i++) {
      const Item& item = items_[i];
      if (own) store(item.sequence, item.head, item.first_token);
      const int following = i + 1 < end ? i + 1 : next;
      const uint8_t* keys_ahead = following < 0 ? nullptr : cache.keys + offset(items_[following]);
      const size_t place = (size_t(item.first_token + item.query) * heads + item.head) * head_dim;
      kernel.attention(q + place, item.count, heads * head_dim, cache.keys + offset(item),
                       cache.values + offset(item), cache.type, int(lengths[item.sequence]) + item.query + 1, head_dim,
                       scale, out + place, scratch.data(), keys_ahead);
    }
  });
}

}  // namespace olmoe
