#include "pool.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace openmimo {
namespace {

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Spin, then sleep. How long to spin follows from what helped of late: on an idle machine others arrive within
// microseconds and a sleep costs more than the wait; on a busy one the thread waited for has lost its core, and spinning
// only keeps another from getting it back.
constexpr int FEWEST_SPINS = 64, MOST_SPINS = 4096;

template <typename T>
void wait_for_change(std::atomic<T>& value, T old, std::atomic<int>& spin_limit) {
  const int limit = spin_limit.load(std::memory_order_relaxed);
  for (int i = 0; i < limit; ++i) {
    if (value.load(std::memory_order_acquire) != old) {
      const int wanted = std::min(2 * i + FEWEST_SPINS, MOST_SPINS);
      if (wanted > limit) spin_limit.store(limit + (wanted - limit) / 4 + 1, std::memory_order_relaxed);
      return;
    }
    pause_briefly();
  }
  spin_limit.store(std::max(limit - limit / 8, FEWEST_SPINS), std::memory_order_relaxed);
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

Pool::Pool(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {
  for (int thread = 1; thread < num_threads_; ++thread) threads_.emplace_back([this, thread] { worker(thread); });
}

Pool::~Pool() {
  stop_ = true;
  ++generation_;
  generation_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Pool::run(const std::function<void(int)>& work) {
  if (num_threads_ == 1) return work(0);
  work_ = &work;
  done_.store(0, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  work(0);
  for (uint32_t done = done_.load(std::memory_order_acquire); done + 1 != static_cast<uint32_t>(num_threads_);
       done = done_.load(std::memory_order_acquire))
    wait_for_change(done_, done, spin_limit_);
}

void Pool::worker(int thread) {
  uint32_t seen = 0;
  while (true) {
    wait_for_change(generation_, seen, idle_spin_limit_);
    seen = generation_.load(std::memory_order_acquire);
    if (stop_) return;
    (*work_)(thread);
    done_.fetch_add(1, std::memory_order_release);
    done_.notify_one();
  }
}

void Pool::barrier() {
  if (num_threads_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(num_threads_)) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_for_change(phase_, phase, spin_limit_);
  }
}

}  // namespace openmimo
