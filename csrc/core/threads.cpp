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

constexpr int kSpins = 2000;              // some 20 to 50 microseconds
constexpr int kPieces = 3;                // a task is this fraction of a thread's share of the remaining items
constexpr int kKept = 1;                  // tasks for each thread that nobody takes in advance
constexpr uint32_t kClosed = 0x7fffffff;  // an item beyond all counts
constexpr int kYields = 1000;             // each gives the core to another thread that needs it

std::mutex pool_mutex;
std::unique_ptr<ThreadPool> current;
int wanted = 0;

#ifdef OLMOE_FORKS
// A child has only the thread that forked: no locks may be held by others, and the pool's threads are gone.
void handle_forks() {
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
void handle_forks() {}
#endif

int available() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// The system is asked only once: operations ask for the pool up to a hundred times in a step, and each query is a
// system call.
int wanted_threads() {
  if (wanted == 0) wanted = available();
  return wanted;
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; i++) helpers_.emplace_back([this] { help(); });
}

ThreadPool::~ThreadPool() {
  stopping_.store(true, std::memory_order_relaxed);
  announced_.fetch_add(1, std::memory_order_release);
  announced_.notify_all();
  for (auto& helper : helpers_) helper.join();
}

void ThreadPool::run_tasks(int count, int grain, Call call, const void* work) {
  const uint32_t job = announced_.load(std::memory_order_relaxed) + 1;
  // Closed before it is described: a helper that still looks at the job before this one must not read the new count
  // with the old claim, and take what that job never had. A thread that reads the count sees this too.
  claim_.store(uint64_t(job) << 32 | kClosed, std::memory_order_relaxed);
  count_.store(count, std::memory_order_release), grain_.store(grain, std::memory_order_relaxed);
  call_.store(call, std::memory_order_relaxed), work_.store(work, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  claim_.store(uint64_t(job) << 32, std::memory_order_release);
  announced_.store(job, std::memory_order_release);
  announced_.notify_all();
  work_on_tasks(job);
  for (int spins = 0; done_.load(std::memory_order_acquire) != count; spins++) {
    if (spins < kSpins)
      relax();
    else
      std::this_thread::yield();  // whoever has the last task may be waiting for a core
  }
}

bool ThreadPool::take_task(uint32_t job, int& begin, int& end) {
  // Long tasks first, whose data can be prefetched, then ever shorter ones, so that all threads finish together.
  const int share = kPieces * threads();
  uint64_t claim = claim_.load(std::memory_order_acquire);
  while (claim >> 32 == job) {
    const int count = count_.load(std::memory_order_acquire), grain = grain_.load(std::memory_order_relaxed);
    begin = int(uint32_t(claim));
    if (begin >= count) return false;
    end = std::min(begin + std::max(grain, (count - begin) / share), count);
    if (claim_.compare_exchange_weak(claim, uint64_t(job) << 32 | uint32_t(end), std::memory_order_acq_rel,
                                     std::memory_order_acquire))
      return true;
  }
  return false;
}

void ThreadPool::work_on_tasks(uint32_t job) {
  int begin, end, next = -1, next_end = 0;
  if (!take_task(job, begin, end)) return;
  // These belong to the job, which is not over before this thread's task is done.
  const Call call = call_.load(std::memory_order_relaxed);
  const void* work = work_.load(std::memory_order_relaxed);
  const int count = count_.load(std::memory_order_relaxed);
  for (bool more = true; more; begin = next, end = next_end) {
    // The next task is taken before this one is done, so that its data can be prefetched; but not the last tasks, which
    // should go to idle threads.
    const int left = count - int(uint32_t(claim_.load(std::memory_order_relaxed)));
    const bool ahead = left > kKept * threads() && take_task(job, next, next_end);
    call(work, begin, end, ahead ? next : -1);
    done_.fetch_add(end - begin, std::memory_order_release);
    more = ahead || take_task(job, next, next_end);
  }
}

void ThreadPool::help() {
  uint32_t seen = 0;
  for (;;) {
    uint32_t now = announced_.load(std::memory_order_acquire);
    for (int i = 0; now == seen && i < kSpins + kYields; i++) {
      if (i < kSpins)
        relax();
      else
        std::this_thread::yield();
      now = announced_.load(std::memory_order_acquire);
    }
    while (now == seen) {
      announced_.wait(seen, std::memory_order_acquire);
      now = announced_.load(std::memory_order_acquire);
    }
    seen = now;
    if (stopping_.load(std::memory_order_relaxed)) return;
    work_on_tasks(now);
  }
}

std::mutex& one_at_a_time() {
  handle_forks();  // here, because training takes this lock without ever asking for the pool
  static std::mutex mutex;
  return mutex;
}

ThreadPool& pool() {
  std::lock_guard lock(pool_mutex);
  const int threads = wanted_threads();
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
  return wanted_threads();
}

}  // namespace olmoe
