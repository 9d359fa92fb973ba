// Matrices for product.h: rows into pairs, panels of 64 columns, and products of rows with panels.
#pragma once

#include "product.h"

namespace openmimo {

constexpr int64_t PANEL = 64;       // columns of a panel
constexpr int64_t ROW_BLOCK = 96;   // rows that one task multiplies; a multiple of 16 and of the 6 rows of a register block
constexpr int64_t DEPTH_BLOCK = 256;  // pairs of a panel that are multiplied at once: 64 KiB, which stay in the L2 cache

inline void clear(bf16* from, int64_t count) { std::memset(from, 0, count * sizeof(bf16)); }

// (rows x dim) bf16, rows a multiple of 16 -> (dim / 2 x rows) pairs of neighbouring dims, rows `stride` apart.
inline void pairs_across(const bf16* from, int64_t rows, int64_t dim, uint32_t* to, int64_t stride) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t p = 0; p < dim / 2; p += 16) {
      uint32_t words[16 * 16];
      const bool whole = p + 16 <= dim / 2;
      if (!whole)
        for (int64_t i = 0; i < 16; ++i) std::memcpy(words + 16 * i, from + (r + i) * dim + 2 * p, 2 * (dim - 2 * p));
      uint32_t turned[16 * 16];
      const uint32_t* source = whole ? reinterpret_cast<const uint32_t*>(from + r * dim + 2 * p) : words;
      const int64_t apart = whole ? dim / 2 : 16;
      if (whole) {
        transpose_16(source, apart, to + p * stride + r, stride);
      } else {
        transpose_16(source, apart, turned, 16);
        for (int64_t i = 0; i < dim / 2 - p; ++i) std::memcpy(to + (p + i) * stride + r, turned + 16 * i, 64);
      }
    }
}

// (rows x dim) bf16 -> (rows / 2 x dim) pairs of neighbouring rows.
inline void pairs_down(const bf16* from, int64_t rows, int64_t dim, uint32_t* to) {
  for (int64_t r = 0; r < rows; r += 2) pair_rows(from + r * dim, from + (r + 1) * dim, dim, to + r / 2 * dim);
}

// Rows `row(r)` of `dim` bf16 -> (dim x rows), rows `stride` apart and filled up with zeros to a multiple of 32.
template <typename Row>
inline void transpose_rows(const Row& row, int64_t rows, int64_t dim, bf16* to, int64_t stride) {
  static const bf16 zeros[32] = {};
  alignas(64) uint32_t pairs[16 * 32];
  for (int64_t r = 0; r < rows; r += 32) {
    const bf16* sources[32];
    for (int64_t i = 0; i < 32; ++i) sources[i] = r + i < rows ? row(r + i) : nullptr;
    for (int64_t i = 0; i < dim; i += 32) {
      const int64_t some = std::min<int64_t>(32, dim - i);
      for (int64_t p = 0; p < 16; ++p)
        pair_rows(sources[2 * p] ? sources[2 * p] + i : zeros, sources[2 * p + 1] ? sources[2 * p + 1] + i : zeros,
                  some, pairs + 32 * p);
      for (int64_t half = 0; half < some; half += 16)
        transpose_16(pairs + half, 32, reinterpret_cast<uint32_t*>(to + (i + half) * stride + r), stride / 2);
    }
  }
}

// Words of the panels of a matrix of `rows` (depth) and `columns`.
inline int64_t panel_words(int64_t rows, int64_t columns) {
  return round_up(rows, 32) / 2 * round_up(columns, PANEL);
}

// One panel, from `column` on, of the transpose of a matrix whose rows have `dim` entries: depth is `dim`.
inline void pack_across(const bf16* from, int64_t rows, int64_t dim, int64_t column, uint32_t* panels) {
  pairs_across(from + column * dim, std::min(PANEL, rows - column), dim, panels + column * (dim / 2), PANEL);
}

// One panel of a matrix with rows `row(r)`: depth is the number of rows, filled up with zeros to a multiple of 32.
template <typename Row>
inline void pack_down(const Row& row, int64_t rows, int64_t columns, int64_t column, uint32_t* panels) {
  static const bf16 zeros[PANEL] = {};
  const int64_t pairs = round_up(rows, 32) / 2, width = std::min(PANEL, columns - column);
  uint32_t* to = panels + column * pairs;
  for (int64_t p = 0; p < pairs; ++p) {
    const bf16* low = 2 * p < rows ? row(2 * p) + column : zeros;
    const bf16* high = 2 * p + 1 < rows ? row(2 * p + 1) + column : zeros;
    pair_rows(low, high, width, to + p * PANEL);
  }
}

// C (rows x columns, fp32) = or += A (rows x 2 depth, a multiple of 16 rows) * panels.
inline void panels_product(const bf16* a, int64_t lda, const uint32_t* panels, float* c, int64_t ldc, int64_t rows,
                           int64_t columns, int64_t depth, bool accumulate) {
  for (int64_t from = 0; from < depth; from += DEPTH_BLOCK)
    for (int64_t column = 0; column < columns; column += PANEL)
      product(a + 2 * from, lda, panels + column * depth + from * PANEL, PANEL, c + column, ldc, rows,
              std::min(PANEL, columns - column), std::min(DEPTH_BLOCK, depth - from), accumulate || from > 0);
}

}  // namespace openmimo
