// Products and exponentials in fp32 whose bits depend on their operands alone: not on the number of rows, their place,
// or the processor. `kernels/invariant.py` has the same arithmetic in PyTorch, bit for bit.
//
// So every sum has one order, nothing is contracted to a fused multiply-add, and nothing is reassociated. The other
// files are compiled for speed; this one takes those permissions back, and includes none of their headers, whose
// inline functions the linker could exchange for differently compiled ones.
//
// Suffixes in comments: P rows, D depth, G groups, O outputs.

#if defined(__clang__)
#pragma clang fp contract(off) reassociate(off)
#elif defined(__GNUC__)
#pragma GCC optimize("no-associative-math", "signed-zeros", "fp-contract=off")
#endif

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LANES = 16;
constexpr int ROWS = 4, OUTPUTS = 4;             // sums held in registers at once
constexpr int64_t BLOCK_ROWS = 32, BLOCK_OUTPUTS = 64;  // what one thread takes

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));

inline f32x16 load(const float* from, int64_t count) {
  f32x16 value = {};
  if (count >= LANES)
    std::memcpy(&value, from, sizeof value);
  else
    std::memcpy(&value, from, count * sizeof(float));
  return value;
}

// The lanes in halves: l with l + 8, then l with l + 4, and so on.
inline float sum_of(f32x16 x) {
  const f32x8 eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const f32x4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// y[i][j] = x[i] . w[j]: entry d goes to lane d % LANES, each lane adds up from 0 in rising order, then `sum_of`.
template <int R, int C>
inline void block(const float* x, const float* w, float* y, int64_t depth, int64_t outputs) {
  f32x16 sum[R][C] = {};
  int64_t d = 0;
  for (; d + LANES <= depth; d += LANES) {
    f32x16 columns[C];
    for (int j = 0; j < C; ++j) columns[j] = load(w + j * depth + d, LANES);
    for (int i = 0; i < R; ++i) {
      const f32x16 row = load(x + i * depth + d, LANES);
      for (int j = 0; j < C; ++j) sum[i][j] = sum[i][j] + row * columns[j];
    }
  }
  if (d < depth)
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < C; ++j)
        sum[i][j] = sum[i][j] + load(x + i * depth + d, depth - d) * load(w + j * depth + d, depth - d);
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) y[i * outputs + j] = sum_of(sum[i][j]);
}

template <int R>
inline void row_block(const float* x, const float* w, float* y, int64_t depth, int64_t outputs, int64_t count) {
  int64_t j = 0;
  for (; j + OUTPUTS <= count; j += OUTPUTS) block<R, OUTPUTS>(x, w + j * depth, y + j, depth, outputs);
  for (; j < count; ++j) block<R, 1>(x, w + j * depth, y + j, depth, outputs);
}

// exp(x) for x in [-87, 87], which others are moved to: e^x = 2^n e^r with n the nearest whole number to x / ln 2.
// Source of the polynomial: Cephes, expf. Relative error below 2e-7.
inline f32x16 exponential(f32x16 x) {
  x = x < -87.0f ? f32x16{} - 87.0f : x;
  x = x > 87.0f ? f32x16{} + 87.0f : x;
  const f32x16 n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: no fraction fits beside it
  const f32x16 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  return p * (f32x16)((__builtin_convertvector(n, i32x16) + 127) << 23);
}

}  // namespace

extern "C" {

// x (P, D), w (G, O, D), ends (G) -> y (P, O): the rows from ends[g - 1] to ends[g] times w[g]; others are not written.
void openmimo_invariant_product(const float* x, const float* w, const int64_t* ends, float* y, int64_t groups,
                                int64_t outputs, int64_t depth, int64_t longest, int threads) {
  const int64_t row_blocks = (longest + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int64_t output_blocks = (outputs + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS;
#pragma omp parallel for num_threads(threads) collapse(3) schedule(static)
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t b = 0; b < row_blocks; ++b)
      for (int64_t c = 0; c < output_blocks; ++c) {
        const int64_t begin = (g ? ends[g - 1] : 0) + b * BLOCK_ROWS;
        const int64_t end = begin + BLOCK_ROWS < ends[g] ? begin + BLOCK_ROWS : ends[g];
        const int64_t first = c * BLOCK_OUTPUTS;
        const int64_t count = outputs - first < BLOCK_OUTPUTS ? outputs - first : BLOCK_OUTPUTS;
        const float* weights = w + (g * outputs + first) * depth;
        int64_t i = begin;
        for (; i + ROWS <= end; i += ROWS)
          row_block<ROWS>(x + i * depth, weights, y + i * outputs + first, depth, outputs, count);
        for (; i < end; ++i) row_block<1>(x + i * depth, weights, y + i * outputs + first, depth, outputs, count);
      }
}

// x (size) -> y (size)
void openmimo_invariant_exponential(const float* x, float* y, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < size; i += LANES) {
    const int64_t count = size - i < LANES ? size - i : LANES;
    const f32x16 value = exponential(load(x + i, count));
    std::memcpy(y + i, &value, count * sizeof(float));
  }
}

}  // extern "C"
