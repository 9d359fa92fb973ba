// C (rows x columns, fp32) [+]= A (rows x 2 depth, bf16) * B (depth x columns, pairs of bf16), on packed operands.
//
// A pair holds two neighbouring rows of B in one word, which is what both AVX-512 BF16 and AMX multiply.
// Rows and columns are multiples of 16; 2 * depth is a multiple of DEPTH_STEP, filled up with zeros.
#pragma once

#include "amx.h"
#include "vector.h"

namespace openmimo {

#ifdef OPENMIMO_AMX
constexpr int64_t DEPTH_STEP = 32;
#else
constexpr int64_t DEPTH_STEP = 16;
#endif

#ifdef OPENMIMO_FMA

// Without instructions for bf16 its numbers become floats: those of B by a shift or a mask where they are multiplied,
// those of A once for all columns.
#ifdef OPENMIMO_AVX512
using Register = f32x16;
using Words = u32x16;
constexpr int COLUMN_REGISTERS = 4;
// By name: the compiler would sum two products first where it may reorder.
inline Register fma(Register a, Register b, Register c) {
  return (Register)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#else
using Register = f32x8;
using Words = u32x8;
constexpr int COLUMN_REGISTERS = 2;
inline Register fma(Register a, Register b, Register c) {
  return (Register)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#endif
constexpr int REGISTER_LANES = sizeof(Register) / sizeof(float);
constexpr int64_t SPLIT_DEPTH = 256;  // pairs of A that are floats at a time: six rows of them stay in the L1 cache
constexpr int64_t SPLIT_STRIDE = 2 * SPLIT_DEPTH + 16;

// MR rows of floats times NV registers of columns; the sums and what is multiplied fill the registers.
template <int MR, int NV>
inline void split_block(const float* a, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                        bool accumulate) {
  Register sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      sum[i][j] = accumulate ? load<Register>(c + i * ldc + REGISTER_LANES * j) : Register{};
  const auto multiply = [&](const float* rows, const Register* columns) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Register row = Register{} + rows[i * SPLIT_STRIDE];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] = fma(row, columns[j], sum[i][j]);
    }
  };
  for (int64_t p = 0; p < depth; ++p, a += 2, b += ldb) {
    Register columns[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) columns[j] = (Register)(load<Words>(b + REGISTER_LANES * j) << 16);
    multiply(a, columns);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) columns[j] = (Register)(load<Words>(b + REGISTER_LANES * j) & 0xffff0000u);
    multiply(a + 1, columns);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(c + i * ldc + REGISTER_LANES * j, sum[i][j]);
}

template <int MR>
inline void split_product(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                          int64_t columns, int64_t depth, bool accumulate) {
  constexpr int64_t STEP = COLUMN_REGISTERS * REGISTER_LANES;
  alignas(64) float rows[MR * SPLIT_STRIDE];
  for (int64_t from = 0; from < depth; from += SPLIT_DEPTH) {
    const int64_t some = std::min(SPLIT_DEPTH, depth - from);
    for (int i = 0; i < MR; ++i)
      for (int64_t p = 0; p < 2 * some; p += LANES)
        store(rows + i * SPLIT_STRIDE + p, load_bf16(a + i * lda + 2 * from + p));
    const bool later = accumulate || from > 0;
    const uint32_t* words = b + from * ldb;
    int64_t column = 0;
    for (; column + STEP <= columns; column += STEP)
      split_block<MR, COLUMN_REGISTERS>(rows, words + column, ldb, c + column, ldc, some, later);
    for (; column < columns; column += REGISTER_LANES)
      split_block<MR, 1>(rows, words + column, ldb, c + column, ldc, some, later);
  }
}

inline void plain_product(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                          int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6)
    split_product<6>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, columns, depth, accumulate);
  for (; i + 4 <= rows; i += 4)
    split_product<4>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, columns, depth, accumulate);
  for (; i < rows; i += 2)
    split_product<2>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, columns, depth, accumulate);
}

#else

