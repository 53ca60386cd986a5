// The kernels, compiled for scalar (isa.cmake has the flags).
#include "packed_rows.h"

#include "../common/table.h"

namespace olmoe {

const Kernels& scalar_kernels() {
  static const Kernels table = make_table("scalar");
  return table;
}

}  // namespace olmoe
