// Products of quantised rows and 8-bit weights in whole numbers, written once over a vector type `Ints` beside `Isa`:
//   Vec (LANES of int32), Bytes (four weights per lane), Word (four numbers of a row); set, bytes_of, word_of,
//   dot(sum, Word, Bytes), floats; for tiles load, add
#pragma once

#include "kernels.h"
#include "words.h"

namespace {

using namespace openmimo;

template <int MR, int NV>
inline void integer_steps(Ints::Vec (&sum)[MR][NV], const uint32_t* const (&rows)[MR], const uint8_t* panel, int begin,
                          int end) {
  for (int step = begin; step < end; ++step, panel += PANEL * 4) {
    Ints::Bytes weights[NV];
    for (int j = 0; j < NV; ++j) weights[j] = Ints::bytes_of(panel + j * Isa::LANES * 4);
    for (int i = 0; i < MR; ++i) {
      const Ints::Word word = Ints::word_of(rows[i][step]);
      for (int j = 0; j < NV; ++j) sum[i][j] = Ints::dot(sum[i][j], word, weights[j]);
    }
  }
}

// What a row holds behind its words, of each block.
inline int integer_blocks(int row_steps) { return (row_steps + INTEGER_BLOCK_STEPS - 1) / INTEGER_BLOCK_STEPS; }
inline float block_scale(const uint32_t* row, int row_steps, int block) { return float_from_bits(row[row_steps + block]); }
inline int32_t block_sum(const uint32_t* row, int row_steps, int block) {
  return static_cast<int32_t>(row[row_steps + integer_blocks(row_steps) + block]);
}

// `sum` and what a block of a row adds to it: `part` whole numbers, times the weights' scales if they have any of the block.
inline Isa::Vec add_block(Isa::Vec sum, Ints::Vec part, const uint16_t* scales, const uint32_t* row, int row_steps,
                          int block) {
  Isa::Vec x = Ints::floats(part);
  if (scales) x = Isa::fma(x, Isa::load_bf16(scales), Isa::zero());
  return Isa::fma(x, Isa::set(block_scale(row, row_steps, block)), sum);
}

// MR rows times NV vectors of columns, all sums in registers.
template <int MR, int NV>
void integer_tile(const IntegerProduct& p, int row, int column) {
  const uint32_t* rows[MR];
  float* out = p.out + row * p.out_stride + column;
  Isa::Vec sum[MR][NV];
  for (int i = 0; i < MR; ++i) {
    rows[i] = p.rows[row + i];
    for (int j = 0; j < NV; ++j)
      sum[i][j] = p.begin > 0 ? Isa::load(out + i * p.out_stride + j * Isa::LANES) : Isa::zero();
  }
  const uint8_t* panel = p.panel + column * 4;
  const uint16_t* scales = p.block_scales ? p.block_scales + column : nullptr;
  for (int begin = p.begin; begin < p.end; begin += INTEGER_BLOCK_STEPS, panel += INTEGER_BLOCK_STEPS * PANEL * 4) {
    const int end = begin + INTEGER_BLOCK_STEPS < p.end ? begin + INTEGER_BLOCK_STEPS : p.end;
    Ints::Vec part[MR][NV];
    for (int i = 0; i < MR; ++i) {
      const Ints::Vec start = Ints::set(-block_sum(rows[i], p.row_steps, begin / INTEGER_BLOCK_STEPS));
      for (int j = 0; j < NV; ++j) part[i][j] = start;
    }
    integer_steps<MR, NV>(part, rows, panel, begin, end);
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j)
        sum[i][j] = add_block(sum[i][j], part[i][j], scales ? scales + j * Isa::LANES : nullptr, rows[i], p.row_steps,
                              begin / INTEGER_BLOCK_STEPS);
    if (scales) scales += PANEL;
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) {
      if (p.output_scales)
        sum[i][j] = Isa::fma(sum[i][j], Isa::load(p.output_scales + column + j * Isa::LANES), Isa::zero());
      Isa::store(out + i * p.out_stride + j * Isa::LANES, sum[i][j]);
    }
}

template <int NV>
void integer_columns(const IntegerProduct& p, int column) {
  constexpr int FIT = Isa::REGISTERS / (2 * NV), MR = FIT < 1 ? 1 : (FIT > 4 ? 4 : FIT);
  int row = 0;
  for (; row + MR <= p.num_rows; row += MR) integer_tile<MR, NV>(p, row, column);
  switch (p.num_rows - row) {
    case 3: if constexpr (MR > 3) integer_tile<3, NV>(p, row, column); break;
    case 2: if constexpr (MR > 2) integer_tile<2, NV>(p, row, column); break;
    case 1: if constexpr (MR > 1) integer_tile<1, NV>(p, row, column); break;
    default: break;
  }
}

template <int WIDE>
void integer_panel(const IntegerProduct& p) {
  constexpr int SIXTEEN = 16 / Isa::LANES;
  int column = 0;
  for (; column + WIDE * Isa::LANES <= p.columns; column += WIDE * Isa::LANES) integer_columns<WIDE>(p, column);
  switch ((p.columns - column) / 16) {
    case 3: if constexpr (3 * SIXTEEN < WIDE) integer_columns<3 * SIXTEEN>(p, column); break;
    case 2: if constexpr (2 * SIXTEEN < WIDE) integer_columns<2 * SIXTEEN>(p, column); break;
    case 1: if constexpr (SIXTEEN < WIDE) integer_columns<SIXTEEN>(p, column); break;
    default: break;
  }
}

void integer_product(const IntegerProduct& p) {
  if constexpr (Isa::WIDER_ALONE) {
    if (p.num_rows == 1) return integer_panel<4 * Isa::WIDE_VECTORS>(p);
  }
  integer_panel<Isa::WIDE_VECTORS>(p);
}

// The bits of a bf16 value without its sign grow with its size, so that the largest is found among whole numbers.
void quantize(const uint32_t* words, int64_t values, uint32_t* out) {
  constexpr int64_t BLOCK_VALUES = INTEGER_BLOCK_STEPS * 4;
  const auto* x = reinterpret_cast<const bf16*>(words);
  auto* bytes = reinterpret_cast<uint8_t*>(out);
  const int64_t steps = quantized_steps(values);
  uint32_t* scales = out + steps;
  uint32_t* sums = scales + integer_blocks(static_cast<int>(steps));
  for (int64_t i = values; i < steps * 4; ++i) bytes[i] = 0;
  for (int64_t begin = 0; begin < values; begin += BLOCK_VALUES) {
    const int64_t end = begin + BLOCK_VALUES < values ? begin + BLOCK_VALUES : values;
    uint16_t most = 0;
    for (int64_t i = begin; i < end; ++i) {
      const auto size = static_cast<uint16_t>(x[i] & 0x7fffu);
      most = size > most ? size : most;
    }
    const float largest = to_float(most), inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    // Adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the lowest bits.
    for (int64_t i = begin; i < end; ++i)
      bytes[i] = static_cast<uint8_t>(bits_of(to_float(x[i]) * inverse + 12582912.0f));
    int32_t sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += static_cast<int8_t>(bytes[i]);
    *scales++ = bits_of(largest / 127.0f);
    *sums++ = static_cast<uint32_t>(128 * sum);
  }
}

}  // namespace
