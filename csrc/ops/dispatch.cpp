// Which instruction set the kernels use: the best that the CPU has, unless another was asked for.
#include <cstring>

#include "ops.h"

namespace olmoe {
namespace {

const Kernels* chosen = nullptr;

const Kernels* find(const char* name) {
#ifdef OLMOE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strcmp(name, "avx512") == 0 && avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
    return &avx512_kernels();
  if (std::strcmp(name, "avx2") == 0 && avx2) return &avx2_kernels();
#endif
  return std::strcmp(name, "scalar") == 0 ? &scalar_kernels() : nullptr;
}

}  // namespace

std::vector<const char*> isas() {
  std::vector<const char*> names;
  for (const char* name : {"avx512", "avx2", "scalar"})
    if (find(name)) names.push_back(name);
  return names;
}

const Kernels& kernels() {
  if (!chosen) chosen = find(isas().front());
  return *chosen;
}

bool set_isa(const char* name) {
  const Kernels* found = find(name);
  if (found) chosen = found;
  return found != nullptr;
}

}  // namespace olmoe
