// Norms, rotary embeddings and embedding rows, one token at a time.
#include <algorithm>
#include <cstring>

#include "ops.h"

namespace olmoe {

void rms_norm(const float* x, const float* weight, float eps, int tokens, int d, float* out) {
  const Kernels& k = kernels();
  pool().run(tokens, 16, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) k.rms_norm(x + size_t(t) * d, weight, eps, d, out + size_t(t) * d);
  });
}

void rope(float* x, const float* cos, const float* sin, int tokens, int heads, int head_dim) {
  const Kernels& k = kernels();
  const int half = head_dim / 2;
  pool().run(tokens, 16, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++)
      for (int h = 0; h < heads; h++)
        k.rope(x + (size_t(t) * heads + h) * head_dim, cos + size_t(t) * half, sin + size_t(t) * half, head_dim);
  });
}

void embed(const Matrix& m, const int64_t* ids, int tokens, float* out) {
  const Kernels& k = kernels();
  for (int t = 0; t < tokens; t++) {
    float* y = out + size_t(t) * m.columns;
    if (!m.packed()) {
      const size_t row_bytes = size_t(m.columns) * (m.type == Type::kF32 ? 4 : 2);
      k.load(m.data + ids[t] * row_bytes, m.columns, m.type, y);
      continue;
    }
    const int r = int(ids[t] % kGroup);
    const uint8_t* codes = m.group(0, int(ids[t] / kGroup));
    const size_t block_bytes = code_bytes(m.type);
    const uint8_t* scales = codes + m.blocks() * block_bytes;
    for (int b = 0; b < m.blocks(); b++) {
      float scale;
      k.load(scales + (size_t(b) * kGroup + r) * 2, 1, Type::kF16, &scale);
      const uint8_t* c = codes + b * block_bytes;
      for (int i = 0; i < kBlock; i++) {
        int code = c[low_bits_at(m.type) + 64 * (m.type == Type::kQ8 ? i / 4 : i % 16 / 4) + 4 * r + i % 4];
        if (m.type != Type::kQ8) code = i < 16 ? code & 15 : code >> 4;
        if (m.type == Type::kQ5) {
          const int bit = 64 * (i / 4) + 4 * r + i % 4;
          code |= (c[bit / 8] >> bit % 8 & 1) << 4;
        }
        y[b * kBlock + i] = scale * float(code - m.zero());
      }
    }
  }
}

}  // namespace olmoe
