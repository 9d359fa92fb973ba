#include "weights.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#define OPENMIMO_MAPPED 1
#endif

namespace openmimo {
namespace {

// A file is the header, the weights, and a sum for each chunk of them. Opening checks CHECKED_CHUNKS of the chunks.
constexpr int64_t HEADER_BYTES = 4096, ALIGNMENT = 64, CHUNK_BYTES = 16 << 20, CHECKED_CHUNKS = 16;
constexpr char MAGIC[8] = {'m', 'i', 'm', 'o', 'p', 'a', 'c', 'k'};
// Raise it whenever the layout of packed weights changes.
constexpr uint32_t LAYOUT_VERSION = 2;

struct Header {
  char magic[8];
  uint32_t version, reserved;
  int64_t bytes;
  uint64_t checksum;  // of the chunks' sums
  char fingerprint[128];
};

// A sum that any changed, missing or moved byte changes, with overwhelming likelihood; not meant against forgery.
uint64_t checksum(const uint8_t* data, int64_t bytes) {
  constexpr uint64_t PRIME = 0x9e3779b97f4a7c15u;
  uint64_t lanes[4] = {1, 2, 3, 4};
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32)
    for (int lane = 0; lane < 4; ++lane) {
      uint64_t word;
      std::memcpy(&word, data + i + 8 * lane, 8);
      lanes[lane] = (lanes[lane] ^ word) * PRIME;
      lanes[lane] ^= lanes[lane] >> 29;
    }
  for (; i < bytes; ++i) lanes[0] = (lanes[0] ^ data[i]) * PRIME;
  uint64_t sum = static_cast<uint64_t>(bytes);
  for (const uint64_t lane : lanes) sum = (sum ^ lane ^ (lane >> 31)) * PRIME;
  return sum;
}

uint64_t checksum(const std::vector<uint64_t>& sums) {
  return checksum(reinterpret_cast<const uint8_t*>(sums.data()), static_cast<int64_t>(sums.size()) * 8);
}

int64_t num_chunks(int64_t bytes) { return (bytes + CHUNK_BYTES - 1) / CHUNK_BYTES; }

int64_t file_bytes(int64_t bytes) { return HEADER_BYTES + bytes + num_chunks(bytes) * 8; }

std::vector<uint64_t> sums_of(const uint8_t* data, int64_t bytes, const std::vector<int64_t>& chunks, Pool& pool) {
  std::vector<uint64_t> sums(chunks.size());
  pool.run([&](int thread) {
    for (size_t i = static_cast<size_t>(thread); i < chunks.size(); i += static_cast<size_t>(pool.size()))
      sums[i] = checksum(data + chunks[i] * CHUNK_BYTES, std::min(CHUNK_BYTES, bytes - chunks[i] * CHUNK_BYTES));
  });
  return sums;
}

// At most `most` of the chunks, evenly spread, the first and the last among them.
std::vector<int64_t> spread_chunks(int64_t bytes, int64_t most) {
  const int64_t all = num_chunks(bytes), count = std::min(all, most);
  std::vector<int64_t> chunks(count);
  for (int64_t i = 0; i < count; ++i) chunks[i] = i * (all - 1) / std::max<int64_t>(count - 1, 1);
  return chunks;
}

}  // namespace

uint8_t* Arena::take(int64_t bytes) {
  uint8_t* at = base_ ? base_ + used_ : nullptr;
  used_ += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  return at;
}

WeightMemory::~WeightMemory() { close(); }

uint8_t* WeightMemory::data() const { return is_file() ? memory_ + HEADER_BYTES : memory_; }

#if defined(OPENMIMO_MAPPED)

namespace {

// Weights are read from end to end, and a small page's end stops the processor from reading ahead. Of a file this also says
// that it shall be read into huge pages, where the file system can; where it cannot the weights are the same, only slower.
void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
}

}  // namespace

void WeightMemory::close() {
  if (memory_) munmap(memory_, static_cast<size_t>(bytes_ + (is_file() ? HEADER_BYTES : 0)));
  if (file_ >= 0) ::close(file_);
  if (!temporary_.empty()) unlink(temporary_.c_str());
  memory_ = nullptr;
  file_ = -1;
  temporary_.clear();
}

void WeightMemory::allocate(int64_t bytes) {
  close();
  bytes_ = std::max<int64_t>(bytes, 1);
  void* memory = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  ask_for_huge_pages(memory, bytes_);
  memory_ = static_cast<uint8_t*>(memory);
  writable_ = true;
}

void WeightMemory::map(int64_t bytes, bool writable) {
  bytes_ = bytes;
  writable_ = writable;
  void* memory = mmap(nullptr, static_cast<size_t>(bytes + HEADER_BYTES), writable ? PROT_READ | PROT_WRITE : PROT_READ,
                      MAP_SHARED, file_, 0);
  if (memory == MAP_FAILED) throw std::runtime_error(std::string("cannot map packed weights: ") + std::strerror(errno));
  ask_for_huge_pages(memory, bytes + HEADER_BYTES);
  memory_ = static_cast<uint8_t*>(memory);
}