#ifdef OPENMIMO_BF16_DOT
template <int MR, int NV>
inline void product_block(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                          int64_t depth, bool accumulate) {
  __m512 sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sum[i][j] = accumulate ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
  for (int64_t p = 0; p < depth; ++p) {
    __m512bh columns[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) columns[j] = (__m512bh)_mm512_loadu_si512(b + p * ldb + 16 * j);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(load<int32_t>(a + i * lda + 2 * p));
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, columns[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(c + i * ldc + 16 * j, sum[i][j]);
}
#else
template <int MR, int NV>
inline void product_block(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                          int64_t depth, bool accumulate) {
  f32x16 sum[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) sum[i][j] = accumulate ? load<f32x16>(c + i * ldc + 16 * j) : f32x16{};
  for (int64_t p = 0; p < depth; ++p)
    for (int j = 0; j < NV; ++j) {
      const u32x16 two = load<u32x16>(b + p * ldb + 16 * j);
      const f32x16 low = (f32x16)(two << 16), high = (f32x16)(two & 0xffff0000u);
      for (int i = 0; i < MR; ++i)
        sum[i][j] += to_float(a[i * lda + 2 * p]) * low + to_float(a[i * lda + 2 * p + 1]) * high;
    }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) store(c + i * ldc + 16 * j, sum[i][j]);
}
#endif

// One panel of 16 * NV columns. MR rows at a time keep MR * NV sums in registers.
template <int NV>
inline void product_columns(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                            int64_t rows, int64_t depth, bool accumulate) {
  constexpr int MR = NV == 4 ? 6 : 8;
  int64_t i = 0;
  for (; i + MR <= rows; i += MR)
    product_block<MR, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, accumulate);
  for (; i + 4 <= rows; i += 4)
    product_block<4, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, accumulate);
  for (; i < rows; i += 2)
    product_block<2, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, accumulate);
}

inline void plain_product(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                          int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  for (; columns >= 64; b += 64, c += 64, columns -= 64)
    product_columns<4>(a, lda, b, ldb, c, ldc, rows, depth, accumulate);
  if (columns == 48) product_columns<3>(a, lda, b, ldb, c, ldc, rows, depth, accumulate);
  if (columns == 32) product_columns<2>(a, lda, b, ldb, c, ldc, rows, depth, accumulate);
  if (columns == 16) product_columns<1>(a, lda, b, ldb, c, ldc, rows, depth, accumulate);
}

#endif

#ifdef OPENMIMO_AMX

// Whether the system granted the tiles; asked once.
inline bool tiles_granted() {
  static const bool granted = request_tiles();
  return granted;
}

// All eight tiles as 16 rows of 64 bytes, for one thread, as long as this lives.
struct TileScope {
  TileScope() {
    if (!tiles_granted()) return;
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.rows[i] = 16, config.column_bytes[i] = 64;
    tile_load_config(config);
  }
  ~TileScope() {
    if (tiles_granted()) tile_release();
  }
};

template <int C>
inline void tile_begin(const float* c, int64_t ldc, bool accumulate) {
  if (accumulate)
    tile_load<C>(c, ldc * 4);
  else
    tile_zero<C>();
}

// Tiles 0 to 3 are a square of C, 4 and 5 rows of A, 6 and 7 columns of B.
template <bool TWO_ROWS, bool TWO_COLUMNS>
inline void tile_block(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                       int64_t depth, bool accumulate) {
  tile_begin<0>(c, ldc, accumulate);
  if constexpr (TWO_COLUMNS) tile_begin<1>(c + 16, ldc, accumulate);
  if constexpr (TWO_ROWS) tile_begin<2>(c + 16 * ldc, ldc, accumulate);
  if constexpr (TWO_ROWS && TWO_COLUMNS) tile_begin<3>(c + 16 * ldc + 16, ldc, accumulate);
  for (int64_t p = 0; p < depth; p += 16) {
    tile_load<4>(a + 2 * p, lda * 2);
    tile_load<6>(b + p * ldb, ldb * 4);
    tile_dot<0, 4, 6>();
    if constexpr (TWO_COLUMNS) tile_load<7>(b + p * ldb + 16, ldb * 4), tile_dot<1, 4, 7>();
    if constexpr (TWO_ROWS) tile_load<5>(a + 16 * lda + 2 * p, lda * 2), tile_dot<2, 5, 6>();
    if constexpr (TWO_ROWS && TWO_COLUMNS) tile_dot<3, 5, 7>();
  }
  tile_store<0>(c, ldc * 4);
  if constexpr (TWO_COLUMNS) tile_store<1>(c + 16, ldc * 4);
  if constexpr (TWO_ROWS) tile_store<2>(c + 16 * ldc, ldc * 4);
  if constexpr (TWO_ROWS && TWO_COLUMNS) tile_store<3>(c + 16 * ldc + 16, ldc * 4);
}

inline void tile_product(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                         int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  for (int64_t j = 0; j < columns; j += 32)
    for (int64_t i = 0; i < rows; i += 32) {
      const auto block = i + 32 <= rows ? (j + 32 <= columns ? tile_block<true, true> : tile_block<true, false>)
                                        : (j + 32 <= columns ? tile_block<false, true> : tile_block<false, false>);
      block(a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, depth, accumulate);
    }
}

#else

struct TileScope {
  TileScope() {}
};

#endif

inline void product(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                    int64_t columns, int64_t depth, bool accumulate) {
#ifdef OPENMIMO_AMX
  if (tiles_granted()) return tile_product(a, lda, b, ldb, c, ldc, rows, columns, depth, accumulate);
#endif
  plain_product(a, lda, b, ldb, c, ldc, rows, columns, depth, accumulate);
}

}  // namespace openmimo
