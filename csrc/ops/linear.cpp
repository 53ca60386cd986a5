// Activations in the layout that a matrix needs, and products with one matrix.
#include <algorithm>

#include "ops.h"

namespace olmoe {
namespace {

// Lanes shorter than this are not worth a pass.
constexpr int kLaneSteps = 8;

bool in_bf16(const Matrix& m) { return m.bf16_inputs && kernels().bf16_rows; }

bool many(const Matrix& m, int tokens) { return !m.packed() && !in_bf16(m) && tokens >= kernels().many[int(m.type)]; }

}  // namespace

void Activations::reserve(const Matrix& m, int tokens) {
  packed_ = m.packed();
  columns_ = m.columns;
  zero_ = m.packed() ? m.zero() : 0;
  bf16_ = in_bf16(m);
  const size_t row_bytes =
      packed_ ? m.blocks() * sizeof(ActivationBlock) : size_t(columns_) * (bf16_ ? sizeof(uint16_t) : sizeof(float));
  split_ = many(m, tokens) && columns_ >= kLaneSteps * kernels().lanes;
  // An odd number of cache lines: rows a power of two apart would all map to the same few sets of the cache.
  const size_t lanes = (row_bytes + 63) / 64 * 64;
  const size_t stride = ((split_ ? 2 * lanes : lanes) / 64 | 1) * 64;
  if (bytes_.size() < stride * tokens) bytes_.resize(stride * tokens);
  rows_.resize(tokens);
  for (int t = 0; t < tokens; t++) {
    rows_[t].blocks = reinterpret_cast<const ActivationBlock*>(bytes_.data() + t * stride);
    rows_[t].lanes = split_ ? reinterpret_cast<const float*>(bytes_.data() + t * stride + lanes) : nullptr;
  }
}

void Activations::put(int row, int column, const float* x, int count) {
  uint8_t* target = const_cast<uint8_t*>(reinterpret_cast<const uint8_t*>(rows_[row].blocks));
  if (packed_) {
    kernels().quantize(x, count, zero_, reinterpret_cast<ActivationBlock*>(target) + column / kBlock);
  } else if (bf16_) {
    kernels().store(x, count, Type::kBF16, reinterpret_cast<uint16_t*>(target) + column);
  } else {
    std::copy_n(x, count, reinterpret_cast<float*>(target) + column);
    if (split_) kernels().split_lanes(x, column, count, columns_, const_cast<float*>(rows_[row].lanes));
  }
}

void Activations::set(const Matrix& m, const float* x, int tokens, int ld, ThreadPool& pool) {
  reserve(m, tokens);
  pool.run(tokens, 8, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) put(t, 0, x + size_t(t) * ld, columns_);
  });
}

int token_block(const Matrix& m) { return m.packed() ? 96 : 256; }

void multiply(const Matrix& m, int expert, int row, int rows, const ActivationRow* x, int tokens, float* out, int ld,
              const uint8_t* next) {
  const Kernels& k = kernels();
  const uint8_t* group = m.group(expert, row / kGroup);
  if (in_bf16(m)) return k.bf16_rows(group, rows, m.columns, x, tokens, out, ld);
  if (!many(m, tokens) || !x->lanes) return k.rows(m.type, group, rows, m.columns, x, tokens, out, ld, next);
  static thread_local Aligned<float> scratch;
  const int block = std::min(tokens, token_block(m));
  const size_t size = tiles_scratch(m.columns, block);
  if (scratch.size() < size) scratch.resize(size);
  for (int t = 0; t < tokens; t += block)
    k.tiles(m.type, group, rows, m.columns, x + t, std::min(block, tokens - t), out + size_t(t) * ld, ld,
            scratch.data(), t + block < tokens ? group : next);
}

void linear(std::initializer_list<Product> products, const Activations& x) {
  const Matrix& first = *products.begin()->m;
  const int tokens = x.tokens(), block = token_block(first);
  const int token_blocks = (tokens + block - 1) / block;
  // Few rows, such as a router's, would otherwise be a single task.
  auto band_of = [](const Matrix& m) { return m.rows <= 4 * kBand ? kGroup : kBand; };
  auto bands_of = [&](const Matrix& m) { return (m.rows + band_of(m) - 1) / band_of(m); };
  int bands = 0;
  for (const Product& product : products) bands += bands_of(*product.m);
  // Tasks of about 64 kB of weights: small enough to share out evenly, large enough to stream.
  const int grain = std::max(1, int((1 << 14) / first.group_bytes()));
  // The product and the first row of a band.
  auto locate = [&](int band) {
    const Product* product = products.begin();
    for (; band >= bands_of(*product->m); product++) band -= bands_of(*product->m);
    return std::pair(product, band * band_of(*product->m));
  };
  pool().run(bands * token_blocks, grain, [&](int begin, int end, int next) {
    for (int task = begin; task < end; task++) {
      const auto [product, r0] = locate(task % bands);
      const auto& [m, bias, add, y, ld] = *product;
      const int rows = std::min(band_of(*m), m->rows - r0);
      const int t0 = task / bands * block, count = std::min(block, tokens - t0);
      const uint8_t* after = nullptr;
      if (const int following = task + 1 < end ? task + 1 : next; following >= 0) {
        const auto [other, row] = locate(following % bands);
        after = other->m->group(0, row / kGroup);
      }
      multiply(*m, 0, r0, rows, x.rows() + t0, count, y + size_t(t0) * ld + r0, ld, after);
      for (int t = t0; t < t0 + count && (bias || add); t++)
        for (int r = r0; r < r0 + rows; r++) {
          float& value = y[size_t(t) * ld + r];
          if (bias) value += bias[r];
          if (add) value += add[size_t(t) * ld + r];
        }
    }
  });
}

void linear(const Matrix& m, const Activations& x, const float* bias, const float* add, float* y, int ld) {
  linear({Product{&m, bias, add, y, ld}}, x);
}

}  // namespace olmoe
