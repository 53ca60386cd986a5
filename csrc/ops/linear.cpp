// Activations in the form a matrix wants, and the product with one matrix.
#include <algorithm>

#include "ops.h"

namespace olmoe {

void Activations::reserve(const Matrix& m, int tokens) {
  packed_ = m.packed();
  columns_ = m.columns;
  zero_ = m.packed() ? m.zero() : 0;
  const size_t row_bytes = packed_ ? m.blocks() * sizeof(ActivationBlock) : size_t(columns_) * sizeof(float);
  // An odd number of cache lines: rows a power of two apart would all fall into the same few sets of the cache.
  const size_t stride = ((row_bytes + 63) / 64 | 1) * 64;
  if (bytes_.size() < stride * tokens + 64) bytes_.resize(stride * tokens + 64);
  uint8_t* base = bytes_.data() + (64 - reinterpret_cast<uintptr_t>(bytes_.data()) % 64) % 64;
  rows_.resize(tokens);
  for (int t = 0; t < tokens; t++) rows_[t].blocks = reinterpret_cast<const ActivationBlock*>(base + t * stride);
}

void Activations::put(int row, int column, const float* x, int count) {
  uint8_t* place = const_cast<uint8_t*>(reinterpret_cast<const uint8_t*>(rows_[row].blocks));
  if (packed_) {
    kernels().quantize(x, count, zero_, reinterpret_cast<ActivationBlock*>(place) + column / kBlock);
  } else {
    std::copy_n(x, count, reinterpret_cast<float*>(place) + column);
  }
}

void Activations::set(const Matrix& m, const float* x, int tokens, int ld, ThreadPool& pool) {
  reserve(m, tokens);
  pool.run(tokens, 8, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) put(t, 0, x + size_t(t) * ld, columns_);
  });
}

void linear(const Matrix& m, const Activations& x, const float* bias, const float* add, float* y, int ld) {
  const Kernels& k = kernels();
  const int tokens = x.tokens();
  // Pieces of about 64 kB of weights: small enough to share out evenly, large enough to stream. Many tokens are taken
  // some at a time, so that their rows stay in the cache while the weights pass by.
  constexpr int kTokens = 96;
  const int bands = (m.rows + kBand - 1) / kBand, token_blocks = (tokens + kTokens - 1) / kTokens;
  const int grain = std::max(1, int((1 << 14) / m.group_bytes()));
  pool().run(bands * token_blocks, grain, [&](int begin, int end, int) {
    for (int piece = begin; piece < end; piece++) {
      const int r0 = piece % bands * kBand, rows = std::min(kBand, m.rows - r0);
      const int t0 = piece / bands * kTokens, count = std::min(kTokens, tokens - t0);
      k.rows(m.type, m.group(0, r0 / kGroup), rows, m.columns, x.rows() + t0, count, y + size_t(t0) * ld + r0, ld);
      for (int t = t0; t < t0 + count && (bias || add); t++)
        for (int r = r0; r < r0 + rows; r++) {
          float& value = y[size_t(t) * ld + r];
          if (bias) value += bias[r];
          if (add) value += add[size_t(t) * ld + r];
        }
    }
  });
}

}  // namespace olmoe
