// Attention over the KV cache: new keys and values are stored, then every block of queries attends.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace olmoe {
namespace {

// A block of queries of one head of one sequence, which starts at token `query` of its new ones.
struct Item {
  int sequence, head, query, count;
  int64_t first_token;
};

}  // namespace

void attention(const float* q, const float* k, const float* v, const Sequences& sequences, int heads,
               const CacheView& cache, int index, float* out) {
  const Kernels& kernel = kernels();
  const LayerCache& layer = cache.layers[index];
  const int kv_heads = cache.kv_heads, head_dim = cache.head_dim, group = heads / kv_heads;
  static thread_local std::vector<Item> items;
  static thread_local std::vector<int64_t> starts;  // the first new token of each sequence
  items.clear();
  starts.clear();
  int64_t total = 0;
  bool steps = true;  // one new token of each sequence
  for (int b = 0; b < sequences.batch; b++) {
    const int64_t count = sequences.counts[b];
    // The longest blocks come last in a causal prompt, so start with them.
    for (int64_t block = (count + kQueryBlock - 1) / kQueryBlock - 1; block >= 0; block--)
      for (int h = 0; h < heads; h++) {
        const int query = int(block) * kQueryBlock;
        items.push_back({b, h, query, std::min<int>(kQueryBlock, int(count) - query), total});
      }
    starts.push_back(total);
    total += count;
    steps = steps && count == 1;
  }
  auto store_row = [&](const float* x, uint8_t* cached, CachePlace to) {
    if (cache.type == Type::kI8)
      kernel.quantize_row(x, head_dim, reinterpret_cast<int8_t*>(cached + to.row),
                          reinterpret_cast<float*>(cached + to.scale));
    else
      kernel.store(x, head_dim, cache.type, cached + to.row);
  };
  auto store = [&](int sequence, int g, int64_t first_token) {
    for (int64_t t = 0; t < sequences.counts[sequence]; t++) {
      const size_t from = (size_t(first_token + t) * kv_heads + g) * head_dim;
      const CachePlace to = cache.place(sequences, sequence, g, sequences.lengths[sequence] + t);
      store_row(k + from, layer.keys, to);
      store_row(v + from, layer.values, to);
    }
  };
  // Where heads have keys and values of their own, and a single query, they store them themselves.
  const bool own = steps && group == 1;
  // References, because a thread_local named inside the lambda would be that of the helper thread.
  const auto& items_ = items;
  const auto& starts_ = starts;
  if (!own)
    pool().run(sequences.batch * kv_heads, total > 1 ? 1 : kv_heads, [&](int begin, int end, int) {
      for (int i = begin; i < end; i++) store(i / kv_heads, i % kv_heads, starts_[i / kv_heads]);
    });
  const float scale = 1.0f / std::sqrt(float(head_dim));
  pool().run(int(items.size()), 1, [&](int begin, int end, int next) {
    static thread_local Aligned<float> scratch;
    static thread_local std::vector<KeyBlock> blocks;
    scratch.resize(attention_scratch(head_dim));
    for (int i = begin; i < end; i++) {
      const Item& item = items_[i];
      if (own) store(item.sequence, item.head, item.first_token);
      const int following = i + 1 < end ? i + 1 : next;
      KeyBlock ahead;
      if (following >= 0) {
        const Item& other = items_[following];
        ahead = cache.key_block(layer, cache.place(sequences, other.sequence, other.head / group, 0));
      }
      const int64_t first = sequences.lengths[item.sequence] + item.query + 1, visible = first + item.count - 1;
      const size_t width = size_t(visible + kKeyBlock - 1) / kKeyBlock;
      if (blocks.size() < width) blocks.resize(width);
      cache.key_blocks(layer, sequences, item.sequence, item.head / group, visible, blocks.data());
      const size_t place = (size_t(item.first_token + item.query) * heads + item.head) * head_dim;
      kernel.attention(q + place, item.count, heads * head_dim, blocks.data(), cache.type, int(first), head_dim, scale,
                       out + place, scratch.data(), following >= 0 ? &ahead : nullptr);
    }
  });
}

}  // namespace olmoe
