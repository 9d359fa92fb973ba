// A fixed team of threads that run one function together and meet at barriers in between.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace openmimo {

class Pool {
 public:
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return num_threads_; }

  // Call work(thread) on every thread, the caller being thread 0, and wait for all. One call at a time.
  void run(const std::function<void(int)>& work);

  // Inside `run`: wait until all threads are here. Everything written before is visible after.
  void barrier();

 private:
  void worker(int thread);

  const int num_threads_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<uint32_t> generation_{0}, done_{0};
  std::atomic<uint32_t> arrived_{0}, phase_{0};
  std::atomic<int> spin_limit_{1024}, idle_spin_limit_{1024};  // inside a step, between two
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

}  // namespace openmimo
