// The kernels, compiled for avx512 (isa.cmake has the flags): first what this folder has, then what is made of it.
#include "vectors.h"

#include "packed_tiles.h"

#include "../common/packed_rows.h"
#include "../common/table.h"

namespace olmoe {

const Kernels& avx512_kernels() {
  static const Kernels table = make_table("avx512");
  return table;
}

}  // namespace olmoe
