#include "threads.h"

#include <algorithm>
#include <mutex>

#ifdef __linux__
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#define OLMOE_FORKS
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace olmoe {
namespace {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

constexpr int kSpins = 2000;    // some 20 to 50 microseconds
constexpr int kPieces = 3;      // a thread takes this part of its share of what is left
constexpr int kKept = 1;        // so many pieces for each thread are not taken ahead
constexpr int kYields = 1000;   // other threads that want this core get it here

std::mutex pool_mutex;
std::unique_ptr<ThreadPool> current;
int wanted = 0;

#ifdef OLMOE_FORKS
// A child has only the thread that forked: no locks may be held by others, and the pool's threads are gone.
void watch_forks() {
  static const int registered = pthread_atfork(
      [] {
        one_at_a_time().lock();
        pool_mutex.lock();
      },
      [] {
        pool_mutex.unlock();
        one_at_a_time().unlock();
      },
      [] {
        (void)current.release();  // joining threads that are not there would hang
        pool_mutex.unlock();
        one_at_a_time().unlock();
      });
  (void)registered;
}
#else
void watch_forks() {}
#endif

int available() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; i++) helpers_.emplace_back([this] { help(); });
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (auto& helper : helpers_) helper.join();
}

void ThreadPool::run_pieces(int count, int grain, Call call, const void* work) {
  count_ = count, grain_ = grain, call_ = call, work_ = work;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(int(helpers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  work_on_pieces();
  for (int spins = 0; busy_.load(std::memory_order_acquire) != 0; spins++) {
    if (spins < kSpins)
      relax();
    else
      std::this_thread::yield();  // a helper has not been given a core yet
  }
}

bool ThreadPool::take_piece(int& begin, int& end) {
  // Long pieces first, which go on where the thread is and are fetched ahead, then ever shorter ones, so that all threads
  // end together.
  const int share = kPieces * threads();
  begin = next_.load(std::memory_order_relaxed);
  while (begin < count_) {
    end = std::min(begin + std::max(grain_, (count_ - begin) / share), count_);
    if (next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) return true;
  }
  return false;
}

void ThreadPool::work_on_pieces() {
  int begin, end, next = -1, next_end = 0;
  for (bool more = take_piece(begin, end); more; begin = next, end = next_end) {
    // The next piece is taken before this one is done, so that it can be fetched meanwhile; not the last ones, which an
    // idle thread should get.
    const bool ahead = count_ - next_.load(std::memory_order_relaxed) > kKept * threads() && take_piece(next, next_end);
    call_(work_, begin, end, ahead ? next : -1);
    more = ahead || take_piece(next, next_end);
  }
}

void ThreadPool::help() {
  uint32_t seen = 0;
  for (;;) {
    uint32_t now = generation_.load(std::memory_order_acquire);
    for (int i = 0; now == seen && i < kSpins + kYields; i++) {
      if (i < kSpins)
        relax();
      else
        std::this_thread::yield();
      now = generation_.load(std::memory_order_acquire);
    }
    while (now == seen) {
      generation_.wait(seen, std::memory_order_acquire);
      now = generation_.load(std::memory_order_acquire);
    }
    seen = now;
    if (stopping_) return;
    work_on_pieces();
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

std::mutex& one_at_a_time() {
  static std::mutex mutex;
  return mutex;
}

ThreadPool& pool() {
  watch_forks();
  std::lock_guard lock(pool_mutex);
  const int threads = wanted > 0 ? wanted : available();
  if (!current || current->threads() != threads) {
    current.reset();
    current = std::make_unique<ThreadPool>(threads);
  }
  return *current;
}

void set_threads(int threads) {
  std::lock_guard lock(pool_mutex);
  wanted = threads;
}

int get_threads() {
  std::lock_guard lock(pool_mutex);
  return wanted > 0 ? wanted : available();
}

}  // namespace olmoe
