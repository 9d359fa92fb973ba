// All experts of a sparse layer: SwiGLU of the tokens that chose them and the weighted sum per token, and its gradients.
//
// (Token, choice) pairs are counted into expert order; a task takes a block of one expert's rows from the token rows
// through both products, so no copy of the tokens, no padding and no activation but gate and up reaches memory.
//
// Suffixes in comments: N tokens, k choices, M = N * k, E experts, D hidden, F expert width; D and F are multiples of 32.

#include <algorithm>
#include <vector>

#include "matrix.h"

namespace openmimo {
namespace {

struct Sizes {
  int64_t tokens, choices, experts, hidden, width;
  int64_t rows() const { return tokens * choices; }
  int64_t token(int64_t pair) const { return pair / choices; }
};

struct Block {
  int64_t expert, begin, count;
};

std::vector<Block> blocks_of(const int64_t* begins, int64_t experts) {
  std::vector<Block> blocks;
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t row = begins[e]; row < begins[e + 1]; row += ROW_BLOCK)
      blocks.push_back({e, row, std::min(ROW_BLOCK, begins[e + 1] - row)});
  return blocks;
}

// A block's token rows (count x hidden), filled up with zeros to a multiple of 16 rows; returns that number.
int64_t gather(const bf16* x, const int64_t* order, const Sizes& s, const Block& block, bf16* to) {
  const int64_t padded = round_up(block.count, 16);
  for (int64_t i = 0; i < block.count; ++i)
    std::memcpy(to + i * s.hidden, x + s.token(order[block.begin + i]) * s.hidden, s.hidden * sizeof(bf16));
  clear(to + block.count * s.hidden, (padded - block.count) * s.hidden);
  return padded;
}

void store_rows(const float* from, int64_t rows, int64_t width, bf16* to) {
  for (int64_t i = 0; i < rows * width; i += LANES) store_bf16(to + i, load<f32x16>(from + i));
}

// out[n] = sum over choices j of weight[n, j] * rows[place[n, j]]; weights of null are 1.
void sum_choices(const bf16* rows, const int64_t* place, const float* weights, const Sizes& s, int64_t n, bf16* out) {
  for (int64_t i = 0; i < s.hidden; i += LANES) {
    f32x16 sum = {};
    for (int64_t j = n * s.choices; j < (n + 1) * s.choices; ++j)
      sum += load_bf16(rows + place[j] * s.hidden + i) * (weights ? weights[j] : 1.0f);
    store_bf16(out + n * s.hidden + i, sum);
  }
}

// One matrix per expert in panels: (rows x columns) each, as it is (pack_down) or transposed (pack_across).
struct ExpertPanels {
  ExpertPanels(const Sizes& s, int64_t depth_, int64_t columns_)
      : depth(depth_), columns(columns_), each(panel_words(depth, columns)),
        per_expert((columns + PANEL - 1) / PANEL), words(s.experts * each) {}
  void pack(const bf16* weights, int64_t task, bool transposed) {
    const int64_t e = task / per_expert, column = task % per_expert * PANEL;
    const bf16* from = weights + e * depth * columns;
    if (transposed)
      pack_across(from, columns, depth, column, words + e * each);
    else
      pack_down([&](int64_t r) { return from + r * columns; }, depth, columns, column, words + e * each);
  }
  const uint32_t* of(int64_t expert) { return words + expert * each; }
  int64_t depth, columns, each, per_expert;
  Buffer<uint32_t> words;
};

struct BlockScratch {
  explicit BlockScratch(const Sizes& s)
      : tokens(ROW_BLOCK * s.hidden), hidden(ROW_BLOCK * s.width), both(ROW_BLOCK * 2 * s.width),
        wide(ROW_BLOCK * 2 * s.width), result(ROW_BLOCK * s.hidden) {}
  Buffer<bf16> tokens, hidden, both;
  Buffer<float> wide, result;
};

void forward_block(const bf16* x, const int64_t* order, const Sizes& s, const Block& block, ExpertPanels& gate_up_panels,
                   ExpertPanels& down_panels, BlockScratch& w, bf16* gate_up, bf16* rows) {
  const int64_t padded = gather(x, order, s, block, w.tokens);
  panels_product(w.tokens, s.hidden, gate_up_panels.of(block.expert), w.wide, 2 * s.width, padded, 2 * s.width,
                 s.hidden / 2, false);
  clear(w.hidden + block.count * s.width, (padded - block.count) * s.width);
  for (int64_t r = 0; r < block.count; ++r) {
    const float *gates = w.wide + r * 2 * s.width, *ups = gates + s.width;
    bf16* kept = gate_up + (block.begin + r) * 2 * s.width;
    for (int64_t i = 0; i < s.width; i += LANES) {
      const f32x16 gate = rounded(load<f32x16>(gates + i)), up = rounded(load<f32x16>(ups + i));
      store_bf16(kept + i, gate);
      store_bf16(kept + s.width + i, up);
      store_bf16(w.hidden + r * s.width + i, gate * sigmoid(gate) * up);
    }
  }
  panels_product(w.hidden, s.width, down_panels.of(block.expert), w.result, s.hidden, padded, s.hidden, s.width / 2,
                 false);
  store_rows(w.result, block.count, s.hidden, rows + block.begin * s.hidden);
}

// Gradients of a block's rows. Kept for the weights' gradients: grad_gate_up (M, 2F) and the weighted hidden (M, F).
void backward_block(const bf16* grad, const int64_t* order, const float* weights, const bf16* gate_up, const Sizes& s,
                    const Block& block, ExpertPanels& down_panels, ExpertPanels& gate_up_panels, BlockScratch& w,
                    bf16* grad_gate_up, bf16* weighted, bf16* rows, float* grad_weights) {
  const int64_t padded = gather(grad, order, s, block, w.tokens);
  panels_product(w.tokens, s.hidden, down_panels.of(block.expert), w.wide, s.width, padded, s.width, s.hidden / 2,
                 false);
  clear(w.both + block.count * 2 * s.width, (padded - block.count) * 2 * s.width);
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t row = block.begin + r, pair = order[row];
    const bf16* gates = gate_up + row * 2 * s.width;
    bf16* to = w.both + r * 2 * s.width;
    const float weight = weights[pair];
    f32x16 change = {};
    for (int64_t i = 0; i < s.width; i += LANES) {
      const f32x16 gate = load_bf16(gates + i), up = load_bf16(gates + s.width + i), sg = sigmoid(gate);
      const f32x16 value = gate * sg * up, d = load<f32x16>(w.wide + r * s.width + i);
      change += d * value;
      store_bf16(weighted + row * s.width + i, value * weight);
      store_bf16(to + i, d * weight * up * sg * (1.0f + gate * (1.0f - sg)));
      store_bf16(to + s.width + i, d * weight * gate * sg);
    }
    grad_weights[pair] = sum_of(change);
  }
  std::memcpy(grad_gate_up + block.begin * 2 * s.width, w.both, block.count * 2 * s.width * sizeof(bf16));
  panels_product(w.both, 2 * s.width, gate_up_panels.of(block.expert), w.result, s.hidden, padded, s.hidden, s.width,
                 false);
  store_rows(w.result, block.count, s.hidden, rows + block.begin * s.hidden);
}

