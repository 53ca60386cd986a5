// The kernels, compiled for avx2 (isa.cmake has the flags): first what this folder has, then what is made of it.
#include "vectors.h"

#include "packed_tiles.h"

#include "../common/packed_rows.h"
#include "../common/table.h"

namespace olmoe {

const Kernels& avx2_kernels() {
  static const Kernels table = make_table("avx2");
  return table;
}

}  // namespace olmoe
