#include "pool.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace openmimo {
namespace {

// Rounds of spinning, tens of nanoseconds each. Waking a sleeping thread takes longer than most waits inside a step, and on
// a virtual machine longer than the gap between two steps.
constexpr int STEP_SPINS = 4000, IDLE_SPINS = 20000;

// When more than a quarter of a run's barriers ended in sleep, somebody lost a processor. The next runs do with half the
// threads, until after some runs all are tried again; each failed try doubles the time to the next.
constexpr int FEWEST_BARRIERS = 8, FIRST_PATIENCE = 32, MOST_PATIENCE = 2048;

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Returns whether it had to sleep.
template <typename T>
bool wait_for_change(std::atomic<T>& value, T old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return false;
    pause_briefly();
  }
  if (value.load(std::memory_order_acquire) != old) return false;
  value.wait(old, std::memory_order_acquire);
  return true;
}

}  // namespace

Pool::Pool(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads), active_(num_threads_), patience_(FIRST_PATIENCE) {
  for (int thread = 1; thread < num_threads_; ++thread) threads_.emplace_back([this, thread] { worker(thread); });
}

Pool::~Pool() {
  stop_ = true;
  ++generation_;
  generation_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Pool::run(const std::function<void(int)>& work) {
  if (active_ == 1) {
    work(0);
    adapt();
    return;
  }
  work_ = &work;
  done_.store(0, std::memory_order_relaxed);
  barriers_.store(0, std::memory_order_relaxed);
  sleeps_.store(0, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  work(0);
  // Every worker answers, also one that has nothing to do, so that none is still on its way when the next run begins.
  for (uint32_t done = done_.load(std::memory_order_acquire); done + 1 != static_cast<uint32_t>(num_threads_);
       done = done_.load(std::memory_order_acquire))
    wait_for_change(done_, done, STEP_SPINS);
  adapt();
}

void Pool::adapt() {
  if (num_threads_ == 1) return;
  const int barriers = barriers_.load(std::memory_order_relaxed);
  if (active_ > 1 && barriers >= FEWEST_BARRIERS && 4 * sleeps_.load(std::memory_order_relaxed) > barriers) {
    active_ = std::max(1, active_ / 2);
    calm_runs_ = 0;
    patience_ = std::min(2 * patience_, MOST_PATIENCE);
  } else if (++calm_runs_ >= patience_) {
    if (active_ == num_threads_) patience_ = std::max(patience_ / 2, FIRST_PATIENCE);
    active_ = num_threads_;
    calm_runs_ = 0;
  }
}

void Pool::worker(int thread) {
  uint32_t seen = 0;
  while (true) {
    wait_for_change(generation_, seen, IDLE_SPINS);
    seen = generation_.load(std::memory_order_acquire);
    if (stop_) return;
    if (thread < active_) (*work_)(thread);
    done_.fetch_add(1, std::memory_order_release);
    done_.notify_one();
  }
}

void Pool::barrier() {
  if (active_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(active_)) {
    barriers_.fetch_add(1, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else if (wait_for_change(phase_, phase, STEP_SPINS)) {
    sleeps_.fetch_add(1, std::memory_order_relaxed);
  }
}

}  // namespace openmimo
