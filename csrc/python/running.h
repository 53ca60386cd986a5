// What every binding of an operation needs: addresses as pointers, and releasing the GIL while the operation runs.
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
  // The GIL is released before the lock is taken, and retaken after it is released: a thread that waits for the lock
  // may hold the GIL.
  nanobind::gil_scoped_release release;
  std::lock_guard<std::mutex> lock{one_at_a_time()};
};

}  // namespace olmoe
