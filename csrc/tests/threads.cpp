// The thread pool by itself, to be run under the thread sanitizer (scripts/sanitize.py): every task runs once, what
// helpers wrote is seen by the caller, and pools come and go, also while another thread changes their size.
#include "../core/threads.h"
#include "../core/meeting.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

using namespace olmoe;

namespace {

void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// Short jobs of few and of many items in turn: a helper that comes late for one job must not mistake the next for it.
void run_uneven_jobs(ThreadPool& pool, int jobs) {
  for (int job = 0; job < jobs; job++) {
    const int count = job % 2 ? 4096 : 2;
    std::vector<int> times(count);
    pool.run(count, 1, [&](int begin, int end, int) {
      check(begin >= 0 && end <= count, "a task of another job");
      for (int i = begin; i < end; i++) times[i]++;
    });
    for (int t : times) check(t == 1, "every task once");
  }
}

// Plain memory, so that the sanitizer sees whether the pool orders what its threads do.
void run_jobs(ThreadPool& pool, int jobs) {
  std::vector<int> times(257);
  for (int job = 0; job < jobs; job++) {
    const int count = 1 + job % 257, grain = 1 + job % 5;
    for (int& t : times) t = 0;
    pool.run(count, grain, [&](int begin, int end, int next) {
      check(next < count && (next < 0 || next >= end), "the next task is another");
      for (int i = begin; i < end; i++) times[i]++;
    });
    for (int i = 0; i < 257; i++) check(times[i] == (i < count), "every task once");
  }
}

// Small work stays on the calling thread, also in nested scopes, and afterwards the pool is used again.
void run_alone(ThreadPool& pool) {
  const std::thread::id here = std::this_thread::get_id();
  auto elsewhere = [&] {
    std::atomic<int> tasks = 0;
    pool.run(64, 1, [&](int begin, int end, int) {
      if (std::this_thread::get_id() != here) tasks += end - begin;
      if (std::this_thread::get_id() == here) usleep(2000);  // so that helpers get some, if they may
    });
    return tasks.load();
  };
  {
    const ThreadPool::Alone alone(pool, true);
    check(elsewhere() == 0, "small work on the calling thread");
    const ThreadPool::Alone inner(pool, false);
    check(elsewhere() == 0, "large work within small work on the calling thread");
  }
  const ThreadPool::Alone alone(pool, false);
  if (pool.threads() > 1) check(elsewhere() > 0, "other work on all threads");
  run_jobs(pool, 50);
}

void use_shared_pool(int jobs) {
  for (int i = 0; i < jobs; i++) {
    set_threads(1 + i % 4);
    std::lock_guard lock(one_at_a_time());
    run_jobs(pool(), 20);
  }
}

// Without a file of locks no process counts as having left: threads of one process cannot lock each other out.
constexpr int kNoFile = -1;

// Threads in the place of processes: what each wrote before a meeting is there for the others after it.
void meet_others(int rank, int processes, int turns, char* counters, std::vector<int>& written) {
  for (int turn = 1; turn <= turns; turn++) {
    written[rank] = turn;
    check(meet(counters, kNoFile, processes, rank, 2 * turn - 1, 60) == -1, "all have come");
    for (int p = 0; p < processes; p++) check(written[p] == turn, "what others wrote");
    check(meet(counters, kNoFile, processes, rank, 2 * turn, 60) == -1, "all have read");
  }
}

void run_meetings() {
  constexpr int kProcesses = 3;
  alignas(64) static char counters[kProcesses * kCounterBytes] = {};
  std::vector<int> written(kProcesses);
  std::vector<std::thread> others;
  for (int rank = 1; rank < kProcesses; rank++)
    others.emplace_back([&, rank] { meet_others(rank, kProcesses, 500, counters, written); });
  meet_others(0, kProcesses, 500, counters, written);
  for (std::thread& other : others) other.join();
  alignas(64) char alone[2 * kCounterBytes] = {};
  check(meet(alone, kNoFile, 2, 0, 1, 0.01) == 1, "who has not come");
  std::FILE* unlocked = std::tmpfile();
  const auto begin = std::chrono::steady_clock::now();
  check(meet(alone, fileno(unlocked), 2, 0, 2, 60) == 1, "who has left");
  check(std::chrono::steady_clock::now() - begin < std::chrono::seconds(30), "noticed before the time is over");
  std::fclose(unlocked);
}

}  // namespace

int main() {
  run_meetings();
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    check(pool.threads() == threads, "number of threads");
    run_jobs(pool, 300);
    run_uneven_jobs(pool, 2000);
    usleep(20000);  // long enough for helpers to sleep
    run_jobs(pool, 20);
    run_alone(pool);
  }
  for (int i = 0; i < 50; i++) ThreadPool pool(4);  // ends without a job

  std::thread other([] { use_shared_pool(30); });
  use_shared_pool(30);
  other.join();

  std::lock_guard lock(one_at_a_time());
  (void)pool();
  std::puts("threads: ok");
}