bool WeightMemory::open(const std::string& path, const std::string& fingerprint, int64_t bytes, Pool& pool) {
  close();
  file_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status;
  Header header;
  std::vector<uint64_t> sums(num_chunks(bytes));
  const auto sums_bytes = static_cast<ssize_t>(sums.size() * 8);
  const bool fits = file_ >= 0 && fstat(file_, &status) == 0 && status.st_size == file_bytes(bytes) &&
                    pread(file_, &header, sizeof header, 0) == static_cast<ssize_t>(sizeof header) &&
                    std::memcmp(header.magic, MAGIC, sizeof MAGIC) == 0 && header.version == LAYOUT_VERSION &&
                    header.bytes == bytes && fingerprint.size() < sizeof header.fingerprint &&
                    fingerprint == std::string(header.fingerprint, strnlen(header.fingerprint, sizeof header.fingerprint)) &&
                    pread(file_, sums.data(), sums_bytes, HEADER_BYTES + bytes) == sums_bytes &&
                    checksum(sums) == header.checksum;
  if (!fits) {
    close();
    return false;
  }
  map(bytes, false);
  path_ = path;
  const std::vector<int64_t> chunks = spread_chunks(bytes, CHECKED_CHUNKS);
  const std::vector<uint64_t> found = sums_of(data(), bytes, chunks, pool);
  for (size_t i = 0; i < chunks.size(); ++i)
    if (found[i] != sums[chunks[i]]) {
      close();
      return false;
    }
  return true;
}

void WeightMemory::create(const std::string& path, int64_t bytes) {
  close();
  std::string name = path + ".XXXXXX";
  file_ = mkstemp(name.data());
  if (file_ < 0) throw std::runtime_error("cannot write packed weights to " + path + ": " + std::strerror(errno));
  path_ = path;
  temporary_ = name;
  // Reserve the space now: a full disk found later would end the process.
#if defined(__linux__)
  const int failed = posix_fallocate(file_, 0, file_bytes(bytes));
#else
  const int failed = ftruncate(file_, file_bytes(bytes)) == 0 ? 0 : errno;
#endif
  if (failed) {
    close();
    throw std::runtime_error("no room for " + std::to_string(bytes) + " bytes of packed weights at " + path + ": " +
                             std::strerror(failed));
  }
  map(bytes, true);
}

void WeightMemory::finish(const std::string& fingerprint, Pool& pool) {
  if (temporary_.empty()) return;
  const std::vector<uint64_t> sums = sums_of(data(), bytes_, spread_chunks(bytes_, num_chunks(bytes_)), pool);
  const auto sums_bytes = static_cast<ssize_t>(sums.size() * 8);
  Header header{};
  std::memcpy(header.magic, MAGIC, sizeof MAGIC);
  header.version = LAYOUT_VERSION;
  header.bytes = bytes_;
  header.checksum = checksum(sums);
  std::strncpy(header.fingerprint, fingerprint.c_str(), sizeof header.fingerprint - 1);
  std::memcpy(memory_, &header, sizeof header);
  // All of it must be on the disk before the name is there, or a crash could leave a file that only looks whole.
  if (pwrite(file_, sums.data(), static_cast<size_t>(sums_bytes), HEADER_BYTES + bytes_) != sums_bytes ||
      msync(memory_, static_cast<size_t>(bytes_ + HEADER_BYTES), MS_SYNC) != 0 || fsync(file_) != 0)
    throw std::runtime_error("cannot write packed weights to " + temporary_ + ": " + std::strerror(errno));
  if (rename(temporary_.c_str(), path_.c_str()) != 0)
    throw std::runtime_error("cannot move packed weights to " + path_ + ": " + std::strerror(errno));
  temporary_.clear();
  // Other processes may map it from now on.
  mprotect(memory_, static_cast<size_t>(bytes_ + HEADER_BYTES), PROT_READ);
  writable_ = false;
}

#else

void WeightMemory::close() {
  delete[] memory_;
  memory_ = nullptr;
}
void WeightMemory::allocate(int64_t bytes) {
  close();
  bytes_ = bytes;
  memory_ = new uint8_t[bytes + 1]();
  writable_ = true;
}
void WeightMemory::map(int64_t, bool) {}
bool WeightMemory::open(const std::string&, const std::string&, int64_t, Pool&) { return false; }
void WeightMemory::create(const std::string&, int64_t bytes) { allocate(bytes); }
void WeightMemory::finish(const std::string&, Pool&) {}

#endif

}  // namespace openmimo
