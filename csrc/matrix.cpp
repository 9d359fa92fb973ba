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
#if defined(MADV_HUGEPAGE)
    madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // caches are read block by block from everywhere
#endif
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

// Writes the steps of one output into its column of a panel.
class Matrix::Packer {
 public:
  Packer(const Source& source, Format format, bool quantized_rows)
      : source_(source), format_(format), per_step_(quantized_rows ? 4 : 2), offset_(quantized_rows ? 128 : 0) {
    if (format != Format::FP8 || source.row_scales) return;
    // The official grid: blocks of 128 x 128, the largest value of each becomes 448.
    block_columns_ = (source.columns + 127) / 128;
    blocks_.assign((source.rows + 127) / 128 * block_columns_, 0.0f);
    for (int64_t row = 0; row < source.rows; ++row)
      for (int64_t i = 0; i < source.columns; ++i) {
        float& most = blocks_[row / 128 * block_columns_ + i / 128];
        most = std::max(most, std::fabs(source.at(row, i)));
      }
  }

  // `to`: the column's first step, `stride` bytes apart; scales as in Matrix, those of groups PANEL apart.
  void pack(int64_t row, int64_t steps, uint8_t* to, int64_t stride, float* output_scale, uint8_t* group_scale) const {
    const auto value = [&](int64_t i) { return i < source_.columns ? source_.at(row, i) : 0.0f; };
    if (source_.row_scales) {
      copy_codes(row, steps, to, stride, group_scale);
    } else if (format_ == Format::F32) {
      for (int64_t i = 0; i < steps; ++i, to += stride) {
        const float x = value(i);
        std::memcpy(to, &x, 4);
      }
    } else if (format_ == Format::BF16) {
      const int64_t pairs = source_.is_bf16 ? source_.columns / 2 : 0;  // words of the source as they are
      const auto* from = static_cast<const bf16*>(source_.data) + row * source_.columns;
      for (int64_t i = 0; i < pairs; ++i, to += stride) std::memcpy(to, from + 2 * i, 4);
      for (int64_t i = pairs; i < steps; ++i, to += stride) {
        const uint32_t word = bf16_pair(value(2 * i), value(2 * i + 1));
        std::memcpy(to, &word, 4);
      }
    } else if (format_ == Format::INT8) {
      float most = 0.0f;
      for (int64_t i = 0; i < source_.columns; ++i) most = std::max(most, std::fabs(value(i)));
      *output_scale = most > 0.0f ? most / 127.0f : 1.0f;
      pack_bytes(0, steps, value, *output_scale, to, stride);
    } else if (format_ == Format::INT8_BLOCK) {
      const int64_t block = 2 * group_steps(format_) / per_step_;
      for (int64_t begin = 0; begin < steps; begin += block, group_scale += PANEL * scale_bytes(format_)) {
        const int64_t end = std::min(begin + block, steps);
        float most = 0.0f;
        for (int64_t i = begin * per_step_; i < end * per_step_; ++i) most = std::max(most, std::fabs(value(i)));
        const bf16 scale = most > 0.0f ? to_bf16(most / 127.0f) : to_bf16(1.0f);
        std::memcpy(group_scale, &scale, sizeof scale);
        pack_bytes(begin, end, value, to_float(scale), to, stride);
      }
    } else {
      const int64_t group = group_steps(format_);
      for (int64_t begin = 0; begin < steps; begin += group, group_scale += PANEL * scale_bytes(format_)) {
        const float scale = group_scale_of(row, begin, value);
        const bf16 narrow = to_bf16(scale);
        if (format_ == Format::FP8) std::memcpy(group_scale, &scale, sizeof scale);
        else std::memcpy(group_scale, &narrow, sizeof narrow);
        for (int64_t i = begin; i < std::min(begin + group, steps); ++i, to += stride) {
          const float low = value(2 * i) / scale, high = value(2 * i + 1) / scale;
          if (format_ == Format::FP8) {
            to[0] = to_e4m3(low);
            to[1] = to_e4m3(high);
          } else {
            *to = static_cast<uint8_t>(level(low) | level(high) << 4);
          }
        }
      }
    }
  }

