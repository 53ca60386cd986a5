// Memory for what kernels read and write.
#pragma once

#include <new>
#include <vector>

namespace olmoe {

template <typename T>
struct AtCacheLine {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  AtCacheLine() = default;
  template <typename Other>
  AtCacheLine(const AtCacheLine<Other>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const AtCacheLine&) const { return true; }
};

// A vector whose data starts at a cache line. Otherwise every load of 64 bytes would span two lines, which made
// attention over a prompt take a third longer.
template <typename T>
using Aligned = std::vector<T, AtCacheLine<T>>;

}  // namespace olmoe
