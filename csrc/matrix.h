// Weights, packed for the kernels.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "weights.h"

namespace openmimo {

struct FreeMemory {
  int64_t bytes = 0;
  void operator()(void* p) const;
};

// Cleared memory at a multiple of 64 bytes. Large buffers take up memory only where they were touched.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count);
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](int64_t i) { return data_.get()[i]; }
  const T& operator[](int64_t i) const { return data_.get()[i]; }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }

 private:
  std::unique_ptr<T, FreeMemory> data_;
  int64_t size_ = 0;
};

// Row-major values to pack: fp32, bf16 in 16-bit words, or E4M3 codes that come with a scale for each row's 128 columns.
struct Source {
  const void* data = nullptr;
  bool is_bf16 = false;
  const float* row_scales = nullptr;  // with E4M3 codes: (rows, columns / 128, rounded up)
  int64_t rows = 0, columns = 0;
  // Of fp32 or bf16.
  float at(int64_t row, int64_t column) const;
};

// A weight (out x in) in panels of 64 outputs: panel, step, column. Outputs are padded with zeros.
class Matrix {
 public:
  Matrix() = default;
  // `order[c]` is the source row that becomes output c, -1 for a column of zeros. With `quantized_rows` (INT8 and INT8_BLOCK
  // only) it is multiplied with quantised rows, in whole numbers.
  Matrix(std::vector<int64_t> order, int64_t inputs, Format format, bool quantized_rows = false);

  // Where the packed weight is to lie, or lies already; see Arena.
  void place(Arena& arena);
  void pack(const Source& source, Pool& pool);

  bool empty() const { return panels_ == 0; }
  int64_t panels() const { return panels_; }
  bool quantized_rows() const { return quantized_rows_; }
  int64_t inputs() const { return inputs_; }
  Format format() const { return format_; }

  // out (rows x PANEL or wider) = rows times panel `panel`, scaled.
  void multiply(const Kernels& kernels, int64_t panel, const uint32_t* const* rows, int num_rows, float* out,
                int64_t out_stride) const;

 private:
  class Packer;

  int64_t group_size() const { return quantized_rows_ ? group_steps(format_) / 2 : group_steps(format_); }
  void multiply_quantized(const Kernels& kernels, int64_t panel, const uint32_t* const* rows, int num_rows, float* out,
                          int64_t out_stride) const;

  Format format_ = Format::F32;
  bool quantized_rows_ = false;
  std::vector<int64_t> order_;
  int64_t inputs_ = 0, panels_ = 0, steps_ = 0, step_bytes_ = 0, groups_ = 0;
  int column_bytes_ = 4;
  uint8_t* data_ = nullptr;
  float* output_scales_ = nullptr;   // INT8: one per output
  uint8_t* group_scales_ = nullptr;  // FP8, INT4, INT8_BLOCK: per panel and group of steps one row of PANEL, see Product
};

std::vector<int64_t> identity_order(int64_t count);

// Panels of 32 gate and their 32 up outputs, from `width` gate rows followed by `width` up rows.
std::vector<int64_t> gate_up_order(int64_t width);

}  // namespace openmimo
