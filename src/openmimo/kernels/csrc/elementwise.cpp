// The element-wise steps of training, each in one pass: bf16 in memory, fp32 in registers.
//
// Suffixes in comments: N rows, D columns, F expert width, V vocabulary. Rows may have any length: whole registers first,
// then one that is filled up.

#include "vector.h"

namespace openmimo {
namespace {

// Calls body(offset, count) for pieces of up to LANES columns.
template <typename Body>
inline void for_pieces(int64_t columns, const Body& body) {
  int64_t i = 0;
  for (; i + LANES <= columns; i += LANES) body(i, int64_t{LANES});
  if (i < columns) body(i, columns - i);
}

inline f32x16 read(const bf16* from, int64_t count) {
  return count == LANES ? load_bf16(from) : load_bf16_part(from, count);
}

inline void write(bf16* to, f32x16 x, int64_t count) {
  if (count == LANES) return store_bf16(to, x);
  store_bf16_part(to, x, count);
}

}  // namespace
}  // namespace openmimo

using namespace openmimo;

extern "C" {

// x (N, D), added (N, D) or null: s = x + added as bf16, kept in `sum` when there is something to add;
// y = bf16(s * r) * weight with r = (mean(s^2) + eps)^-1/2, and r (N) for the backward pass.
void openmimo_norm_forward(const bf16* x, const bf16* added, const bf16* weight, bf16* sum, bf16* y, float* scale,
                           int64_t rows, int64_t dim, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const bf16* from = added ? sum + n * dim : x + n * dim;
    f32x16 squares = {};
    for_pieces(dim, [&](int64_t i, int64_t count) {
      f32x16 s = read(x + n * dim + i, count);
      if (added) {
        s = rounded(s + read(added + n * dim + i, count));
        write(sum + n * dim + i, s, count);
      }
      squares += s * s;
    });
    const float r = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(dim) + eps);
    for_pieces(dim, [&](int64_t i, int64_t count) {
      write(y + n * dim + i, rounded(read(from + i, count) * r) * read(weight + i, count), count);
    });
    scale[n] = r;
  }
}

// `x` is the normalised sum, `grad_sum` its other gradient (N, D) or null. grad_weight (slices, D): one row per slice of
// `slice_rows` rows, so that the total does not depend on the threads.
void openmimo_norm_backward(const bf16* x, const bf16* weight, const float* scale, const bf16* grad,
                            const bf16* grad_sum, bf16* grad_x, float* grad_weight, int64_t rows, int64_t dim,
                            int64_t slice_rows, int threads) {
  const int64_t slices = (rows + slice_rows - 1) / slice_rows, padded = round_up(dim, LANES);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t slice = 0; slice < slices; ++slice) {
    Buffer<float> sums(padded);
    std::fill(sums.data, sums.data + padded, 0.0f);
    for (int64_t n = slice * slice_rows; n < std::min(rows, (slice + 1) * slice_rows); ++n) {
      const bf16 *from = x + n * dim, *g = grad + n * dim;
      const float r = scale[n];
      f32x16 products = {};
      for_pieces(dim, [&](int64_t i, int64_t count) {
        const f32x16 gy = read(g + i, count) * read(from + i, count) * r;
        products += gy * read(weight + i, count);
        store(sums + i, load<f32x16>(sums + i) + gy);
      });
      const float projection = sum_of(products) / static_cast<float>(dim);
      for_pieces(dim, [&](int64_t i, int64_t count) {
        f32x16 dx = (read(g + i, count) * read(weight + i, count) - read(from + i, count) * (r * projection)) * r;
        if (grad_sum) dx += read(grad_sum + n * dim + i, count);
        write(grad_x + n * dim + i, dx, count);
      });
    }
    std::memcpy(grad_weight + slice * dim, sums.data, dim * sizeof(float));
  }
}

// gate_up (N, 2F), gate first -> silu(gate) * up (N, F).
void openmimo_swiglu_forward(const bf16* gate_up, bf16* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const bf16* gate = gate_up + n * 2 * width;
    for_pieces(width, [&](int64_t i, int64_t count) {
      const f32x16 g = read(gate + i, count);
      write(out + n * width + i, g * sigmoid(g) * read(gate + width + i, count), count);
    });
  }
}

void openmimo_swiglu_backward(const bf16* gate_up, const bf16* grad, bf16* grad_gate_up, int64_t rows, int64_t width,
                              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const bf16* gate = gate_up + n * 2 * width;
    bf16* to = grad_gate_up + n * 2 * width;
    for_pieces(width, [&](int64_t i, int64_t count) {
      const f32x16 g = read(gate + i, count), d = read(grad + n * width + i, count), sg = sigmoid(g);
      write(to + i, d * read(gate + width + i, count) * sg * (1.0f + g * (1.0f - sg)), count);
      write(to + width + i, d * g * sg, count);
    });
  }
}

// logits (N, V) become the gradient of weight[n] * -log softmax[target]; loss (N) gets the weighted losses.
void openmimo_cross_entropy(bf16* logits, const int64_t* targets, const float* weights, float* loss, int64_t rows,
                            int64_t vocabulary, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> values(round_up(vocabulary, LANES));
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; ++n) {
      bf16* row = logits + n * vocabulary;
      f32x16 tops = splat(-INFINITY), totals = {};
      float rest = 0.0f;
      int64_t i = 0;
      for (; i + LANES <= vocabulary; i += LANES) tops = maximum(tops, load_bf16(row + i));
      float top = max_of(tops);
      for (; i < vocabulary; ++i) top = std::max(top, to_float(row[i]));
      const float target = to_float(row[targets[n]]);
      for_pieces(vocabulary, [&](int64_t at, int64_t count) {
        const f32x16 e = exp2_of((read(row + at, count) - top) * LOG2E);
        store(values + at, e);
        for (int64_t j = 0; count < LANES && j < count; ++j) rest += values[at + j];
        if (count == LANES) totals += e;
      });
      const float total = sum_of(totals) + rest, factor = weights[n] / total;
      loss[n] = weights[n] * (top + std::log(total) - target);
      for_pieces(vocabulary, [&](int64_t at, int64_t count) {
        write(row + at, load<f32x16>(values + at) * factor, count);
      });
      row[targets[n]] = to_bf16(values[targets[n]] * factor - weights[n]);
    }
  }
}

}  // extern "C"