 private:
  // Steps `begin` to `end` of a column whose first step is `to`.
  template <typename Value>
  void pack_bytes(int64_t begin, int64_t end, const Value& value, float scale, uint8_t* to, int64_t stride) const {
    for (int64_t step = begin; step < end; ++step)
      for (int64_t i = 0; i < per_step_; ++i)
        to[step * stride + i] = static_cast<uint8_t>(
            std::lrintf(std::clamp(value(step * per_step_ + i) / scale, -127.0f, 127.0f)) + offset_);
  }

  // Codes and scales that are E4M3 already stay what they are: rounding them again would change them.
  void copy_codes(int64_t row, int64_t steps, uint8_t* to, int64_t stride, uint8_t* group_scale) const {
    const uint8_t* codes = static_cast<const uint8_t*>(source_.data) + row * source_.columns;
    for (int64_t i = 0; i < steps; ++i, to += stride)
      for (int half = 0; half < 2; ++half) to[half] = 2 * i + half < source_.columns ? codes[2 * i + half] : uint8_t{0};
    const int64_t groups = (steps + group_steps(Format::FP8) - 1) / group_steps(Format::FP8);
    for (int64_t group = 0; group < groups; ++group)
      std::memcpy(group_scale + group * PANEL * scale_bytes(Format::FP8), source_.row_scales + row * groups + group, 4);
  }

  static int level(float x) { return static_cast<int>(std::lrintf(std::clamp(x, -8.0f, 7.0f))) + 8; }

  // As it is stored: bf16 for INT4, where of some candidates the one with the smallest squared error is taken.
  template <typename Value>
  float group_scale_of(int64_t row, int64_t begin, const Value& value) const {
    if (format_ == Format::FP8) {
      const float most = blocks_[row / 128 * block_columns_ + begin / 64];
      return most > 0.0f ? most / 448.0f : 1.0f;
    }
    const int64_t first = 2 * begin, last = first + 2 * group_steps(Format::INT4);
    float extreme = 0.0f;
    for (int64_t i = first; i < last; ++i)
      if (std::fabs(value(i)) > std::fabs(extreme)) extreme = value(i);
    if (extreme == 0.0f) return 1.0f;
    float best = 0.0f, least = INFINITY;
    for (const float candidate : {extreme / -8.0f, std::fabs(extreme) / 7.0f, extreme / -7.2f}) {
      const float scale = to_float(to_bf16(candidate));
      float error = 0.0f;
      for (int64_t i = first; i < last; ++i) {
        const float difference = value(i) - scale * static_cast<float>(level(value(i) / scale) - 8);
        error += difference * difference;
      }
      if (error < least) least = error, best = scale;
    }
    return best;
  }

  const Source& source_;
  Format format_;
  int64_t per_step_, offset_;  // 8-bit weights: numbers in a step, and what is added to them
  int64_t block_columns_ = 0;
  std::vector<float> blocks_;
};

Matrix::Matrix(std::vector<int64_t> order, int64_t inputs, Format format, bool quantized_rows)
    : format_(format), quantized_rows_(quantized_rows), order_(std::move(order)), inputs_(inputs) {
  panels_ = (static_cast<int64_t>(order_.size()) + PANEL - 1) / PANEL;
  const Arithmetic arithmetic = format == Format::F32 ? Arithmetic::F32 : Arithmetic::BF16;
  steps_ = quantized_rows ? quantized_steps(inputs) : words_for(arithmetic, inputs);
  column_bytes_ = quantized_rows ? 4 : column_bytes(format);
  step_bytes_ = PANEL * column_bytes_;
  if (group_size()) groups_ = (steps_ + group_size() - 1) / group_size();
}

void Matrix::place(Arena& arena) {
  data_ = arena.take(panels_ * steps_ * step_bytes_);
  if (format_ == Format::INT8) output_scales_ = reinterpret_cast<float*>(arena.take(panels_ * PANEL * 4));
  if (groups_) group_scales_ = arena.take(panels_ * groups_ * PANEL * scale_bytes(format_));
}

