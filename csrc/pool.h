// A team of threads that run one function together and meet at barriers in between.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

namespace openmimo {

// The run of `count` items that belongs to a thread.
inline std::pair<int64_t, int64_t> share(int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

class Pool {
 public:
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Threads of the present call of `run`, or of the next one: at most those that the pool was made with. On a machine
  // whose processors are busy with something else fewer are faster, because all wait for the one that lost its processor.
  int size() const { return active_; }

  // Call work(thread) on `size()` threads, the caller being thread 0, and wait for all. One call at a time.
  void run(const std::function<void(int)>& work);

  // Inside `run`: wait until all threads are here. Everything written before is visible after.
  void barrier();

 private:
  void worker(int thread);
  void adapt(std::chrono::steady_clock::time_point began);
  void keep_apart();

  const int num_threads_;
  int active_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<uint32_t> generation_{0}, done_{0};
  std::atomic<uint32_t> arrived_{0}, phase_{0};
  std::atomic<int> barriers_{0};    // of the present run
  std::atomic<int64_t> slept_{0};   // nanoseconds of the present run that its threads slept at barriers, together
  std::atomic<int> asleep_{0};  // workers between two runs
  int caller_cpu_ = -1;         // which the workers keep off
  // When the number of threads may rise again, and how long it stays where it is.
  std::chrono::steady_clock::time_point deadline_;
  std::chrono::milliseconds patience_;
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

}  // namespace openmimo
