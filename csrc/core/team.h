// The threads that training runs on. They are torch's own, because training alternates between our operations and
// torch's: a second pool would compete for cores with torch's idle threads, which keep spinning for milliseconds after
// each parallel loop.
#pragma once

#include <atomic>

#include "threads.h"

namespace olmoe {

// GOMP_parallel of the OpenMP library that torch uses: calls `work(data)` once on each of `threads` threads.
using Parallel = void (*)(void (*work)(void* data), void* data, unsigned threads, unsigned flags);

// Null, which is the default, means our own pool.
void set_parallel(Parallel parallel);
Parallel get_parallel();

// Call `work(i)` for all i in [0, count); each thread takes the next i as soon as it is free. The caller holds the lock
// one_at_a_time().
template <typename Work>
void share(int count, const Work& work) {
  struct Job {
    const Work& work;
    const int count;
    std::atomic<int> next{0};
  };
  const Parallel parallel = get_parallel();
  const int threads = get_threads();
  if (parallel && threads > 1 && count > 1) {
    Job job{work, count};
    parallel(
        [](void* data) {
          Job& shared = *static_cast<Job*>(data);
          for (int i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) shared.work(i);
        },
        &job, unsigned(threads < count ? threads : count), 0);
    return;
  }
  if (threads == 1 || count <= 1) {
    for (int i = 0; i < count; i++) work(i);
    return;
  }
  pool().run(count, 1, [&](int begin, int end, int) {
    for (int i = begin; i < end; i++) work(i);
  });
}

}  // namespace olmoe
