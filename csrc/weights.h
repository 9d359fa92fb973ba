// Memory for packed weights: ordinary memory, or a file that is packed once and mapped by every process after that.
#pragma once

#include <cstdint>
#include <string>

#include "pool.h"

namespace openmimo {

// Hands out consecutive stretches of memory. Without memory it only counts, so that one walk over a model tells how much is
// needed and a second, the same, places everything.
class Arena {
 public:
  explicit Arena(uint8_t* base = nullptr) : base_(base) {}
  uint8_t* take(int64_t bytes);
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

class WeightMemory {
 public:
  WeightMemory() = default;
  ~WeightMemory();
  WeightMemory(const WeightMemory&) = delete;
  WeightMemory& operator=(const WeightMemory&) = delete;

  // Cleared memory of the process.
  void allocate(int64_t bytes);

  // Map a finished file. False if there is none, or if it is of other weights, cut short, or damaged in one of the chunks
  // that are looked at: all of a small file, some of a large one, whose other pages are read when they are used.
  bool open(const std::string& path, const std::string& fingerprint, int64_t bytes, Pool& pool);

  // Begin a file beside `path`; `finish` writes its header and moves it there.
  // Throws std::runtime_error when the folder cannot hold it.
  void create(const std::string& path, int64_t bytes);
  // Throws std::runtime_error when it cannot be written; the weights stay usable.
  void finish(const std::string& fingerprint, Pool& pool);

  uint8_t* data() const;
  bool writable() const { return writable_; }
  bool is_file() const { return file_ >= 0; }

 private:
  void map(int64_t bytes, bool writable);
  void close();

  std::string path_, temporary_;
  int file_ = -1;
  uint8_t* memory_ = nullptr;
  int64_t bytes_ = 0;  // without the header
  bool writable_ = false;
};

}  // namespace openmimo