constexpr int64_t DEPTH_ROWS = 2 * DEPTH_BLOCK;  // rows whose outer products are summed at once

struct WeightScratch {
  WeightScratch(int64_t outputs, int64_t inputs)
      : across(outputs * DEPTH_ROWS), panels(panel_words(DEPTH_ROWS, inputs)),
        sums(outputs * inputs) {}
  Buffer<bf16> across;
  Buffer<uint32_t> panels;
  Buffer<float> sums;
};

// to (outputs x inputs) = sum over an expert's rows of left(row) outer right(row).
template <typename Left, typename Right>
void weight_gradient(const Left& left, const Right& right, int64_t rows, int64_t outputs, int64_t inputs,
                     WeightScratch& w, bf16* to) {
  if (rows == 0) return clear(to, outputs * inputs);
  for (int64_t from = 0; from < rows; from += DEPTH_ROWS) {
    const int64_t count = std::min(DEPTH_ROWS, rows - from), padded = round_up(count, 32);
    transpose_rows([&](int64_t r) { return left(from + r); }, count, outputs, w.across, padded);
    for (int64_t column = 0; column < inputs; column += PANEL)
      pack_down([&](int64_t r) { return right(from + r); }, count, inputs, column, w.panels);
    for (int64_t row = 0; row < outputs; row += ROW_BLOCK)
      panels_product(w.across + row * padded, padded, w.panels, w.sums + row * inputs, inputs,
                     std::min(ROW_BLOCK, outputs - row), inputs, padded / 2, from > 0);
  }
  store_rows(w.sums, outputs, inputs, to);
}

}  // namespace
}  // namespace openmimo

using namespace openmimo;

