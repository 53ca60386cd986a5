// The kernels, compiled for scalar (isa.cmake has the flags): first what this folder has, then what is made of it.
#include "vectors.h"

#include "packed_rows.h"

#include "../common/table.h"

namespace olmoe {

const Kernels& scalar_kernels() {
  static const Kernels table = make_table("scalar");
  return table;
}

}  // namespace olmoe
