// A small thread pool. The calling thread works too; helpers spin briefly between calls, so that the many short steps
// of decoding do not pay for waking them, then yield, then sleep.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace olmoe {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return int(helpers_.size()) + 1; }

  // Run `work(begin, end, next)` over [0, count) in tasks of at least `grain` items, which threads take as they become
  // free. Any thread may run any task, so no two tasks may write to the same memory. `next` is the first item of this
  // thread's next task, so that the task can prefetch what it will need there, or -1.
  template <typename Work>
  void run(int count, int grain, const Work& work) {
    if (count <= 0) return;
    if (helpers_.empty() || alone_ || count <= grain) {
      work(0, count, -1);
      return;
    }
    run_tasks(
        count, grain,
        [](const void* w, int begin, int end, int next) { (*static_cast<const Work*>(w))(begin, end, next); }, &work);
  }

  // With `small`, everything runs on the calling thread for the lifetime of this object: work that is over before a
  // helper has woken up gains nothing from it, and loses much where other programs need the helper's core. Results are
  // the same.
  class Alone {
   public:
    Alone(ThreadPool& pool, bool small) : pool_(pool), before_(pool.alone_) { pool.alone_ = before_ || small; }
    ~Alone() { pool_.alone_ = before_; }
    Alone(const Alone&) = delete;
    Alone& operator=(const Alone&) = delete;

   private:
    ThreadPool& pool_;
    const bool before_;
  };

 private:
  using Call = void (*)(const void* work, int begin, int end, int next);
  void run_tasks(int count, int grain, Call call, const void* work);
  bool take_task(uint32_t job, int& begin, int& end);
  void work_on_tasks(uint32_t job);
  void help();

  std::vector<std::thread> helpers_;
  bool alone_ = false;  // used by the calling thread only
  // One job at a time. A thread that takes a task changes `claim_`, the number of the job and the first item that is
  // not taken yet, in one operation: so a helper that comes late, because its core was given to others, finds that the
  // job is over, and no thread waits for it. A job is over when all its items are `done_`; until then its description
  // does not change.
  alignas(64) std::atomic<uint64_t> claim_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<uint32_t> announced_{0};  // the number of the newest job; helpers sleep on it
  std::atomic<int> count_{0}, grain_{1};
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> work_{nullptr};
  std::atomic<bool> stopping_{false};
};

// Held for the whole of an operation by every caller of the pool. A fork waits for it.
std::mutex& one_at_a_time();
// The pool of this process, created at first use, and again after a fork or when the number of threads has changed.
ThreadPool& pool();
// 0: as many as the process had cores when this was first asked.
void set_threads(int threads);
int get_threads();

}  // namespace olmoe
