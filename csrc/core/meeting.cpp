#include "meeting.h"

#include <fcntl.h>

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
// How often one looks whether the other is still there: before its parent has found out and ends all others.
constexpr std::chrono::microseconds kLooking{2'000};

}  // namespace

bool has_left(int file, int rank) {
  struct flock lock{};
  lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = rank, lock.l_len = 1;
  return fcntl(file, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

int meet(void* counters, int file, int processes, int rank, int64_t turn, double seconds) {
  const auto counter = [&](int p) {
    return reinterpret_cast<Counter*>(static_cast<char*>(counters) + size_t(p) * kCounterBytes);
  };
  const auto is_missing = [&](int p) { return counter(p)->load(std::memory_order_acquire) < turn; };
  counter(rank)->store(turn, std::memory_order_release);
  const auto begin = Clock::now();
  auto looked = begin;
  for (int p = 0; p < processes; p++) {
    while (is_missing(p)) {
      const auto now = Clock::now();
      if (now - begin > std::chrono::duration<double>(seconds)) return p;
      if (now - looked > kLooking) {
        looked = now;
        if (has_left(file, p) && is_missing(p)) return p;  // it may have come before it left
      }
      if (now - begin > kYielding)
        std::this_thread::sleep_for(kAsleep);
      else if (now - begin > kSpinning)
        std::this_thread::yield();
    }
  }
  return -1;
}

}  // namespace olmoe
