// AVX-512 kernels whose bf16 products run in AMX tiles: sixteen rows times sixteen steps times sixteen columns at once.
//
// Attention stays with vectors: its value products are cut where a ring wraps, and a tile sums sixteen steps in an order of
// its own, so that the place of a cut would show in the result.
#pragma once

#include "amx.h"
#include "isa_avx512.h"
#include "kernels_impl.h"

namespace {

constexpr int TILE = 16;

// Tiles 0 to 3 hold sixteen rows of sums, 4 the rows, 5 the columns. Other libraries on this thread use tiles too, so
// the configuration is loaded whenever a step begins.
void enter_tiles() {
  TileConfig config;
  for (int i = 0; i < 6; ++i) config.rows[i] = TILE, config.column_bytes[i] = 64;
  tile_load_config(config);
}

void leave_tiles() { tile_release(); }

// bf16 words, or bytes of a quantised row and of its weights: both are words to everything else.
template <bool INTEGER, int C>
void dot_into() {
  if constexpr (INTEGER) tile_dot_bytes<C, 4, 5>();
  else tile_dot<C, 4, 5>();
}

template <bool INTEGER, int NV>
void tile_steps(const uint32_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride) {
  tile_load<4>(a, a_stride * 4);
  tile_load<5>(b, b_stride), dot_into<INTEGER, 0>();
  if constexpr (NV > 1) tile_load<5>(b + 64, b_stride), dot_into<INTEGER, 1>();
  if constexpr (NV > 2) tile_load<5>(b + 128, b_stride), dot_into<INTEGER, 2>();
  if constexpr (NV > 3) tile_load<5>(b + 192, b_stride), dot_into<INTEGER, 3>();
}

template <bool INTEGER, int NV>
void tile_rows(const Product& p, int row) {
  const int rows = p.num_rows - row < TILE ? p.num_rows - row : TILE, whole = p.depth / TILE * TILE;
  alignas(64) uint32_t block[TILE * TILE] = {};
  alignas(64) uint32_t tail[TILE * PANEL] = {};
  alignas(64) float partial[TILE * PANEL];
  // Sums of fewer than sixteen rows go through a buffer.
  float* out = p.out + row * p.out_stride;
  float* sums = rows == TILE ? out : partial;
  const int64_t sums_stride = rows == TILE ? p.out_stride : PANEL;
  if (rows < TILE && p.accumulate)
    for (int i = 0; i < rows; ++i) std::memcpy(partial + i * PANEL, out + i * p.out_stride, NV * 64);
  if (p.accumulate) {
    tile_load<0>(sums, sums_stride * 4);
    if constexpr (NV > 1) tile_load<1>(sums + 16, sums_stride * 4);
    if constexpr (NV > 2) tile_load<2>(sums + 32, sums_stride * 4);
    if constexpr (NV > 3) tile_load<3>(sums + 48, sums_stride * 4);
  } else {
    tile_zero<0>();
    if constexpr (NV > 1) tile_zero<1>();
    if constexpr (NV > 2) tile_zero<2>();
    if constexpr (NV > 3) tile_zero<3>();
  }
  // Rows at equal distances are read where they lie.
  const int64_t stride = rows == TILE ? p.rows[row + 1] - p.rows[row] : 0;
  bool even = rows == TILE;
  for (int i = 2; even && i < TILE; ++i) even = p.rows[row + i] - p.rows[row + i - 1] == stride;
  for (int step = 0; step < whole; step += TILE) {
    const uint8_t* b = p.panel + step * p.stride;
    if (even) {
      tile_steps<INTEGER, NV>(p.rows[row] + step, stride, b, p.stride);
    } else {
      for (int i = 0; i < rows; ++i) std::memcpy(block + i * TILE, p.rows[row + i] + step, 64);
      tile_steps<INTEGER, NV>(block, TILE, b, p.stride);
    }
  }
  if (whole < p.depth) {
    const int rest = p.depth - whole;
    std::memset(block, 0, sizeof block);
    for (int i = 0; i < rows; ++i) std::memcpy(block + i * TILE, p.rows[row + i] + whole, rest * 4);
    for (int i = 0; i < rest; ++i) std::memcpy(tail + i * PANEL, p.panel + (whole + i) * p.stride, NV * 64);
    tile_steps<INTEGER, NV>(block, TILE, reinterpret_cast<const uint8_t*>(tail), PANEL * 4);
  }
  tile_store<0>(sums, sums_stride * 4);
  if constexpr (NV > 1) tile_store<1>(sums + 16, sums_stride * 4);
  if constexpr (NV > 2) tile_store<2>(sums + 32, sums_stride * 4);
  if constexpr (NV > 3) tile_store<3>(sums + 48, sums_stride * 4);
  if (rows < TILE)
    for (int i = 0; i < rows; ++i) std::memcpy(out + i * p.out_stride, partial + i * PANEL, NV * 64);
}

template <bool INTEGER = false>
void tile_product(const Product& p) {
  for (int row = 0; row < p.num_rows; row += TILE) switch (p.columns / 16) {
      case 4: tile_rows<INTEGER, 4>(p, row); break;
      case 3: tile_rows<INTEGER, 3>(p, row); break;
      case 2: tile_rows<INTEGER, 2>(p, row); break;
      default: tile_rows<INTEGER, 1>(p, row); break;
    }
}

// Widen a stretch of narrow weights to bf16 words first. Grouped formats do so a group at a time.
template <Format F>
void widened_product(const Product& p) {
  constexpr int STRETCH = group_steps(F) ? group_steps(F) : 128, ROWS = 64;
  alignas(64) static thread_local uint32_t words[STRETCH * PANEL];
  alignas(64) static thread_local float part[ROWS * PANEL];
  const uint32_t* moved[ROWS];
  for (int first = 0; first < p.num_rows; first += ROWS) {
    const int rows = p.num_rows - first < ROWS ? p.num_rows - first : ROWS;
    float* out = p.out + first * p.out_stride;
    for (int step = 0; step < p.depth; step += STRETCH) {
      const int steps = p.depth - step < STRETCH ? p.depth - step : STRETCH;
      for (int s = 0; s < steps; ++s)
        for (int column = 0; column < p.columns; column += 16)
          _mm512_store_si512(words + s * PANEL + column,
                             Operand<F>::load(p.panel + (step + s) * p.stride + column * column_bytes(F)));
      for (int i = 0; i < rows; ++i) moved[i] = p.rows[first + i] + step;
      const auto* panel = reinterpret_cast<const uint8_t*>(words);
      if constexpr (group_steps(F) == 0) {
        tile_product({moved, rows, panel, PANEL * 4, steps, p.columns, out, p.out_stride, p.accumulate || step > 0, nullptr});
        continue;
      }
      tile_product({moved, rows, panel, PANEL * 4, steps, p.columns, part, PANEL, false, nullptr});
      const uint8_t* scales = p.scales + step / STRETCH * PANEL * scale_bytes(F);
      for (int column = 0; column < p.columns; column += 16) {
        const Isa::Vec scale = load_scales<F>(scales + column * scale_bytes(F));
        for (int i = 0; i < rows; ++i) {
          float* to = out + i * p.out_stride + column;
          const Isa::Vec before = p.accumulate || step > 0 ? Isa::load(to) : Isa::zero();
          Isa::store(to, Isa::fma(Isa::load(part + i * PANEL + column), scale, before));
        }
      }
    }
  }
}

void product_in_tiles(Format format, const Product& p) {
  switch (format) {
    case Format::F32: return product_of<Format::F32>(p);
    case Format::BF16: return tile_product(p);
    case Format::INT8: return widened_product<Format::INT8>(p);
    case Format::FP8: return widened_product<Format::FP8>(p);
    case Format::INT4: return widened_product<Format::INT4>(p);
    case Format::INT8_BLOCK: return widened_product<Format::INT8_BLOCK>(p);
  }
}

// A block at a time.
void integer_product_in_tiles(const IntegerProduct& p) {
  constexpr int ROWS = 64;
  alignas(64) static thread_local float part[ROWS * PANEL];
  const uint32_t* moved[ROWS];
  for (int first = 0; first < p.num_rows; first += ROWS) {
    const int rows = p.num_rows - first < ROWS ? p.num_rows - first : ROWS;
    const uint8_t* panel = p.panel;
    const uint16_t* scales = p.block_scales;
    for (int begin = p.begin; begin < p.end; begin += INTEGER_BLOCK_STEPS, panel += INTEGER_BLOCK_STEPS * PANEL * 4) {
      const int steps = p.end - begin < INTEGER_BLOCK_STEPS ? p.end - begin : INTEGER_BLOCK_STEPS;
      for (int i = 0; i < rows; ++i) moved[i] = p.rows[first + i] + begin;
      tile_product<true>({moved, rows, panel, PANEL * 4, steps, p.columns, part, PANEL, false, nullptr});
      const bool last = begin + steps == p.end && p.output_scales;
      for (int i = 0; i < rows; ++i) {
        const Ints::Vec start = Ints::set(-block_sum(p.rows[first + i], p.row_steps, begin / INTEGER_BLOCK_STEPS));
        for (int c = 0; c < p.columns; c += 16) {
          float* to = p.out + (first + i) * p.out_stride + c;
          const Ints::Vec whole = Ints::add(Ints::load(part + i * PANEL + c), start);
          Isa::Vec sum = add_block(begin > 0 ? Isa::load(to) : Isa::zero(), whole, scales ? scales + c : nullptr,
                                   p.rows[first + i], p.row_steps, begin / INTEGER_BLOCK_STEPS);
          if (last) sum = Isa::fma(sum, Isa::load(p.output_scales + c), Isa::zero());
          Isa::store(to, sum);
        }
      }
      if (scales) scales += PANEL;
    }
  }
}

#define OPENMIMO_TILE_KERNELS(NAME, TEXT)                                                                       \
  const openmimo::Kernels openmimo::NAME{TEXT,      enter_tiles, leave_tiles, product_in_tiles, integer_product_in_tiles, \
                                         quantize,  attention,   norm,        add,              rotate,                   \
                                         swiglu,    sigmoid_all, argmax}

}  // namespace
