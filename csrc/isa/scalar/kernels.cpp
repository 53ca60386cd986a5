// The kernels, compiled for scalar (see CMakeLists.txt for the flags).
#include "../common/table.h"

namespace olmoe {
const Kernels& scalar_kernels() {
  static const Kernels table = make_table("scalar");
  return table;
}
}  // namespace olmoe
