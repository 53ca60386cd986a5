// Encodes matrices in blocks, with codes chosen by a search; panels of rows are divided among the threads. Panels are
// independent, so that results do not depend on the number of threads.
#include <algorithm>
#include <cstring>

#include "ops.h"

namespace olmoe {
namespace {

// Where block b of a packed factor starts: blocks before it have kBlock rows of all columns from their own on.
size_t start_of(int block, int blocks) {
  return size_t(kBlock) * kBlock * (size_t(block) * blocks - size_t(block) * (block - 1) / 2);
}

// One block of a factor in the order in which panels read it: its part of the diagonal, then for every kColumns of the
// later columns its kBlock rows. In a row-major factor each of these rows lies in another page.
void pack_factor(const float* factor, int columns, int block, float* out) {
  const int start = block * kBlock;
  const float* rows = factor + size_t(start) * columns;
  for (int k = 0; k < kBlock; k++, out += kBlock) std::memcpy(out, rows + size_t(k) * columns + start, 4 * kBlock);
  for (int c = start + kBlock; c < columns; c += kColumns)
    for (int k = 0; k < kBlock; k++, out += kColumns) std::memcpy(out, rows + size_t(k) * columns + c, 4 * kColumns);
}

}  // namespace

bool compensates() { return kernels().compensate != nullptr; }

void encode(const Matrix& m, const float* factor, Type type, uint8_t* out) {
  ThreadPool& threads = pool();
  const Kernels& k = kernels();
  const int panels = (m.rows + kPanel - 1) / kPanel;
  const size_t row_bytes = size_t(m.columns) * sizeof_type(m.type);
  const size_t panel_bytes = kPanel / kGroup * packed_group_bytes(type, m.columns / kBlock);
  static std::vector<float> packed_memory;  // one operation at a time, see Running
  float* packed = nullptr;
  if (factor) {
    const int blocks = m.columns / kBlock;
    packed_memory.resize(std::max(packed_memory.size(), start_of(blocks, blocks)));
    packed = packed_memory.data();
    threads.run(blocks, 1, [&](int begin, int end, int) {
      for (int b = begin; b < end; b++) pack_factor(factor, m.columns, b, packed + start_of(b, blocks));
    });
  }
  threads.run(panels, 1, [&](int begin, int end, int) {
    static thread_local Aligned<float> scratch;
    if (factor) scratch.resize(std::max(scratch.size(), size_t(m.columns) * kPanel));
    for (int panel = begin; panel < end; panel++) {
      const int rows = std::min(kPanel, m.rows - panel * kPanel);
      const uint8_t* weight = m.data + size_t(panel) * kPanel * row_bytes;
      uint8_t* target = out + panel * panel_bytes;
      if (factor)
        k.compensate(weight, m.type, rows, m.columns, packed, type, target, scratch.data());
      else
        k.search(weight, m.type, rows, m.columns, type, target);
    }
  });
}

}  // namespace olmoe