extern "C" {

// experts (N, k) -> pairs in expert order (M), the place of each pair there (M), where each expert begins (E + 1).
void openmimo_expert_order(const int64_t* experts, int64_t* order, int64_t* place, int64_t* begins, int64_t pairs,
                           int64_t num_experts, int) {
  std::fill(begins, begins + num_experts + 1, 0);
  for (int64_t i = 0; i < pairs; ++i) ++begins[experts[i] + 1];
  for (int64_t e = 0; e < num_experts; ++e) begins[e + 1] += begins[e];
  std::vector<int64_t> next(begins, begins + num_experts);
  for (int64_t i = 0; i < pairs; ++i) order[place[i] = next[experts[i]]++] = i;
}

// x (N, D), gate_up_weight (E, 2F, D), down_weight (E, D, F), weights (N, k)
//   -> gate_up (M, 2F) for the backward pass, rows (M, D) as room to work, out (N, D).
void openmimo_experts_forward(const bf16* x, const int64_t* order, const int64_t* place, const int64_t* begins,
                              const float* weights, const bf16* gate_up_weight, const bf16* down_weight, bf16* gate_up,
                              bf16* rows, bf16* out, int64_t tokens, int64_t choices, int64_t experts, int64_t hidden,
                              int64_t width, int threads) {
  const Sizes s{tokens, choices, experts, hidden, width};
  const std::vector<Block> blocks = blocks_of(begins, experts);
  ExpertPanels gate_up_panels(s, hidden, 2 * width), down_panels(s, width, hidden);
#pragma omp parallel num_threads(threads)
  {
    const TileScope tiles;
    BlockScratch scratch(s);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < experts * gate_up_panels.per_expert; ++i) gate_up_panels.pack(gate_up_weight, i, true);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < experts * down_panels.per_expert; ++i) down_panels.pack(down_weight, i, true);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < blocks.size(); ++i)
      forward_block(x, order, s, blocks[i], gate_up_panels, down_panels, scratch, gate_up, rows);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < tokens; ++n) sum_choices(rows, place, weights, s, n, out);
  }
}

// The forward pass's tensors and grad (N, D) -> grad_x (N, D), grad_weights (N, k), both weights' gradients;
// grad_gate_up (M, 2F), weighted (M, F) and rows (M, D) are room to work.
void openmimo_experts_backward(const bf16* x, const int64_t* order, const int64_t* place, const int64_t* begins,
                               const float* weights, const bf16* gate_up_weight, const bf16* down_weight,
                               const bf16* gate_up, const bf16* grad, bf16* grad_gate_up, bf16* weighted, bf16* rows,
                               bf16* grad_x, float* grad_weights, bf16* grad_gate_up_weight, bf16* grad_down_weight,
                               int64_t tokens, int64_t choices, int64_t experts, int64_t hidden, int64_t width,
                               int threads) {
  const Sizes s{tokens, choices, experts, hidden, width};
  const std::vector<Block> blocks = blocks_of(begins, experts);
  ExpertPanels down_panels(s, hidden, width), gate_up_panels(s, 2 * width, hidden);
#pragma omp parallel num_threads(threads)
  {
    const TileScope tiles;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < experts * down_panels.per_expert; ++i) down_panels.pack(down_weight, i, false);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < experts * gate_up_panels.per_expert; ++i) gate_up_panels.pack(gate_up_weight, i, false);
    {
      BlockScratch scratch(s);
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < blocks.size(); ++i)
        backward_block(grad, order, weights, gate_up, s, blocks[i], down_panels, gate_up_panels, scratch, grad_gate_up,
                       weighted, rows, grad_weights);
    }
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < tokens; ++n) sum_choices(rows, place, nullptr, s, n, grad_x);
    WeightScratch scratch(std::max(hidden, 2 * width), std::max(hidden, width));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < 2 * experts; ++task) {
      const int64_t e = task / 2, begin = begins[e], count = begins[e + 1] - begin;
      const auto token_row = [&](const bf16* of) {
        return [=](int64_t r) { return of + s.token(order[begin + r]) * hidden; };
      };
      if (task % 2 == 0)
        weight_gradient([&](int64_t r) { return grad_gate_up + (begin + r) * 2 * width; }, token_row(x), count,
                        2 * width, hidden, scratch, grad_gate_up_weight + e * 2 * width * hidden);
      else
        weight_gradient(token_row(grad), [&](int64_t r) { return weighted + (begin + r) * width; }, count, hidden,
                        width, scratch, grad_down_weight + e * hidden * width);
    }
  }
}

}  // extern "C"