void Matrix::pack(const Source& source, Pool& pool) {
  const Packer packer(source, format_, quantized_rows_);
  const auto outputs = static_cast<int64_t>(order_.size());
  pool.run([&](int thread) {
    // Whole panels, because neighbouring outputs share cache lines.
    const auto [begin, end] = share(panels_, thread, pool.size());
    for (int64_t output = begin * PANEL; output < std::min(end * PANEL, outputs); ++output) {
      if (order_[output] < 0) continue;
      const int64_t panel = output / PANEL, column = output % PANEL;
      packer.pack(order_[output], steps_, data_ + panel * steps_ * step_bytes_ + column * column_bytes_, step_bytes_,
                  output_scales_ ? output_scales_ + output : nullptr,
                  groups_ ? group_scales_ + (panel * groups_ * PANEL + column) * scale_bytes(format_) : nullptr);
    }
  });
}

void Matrix::multiply(const Kernels& kernels, int64_t panel, const uint32_t* const* rows, int num_rows, float* out,
                      int64_t out_stride) const {
  if (quantized_rows_) return multiply_quantized(kernels, panel, rows, num_rows, out, out_stride);
  // A stretch of steps at a time, so that this part of the panel stays in the first-level cache for all rows.
  constexpr int64_t STRETCH = 128;
  const int columns = static_cast<int>(std::min<int64_t>(PANEL, round_up(static_cast<int64_t>(order_.size()) - panel * PANEL, 16)));
  const uint8_t* data = data_ + panel * steps_ * step_bytes_;
  const int64_t scale_row = int64_t{PANEL} * scale_bytes(format_);
  const uint8_t* scales = groups_ ? group_scales_ + panel * groups_ * scale_row : nullptr;
  const int64_t stretch = num_rows > 8 ? STRETCH : steps_;
  const uint32_t* moved[64];
  for (int first_row = 0; first_row < num_rows; first_row += 64) {
    const int count = std::min(64, num_rows - first_row);
    float* to = out + first_row * out_stride;
    for (int64_t step = 0; step < steps_; step += stretch) {
      for (int i = 0; i < count; ++i) moved[i] = rows[first_row + i] + step;
      kernels.product(format_, {moved, count, data + step * step_bytes_, step_bytes_,
                                static_cast<int>(std::min(stretch, steps_ - step)), columns, to, out_stride, step > 0,
                                groups_ ? scales + step / group_steps(format_) * scale_row : nullptr});
    }
    if (format_ == Format::INT8)
      for (int i = 0; i < count; ++i)
        for (int c = 0; c < columns; ++c) to[i * out_stride + c] *= output_scales_[panel * PANEL + c];
  }
}

void Matrix::multiply_quantized(const Kernels& kernels, int64_t panel, const uint32_t* const* rows, int num_rows, float* out,
                                int64_t out_stride) const {
  constexpr int64_t STRETCH = 128;
  static_assert(STRETCH % INTEGER_BLOCK_STEPS == 0);
  const auto outputs = static_cast<int64_t>(order_.size());
  const int columns = static_cast<int>(std::min<int64_t>(PANEL, round_up(outputs - panel * PANEL, 16)));
  const uint8_t* data = data_ + panel * steps_ * step_bytes_;
  const auto* scales = reinterpret_cast<const uint16_t*>(group_scales_) + panel * groups_ * PANEL;
  const int64_t stretch = num_rows > 8 ? STRETCH : steps_;
  for (int first = 0; first < num_rows; first += 64)
    for (int64_t step = 0; step < steps_; step += stretch)
      kernels.integer_product({rows + first, std::min(64, num_rows - first), data + step * step_bytes_,
                               static_cast<int>(step), static_cast<int>(std::min(step + stretch, steps_)),
                               static_cast<int>(steps_), columns, out + first * out_stride, out_stride,
                               groups_ || step + stretch < steps_ ? nullptr : output_scales_ + panel * PANEL,
                               groups_ ? scales + step / INTEGER_BLOCK_STEPS * PANEL : nullptr});
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
