// Which instruction set the kernels use: the best that the CPU has, unless another was requested.
#include <cstring>

#include "ops.h"

namespace olmoe {

// OLMOE_ISAS names every folder of csrc/isa that is built, the fastest first (CMakeLists.txt): ISA(avx2) ISA(scalar).
// Each provides its kernels and a function that says whether this CPU can run them.
#define ISA(name)                  \
  const Kernels& name##_kernels(); \
  bool name##_runs();
OLMOE_ISAS
#undef ISA

namespace {

struct InstructionSet {
  const char* name;
  const Kernels& (*kernels)();
  bool (*runs)();
};

#define ISA(name) {#name, &name##_kernels, &name##_runs},
constexpr InstructionSet kAll[] = {OLMOE_ISAS};
#undef ISA

const Kernels* chosen = nullptr;

}  // namespace

std::vector<const char*> isas() {
  std::vector<const char*> names;
  for (const InstructionSet& isa : kAll)
    if (isa.runs()) names.push_back(isa.name);
  return names;
}

const Kernels& kernels() {
  if (!chosen) set_isa(isas().front());
  return *chosen;
}

bool set_isa(const char* name) {
  for (const InstructionSet& isa : kAll)
    if (std::strcmp(isa.name, name) == 0 && isa.runs()) {
      chosen = &isa.kernels();
      return true;
    }
  return false;
}

}  // namespace olmoe
