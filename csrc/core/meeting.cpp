#include "meeting.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace olmoe {
namespace {

using Counter = std::atomic<int64_t>;
static_assert(Counter::is_always_lock_free, "between processes only what needs no lock is atomic");

using Clock = std::chrono::steady_clock;

// A process that comes within these is not noticed late. After the first ones somebody else may need the core, after
// the second ones waiting is no matter of microseconds.
constexpr std::chrono::microseconds kSpinning{50}, kYielding{20'000};
constexpr std::chrono::microseconds kAsleep{100};

}  // namespace

int meet(void* counters, int processes, int rank, int64_t turn, double seconds) {
  const auto counter = [&](int p) {
    return reinterpret_cast<Counter*>(static_cast<char*>(counters) + size_t(p) * kCounterBytes);
  };
  counter(rank)->store(turn, std::memory_order_release);
  const auto begin = Clock::now();
  for (int p = 0; p < processes; p++) {
    while (counter(p)->load(std::memory_order_acquire) < turn) {
      const auto waited = Clock::now() - begin;
      if (waited > std::chrono::duration<double>(seconds)) return p;
      if (waited > kYielding)
        std::this_thread::sleep_for(kAsleep);
      else if (waited > kSpinning)
        std::this_thread::yield();
    }
  }
  return -1;
}

}  // namespace olmoe
