// What every binding of an operation needs: addresses as pointers, and the GIL given back while it runs.
#pragma once

#include <nanobind/nanobind.h>

#include "../core/threads.h"

namespace olmoe {

using Address = uintptr_t;

template <typename T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

struct Running {
  nanobind::gil_scoped_release release;  // first, and taken back last: who waits for the lock may hold the GIL
  std::lock_guard<std::mutex> lock{one_at_a_time()};
};

}  // namespace olmoe
