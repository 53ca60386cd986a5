// Keys and values of all sequences and layers, in blocks: the only place that knows how they lie.
//
// A block holds `block_size` positions of one sequence, for all KV heads: (G, block_size, Dh). Which blocks a sequence
// has, in the order of its positions, says its row of a table. So sequences join, leave and share what they have in
// common without a copy. A cache with the positions of a sequence one after the other is the case of one block each.
//
// Shapes legend: see types.h; B sequences of a call.
#pragma once

#include <vector>

#include "types.h"

namespace olmoe {

// The sequences of one call, which lie end to end: `counts[b]` new tokens after `lengths[b]` cached ones, in the blocks
// table[b * width], table[b * width + 1], ...
struct Sequences {
  int batch = 0;
  const int64_t *counts = nullptr, *lengths = nullptr;
  const int32_t* table = nullptr;
  int64_t width = 0;

  int tokens() const {
    int64_t total = 0;
    for (int b = 0; b < batch; b++) total += counts[b];
    return int(total);
  }
};

struct LayerCache {
  uint8_t* keys;    // (blocks, G, block_size, Dh)
  uint8_t* values;  // of the same shape
};

struct CacheView {
  std::vector<LayerCache> layers;
  Type type = Type::kF32;
  int kv_heads = 0, head_dim = 0;
  int64_t block_size = 0;  // a multiple of kKeyBlock, unless no sequence has more than one block

  size_t row_bytes() const { return size_t(head_dim) * sizeof_type(type); }
  // Bytes from the start of a layer's keys, or values, to a position of sequence `b`, for KV head `g`.
  size_t offset(const Sequences& s, int b, int g, int64_t position) const {
    const int64_t block = s.table[b * s.width + position / block_size];
    return size_t((block * kv_heads + g) * block_size + position % block_size) * row_bytes();
  }
  // Where each kKeyBlock of the first `visible` positions begins.
  void key_blocks(const LayerCache& layer, const Sequences& s, int b, int g, int64_t visible, const void** keys,
                  const void** values) const {
    for (int64_t start = 0; start < visible; start += kKeyBlock) {
      const size_t at = offset(s, b, g, start);
      *keys++ = layer.keys + at, *values++ = layer.values + at;
    }
  }
};

}  // namespace olmoe
