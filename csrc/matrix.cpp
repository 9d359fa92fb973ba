#include "matrix.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

#include "words.h"

namespace openmimo {

namespace {

// From here on memory comes straight from the kernel: cleared, and taken only when touched.
constexpr int64_t MAPPED_BYTES = 1 << 20;

}  // namespace

void FreeMemory::operator()(void* p) const {
#if defined(__unix__) || defined(__APPLE__)
  if (bytes >= MAPPED_BYTES) {
    munmap(p, static_cast<size_t>(bytes));
    return;
  }
#endif
  std::free(p);
}

template <typename T>
Buffer<T>::Buffer(int64_t count) : size_(count) {
  const int64_t bytes = round_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), 64);
  void* memory = nullptr;
#if defined(__unix__) || defined(__APPLE__)
  if (bytes >= MAPPED_BYTES) {
    memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
  }
#endif
  if (memory == nullptr) {
    memory = std::aligned_alloc(64, static_cast<size_t>(bytes));
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0, static_cast<size_t>(bytes));
  }
  data_ = std::unique_ptr<T, FreeMemory>(static_cast<T*>(memory), FreeMemory{bytes});
}

template class Buffer<uint8_t>;
template class Buffer<uint16_t>;
template class Buffer<uint32_t>;
template class Buffer<float>;
template class Buffer<int32_t>;

float Source::at(int64_t row, int64_t column) const {
  const int64_t i = row * columns + column;
  return is_bf16 ? to_float(static_cast<const bf16*>(data)[i]) : static_cast<const float*>(data)[i];
}

Matrix::Matrix(const Source& source, const std::vector<int64_t>& order, Format format, Pool& pool)
    : format_(format), outputs_(static_cast<int64_t>(order.size())), inputs_(source.columns) {
  panels_ = (outputs_ + PANEL - 1) / PANEL;
  steps_ = words_for(format == Format::F32 ? Arithmetic::F32 : Arithmetic::BF16, inputs_);
  step_bytes_ = PANEL * (format == Format::INT8 ? 2 : 4);
  data_ = Buffer<uint8_t>(panels_ * steps_ * step_bytes_);
  if (format == Format::INT8) scales_ = Buffer<float>(panels_ * PANEL);
  pool.run([&](int thread) {
    for (int64_t output = thread; output < outputs_; output += pool.size()) {
      const int64_t row = order[output];
      if (row < 0) continue;
      uint8_t* to = data_.data() + output / PANEL * steps_ * step_bytes_ + output % PANEL * (step_bytes_ / PANEL);
      const auto value = [&](int64_t i) { return i < inputs_ ? source.at(row, i) : 0.0f; };
      if (format == Format::F32) {
        for (int64_t i = 0; i < steps_; ++i, to += step_bytes_) {
          const float x = value(i);
          std::memcpy(to, &x, 4);
        }
      } else if (format == Format::BF16) {
        for (int64_t i = 0; i < steps_; ++i, to += step_bytes_) {
          const uint32_t word = bf16_pair(value(2 * i), value(2 * i + 1));
          std::memcpy(to, &word, 4);
        }
      } else {
        float most = 0.0f;
        for (int64_t i = 0; i < inputs_; ++i) most = std::max(most, std::fabs(value(i)));
        const float scale = most > 0.0f ? most / 127.0f : 1.0f;
        scales_[output] = scale;
        const auto level = [&](int64_t i) {
          return static_cast<uint8_t>(static_cast<int8_t>(std::lrintf(std::clamp(value(i) / scale, -127.0f, 127.0f))));
        };
        for (int64_t i = 0; i < steps_; ++i, to += step_bytes_) {
          to[0] = level(2 * i);
          to[1] = level(2 * i + 1);
        }
      }
    }
  });
}

void Matrix::multiply(const Kernels& kernels, int64_t panel, const uint32_t* const* rows, int num_rows, float* out,
                      int64_t out_stride) const {
  // A stretch of steps at a time, so that this part of the panel stays in the first-level cache for all rows.
  constexpr int64_t STRETCH = 128;
  const int columns = static_cast<int>(std::min<int64_t>(PANEL, round_up(outputs_ - panel * PANEL, 16)));
  const uint8_t* data = data_.data() + panel * steps_ * step_bytes_;
  const int64_t stretch = num_rows > 8 ? STRETCH : steps_;
  const uint32_t* moved[64];
  for (int first_row = 0; first_row < num_rows; first_row += 64) {
    const int count = std::min(64, num_rows - first_row);
    float* to = out + first_row * out_stride;
    for (int64_t step = 0; step < steps_; step += stretch) {
      for (int i = 0; i < count; ++i) moved[i] = rows[first_row + i] + step;
      kernels.product(format_, {moved, count, data + step * step_bytes_, step_bytes_,
                                static_cast<int>(std::min(stretch, steps_ - step)), columns, to, out_stride, step > 0});
    }
    if (format_ == Format::INT8)
      for (int i = 0; i < count; ++i)
        for (int c = 0; c < columns; ++c) to[i * out_stride + c] *= scales_[panel * PANEL + c];
  }
}

std::vector<int64_t> identity_order(int64_t count) {
  std::vector<int64_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  return order;
}

std::vector<int64_t> gate_up_order(int64_t width) {
  constexpr int64_t HALF = PANEL / 2;
  std::vector<int64_t> order(round_up(width, HALF) * 2, -1);
  for (int64_t i = 0; i < width; ++i) {
    order[i / HALF * PANEL + i % HALF] = i;
    order[i / HALF * PANEL + HALF + i % HALF] = width + i;
  }
  return order;
}

}  // namespace openmimo
