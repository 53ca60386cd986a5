#include "team.h"

namespace olmoe {
namespace {

std::atomic<Parallel> current{nullptr};

}  // namespace

void set_parallel(Parallel parallel) { current.store(parallel); }
Parallel get_parallel() { return current.load(); }

}  // namespace olmoe
