// Keys and values of all sequences and layers, in blocks: the only place that knows their layout.
//
// A block holds `block_size` positions of one sequence, for all KV heads: (G, block_size, Dh). A row of a block table
// lists the blocks of a sequence in the order of its positions, so that sequences can join, leave and share a prefix
// without copying. A contiguous cache is the special case of one block per sequence.
//
// A kI8 cache holds signed bytes and, for each position and KV head, one fp32 scale, which a block stores after the
// bytes of each head: (G, block_size * Dh bytes, block_size scales).
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

// Keys and values of the first block.
struct LayerCache {
  uint8_t *keys, *values;
};

// Bytes from the start of a layer's keys, or values, to those of a position and KV head, and to their scale.
struct CachePlace {
  size_t row, scale;
};

struct CacheView {
  std::vector<LayerCache> layers;
  Type type = Type::kF32;
  int kv_heads = 0, head_dim = 0;
  int64_t block_size = 0;  // a multiple of kKeyBlock, unless no sequence has more than one block
  // Bytes from one block to the next; within a block, from one KV head to the next, and from a head to its scales.
  size_t block_bytes = 0, head_bytes = 0, scales_at = 0;

  // Where a position of sequence `b` is.
  CachePlace place(const Sequences& s, int b, int g, int64_t position) const {
    const size_t block = s.table[b * s.width + position / block_size], slot = position % block_size;
    const size_t head = block * block_bytes + g * head_bytes;
    return {head + slot * head_dim * sizeof_type(type), head + scales_at + slot * sizeof(float)};
  }
  // The block of positions that starts there.
  KeyBlock key_block(const LayerCache& layer, CachePlace at) const {
    KeyBlock block{layer.keys + at.row, layer.values + at.row};
    if (type == Type::kI8) {
      block.key_scales = reinterpret_cast<const float*>(layer.keys + at.scale);
      block.value_scales = reinterpret_cast<const float*>(layer.values + at.scale);
    }
    return block;
  }
  // The key blocks of the first `visible` positions.
  void key_blocks(const LayerCache& layer, const Sequences& s, int b, int g, int64_t visible, KeyBlock* blocks) const {
    for (int64_t start = 0; start < visible; start += kKeyBlock) *blocks++ = key_block(layer, place(s, b, g, start));
  }
};

}  // namespace olmoe
