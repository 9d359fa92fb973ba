#include "pool.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace openmimo {
namespace {

// Rounds of spinning, tens of nanoseconds each. Waking a sleeping thread takes longer than most waits inside a step, and on
// a virtual machine longer than the gap between two steps.
constexpr int STEP_SPINS = 4000, IDLE_SPINS = 20000;

// When threads slept at barriers for half of a run, somebody lost a processor for as long as all of them worked, and half
// the threads would have taken no longer. The next runs do with these, until after a while all are tried again; each failed
// try doubles that while. It is short at first, because another engine's threads spin for some milliseconds after their last
// work and are gone then. How often they slept says nothing: where a phase takes long, uneven shares alone differ by more
// than they spin.
constexpr int FEWEST_BARRIERS = 8;
constexpr std::chrono::milliseconds FIRST_PATIENCE{5}, MOST_PATIENCE{640};

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

int64_t nanoseconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

// Returns the nanoseconds that it slept; meanwhile it is counted in `asleep`.
template <typename T>
int64_t wait_for_change(std::atomic<T>& value, T old, int spins, std::atomic<int>* asleep = nullptr) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return 0;
    pause_briefly();
  }
  if (value.load(std::memory_order_acquire) != old) return 0;
  const auto began = std::chrono::steady_clock::now();
  if (asleep) asleep->fetch_add(1, std::memory_order_relaxed);
  value.wait(old, std::memory_order_acquire);
  if (asleep) asleep->fetch_sub(1, std::memory_order_relaxed);
  return nanoseconds(std::chrono::steady_clock::now() - began);
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
    adapt(std::chrono::steady_clock::now());
    return;
  }
  if (asleep_.load(std::memory_order_relaxed) > 0) keep_apart();
  work_ = &work;
  done_.store(0, std::memory_order_relaxed);
  barriers_.store(0, std::memory_order_relaxed);
  slept_.store(0, std::memory_order_relaxed);
  const auto began = std::chrono::steady_clock::now();
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  work(0);
  // Every worker answers, also one that has nothing to do, so that none is still on its way when the next run begins.
  for (uint32_t done = done_.load(std::memory_order_acquire); done + 1 != static_cast<uint32_t>(num_threads_);
       done = done_.load(std::memory_order_acquire))
    wait_for_change(done_, done, STEP_SPINS);
  adapt(began);
}

// A woken thread tends to start on its waker's processor, and the two would take turns there for many milliseconds before
// the system parted them. So whoever sleeps may wake up anywhere but here.
void Pool::keep_apart() {
#if defined(__linux__)
  const int here = sched_getcpu();
  if (here < 0 || here == caller_cpu_ || here >= CPU_SETSIZE) return;
  cpu_set_t others;
  if (sched_getaffinity(0, sizeof others, &others) != 0) return;
  CPU_CLR(here, &others);
  if (CPU_COUNT(&others) == 0) return;
  caller_cpu_ = here;
  for (auto& thread : threads_) pthread_setaffinity_np(thread.native_handle(), sizeof others, &others);
#endif
}

void Pool::adapt(std::chrono::steady_clock::time_point began) {
  if (num_threads_ == 1) return;
  const auto now = std::chrono::steady_clock::now();
  if (active_ > 1 && barriers_.load(std::memory_order_relaxed) >= FEWEST_BARRIERS &&
      2 * slept_.load(std::memory_order_relaxed) > (active_ - 1) * nanoseconds(now - began)) {
    active_ = std::max(1, active_ / 2);
    deadline_ = now + patience_;
    patience_ = std::min(2 * patience_, MOST_PATIENCE);
  } else if (now >= deadline_) {
    if (active_ == num_threads_) patience_ = std::max(patience_ / 2, FIRST_PATIENCE);
    active_ = num_threads_;
    deadline_ = now + patience_;
  }
}

void Pool::worker(int thread) {
  uint32_t seen = 0;
  while (true) {
    wait_for_change(generation_, seen, IDLE_SPINS, &asleep_);
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
  } else if (const int64_t slept = wait_for_change(phase_, phase, STEP_SPINS); slept > 0) {
    slept_.fetch_add(slept, std::memory_order_relaxed);
  }
}

}  // namespace openmimo
