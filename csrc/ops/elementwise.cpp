// Norms, rotary embeddings and rows of embedding matrices, one token at a time.
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
      const size_t row_bytes = size_t(m.columns) * sizeof_type(m.type);
      k.load(m.data + ids[t] * row_bytes, m.columns, m.type, y);
      continue;
    }
    const int r = int(ids[t] % kGroup);
    const uint8_t* group = m.group(0, int(ids[t] / kGroup));
    with_packed(m.type, [&]<typename Format>() {
      const uint8_t* scales = group + m.blocks() * size_t(Format::kCodeBytes);
      for (int b = 0; b < m.blocks(); b++) {
        float scale;
        k.load(scales + (size_t(b) * kGroup + r) * 2, 1, Type::kF16, &scale);
        const uint8_t* block = group + b * size_t(Format::kCodeBytes);
        for (int i = 0; i < kBlock; i++) y[b * kBlock + i] = scale * float(Format::code(block, r, i) - Format::kZero);
      }
    });
  }
}

}  // namespace olmoe
