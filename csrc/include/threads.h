// Work on several threads: tasks handed out one by one, and teams that stay together between such works.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <utility>

namespace pyarch {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads that work on the tasks of one leader, one work after the other, and do something else in between.
// A parallel region of torch starts in about a microsecond, but leaves the others with nothing to do until
// the next.
class Team {
 public:
  // Calls f() on this thread while others share its parallel_tasks. Each of the others, number i of n, makes
  // idle(i, n) and calls that again and again when there is nothing to share. Nothing waits for a thread that
  // never comes.
  template <class F, class Idle>
  static void gather(const F& f, const Idle& idle) {
    const int64_t threads = torch::stable::get_num_threads();
    if (threads <= 1 || current) return f();
    Team team(threads);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      begin == 0 ? team.lead(f) : team.follow(idle(begin - 1, threads - 1));
    });
    if (team.error_) std::rethrow_exception(team.error_);
  }

  template <class F>
  void run(int64_t tasks, const F& f) {
    job_ = [](const void* g, int64_t i) { (*static_cast<const F*>(g))(i); };
    argument_ = &f, tasks_ = tasks;
    next_.store(0);
    works_.fetch_add(1);  // odd: there is work
    work();
    works_.fetch_add(1);
    while (inside_.load() != 0) pause();
    if (failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  static inline thread_local Team* current = nullptr;  // which this thread leads

  const int64_t threads;

 private:
  explicit Team(int64_t threads) : threads(threads) {}

  template <class F>
  void lead(const F& f) {
    current = this;
    try {
      f();
    } catch (...) {
      error_ = std::current_exception();
    }
    current = nullptr;
    over_.store(true);
  }

  template <class Idle>
  void follow(Idle idle) {
    for (int64_t done = 0; !over_.load();) {
      int64_t now = works_.load();
      if (now % 2 == 0 || now == done) {
        idle();
        continue;
      }
      // The leader changes a work only when nobody is inside and it is closed, so: enter, then look again.
      inside_.fetch_add(1);
      now = works_.load();
      if (now % 2 != 0) work();
      inside_.fetch_sub(1);
      done = now;
    }
  }

  void work() {
    for (int64_t i = next_.fetch_add(1); i < tasks_; i = next_.fetch_add(1)) try {
        job_(argument_, i);
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
        next_.store(tasks_);
      }
  }

  void (*job_)(const void*, int64_t) = nullptr;
  const void* argument_ = nullptr;
  int64_t tasks_ = 0;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  alignas(64) std::atomic<int64_t> works_{0};
  std::atomic<bool> over_{false};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> inside_{0};
};

inline int64_t thread_count() {
  return Team::current ? Team::current->threads : torch::stable::get_num_threads();
}

// f(i) for every i in [0, tasks), handed out one by one to torch's threads, so that a slow core takes fewer.
// What a task computes must not depend on which thread runs it: results are the same for any thread count.
template <class F>
inline void parallel_tasks(int64_t tasks, const F& f) {
  const int64_t hands = std::min(tasks, thread_count());
  if (hands <= 1) {
    for (int64_t i = 0; i < tasks; ++i) f(i);
    return;
  }
  if (Team::current) return Team::current->run(tasks, f);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, hands, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < tasks;
         i = next.fetch_add(1, std::memory_order_relaxed))
      f(i);
  });
}

}  // namespace pyarch
