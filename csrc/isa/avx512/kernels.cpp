// The kernels, compiled for avx512 (see CMakeLists.txt for the flags).
#include "../common/table.h"

namespace olmoe {
const Kernels& avx512_kernels() {
  static const Kernels table = make_table("avx512");
  return table;
}
}  // namespace olmoe
