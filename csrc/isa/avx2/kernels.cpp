// The kernels, compiled for avx2 (see CMakeLists.txt for the flags).
#include "../common/table.h"

namespace olmoe {
const Kernels& avx2_kernels() {
  static const Kernels table = make_table("avx2");
  return table;
}
}  // namespace olmoe
