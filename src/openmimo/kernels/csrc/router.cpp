// The router in fp32: sigmoid scores, the choice of experts, their weights, and the gradients.
//
// Suffixes in comments: N tokens, D hidden (a multiple of 16), E experts, k choices.

#include <vector>

#include "vector.h"

namespace openmimo {
namespace {

constexpr int64_t TOKENS = 8;  // tokens that share each load of the weights

struct Sizes {
  int64_t tokens, hidden, experts, choices, normalize;
  float scaling;
};

void unpack(const bf16* x, const Sizes& s, int64_t begin, int64_t count, float* to) {
  for (int64_t t = 0; t < TOKENS; ++t)
    for (int64_t i = 0; i < s.hidden; i += LANES)
      store(to + t * s.hidden + i, t < count ? load_bf16(x + (begin + t) * s.hidden + i) : f32x16{});
}

// The experts with the greatest score + bias, in falling order; the first of equal ones. Nothing is above a nan.
void choose(const float* scores, const float* bias, const Sizes& s, float* left, int64_t* chosen) {
  for (int64_t e = 0; e < s.experts; ++e) left[e] = scores[e] + bias[e];
  std::vector<bool> taken(s.experts, false);
  for (int64_t j = 0; j < s.choices; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < s.experts; ++e)
      if (!taken[e] && (best < 0 || left[e] > left[best])) best = e;
    chosen[j] = best;
    taken[best] = true;
  }
}

float total_of(const float* scores, const int64_t* chosen, const Sizes& s) {
  if (!s.normalize) return 1.0f;
  float total = 1e-20f;
  for (int64_t j = 0; j < s.choices; ++j) total += scores[chosen[j]];
  return total;
}

// Gradient of a token's logits from those of its scores (or null) and of its weights (or null).
void logit_gradient(const float* scores, const int64_t* chosen, const float* grad_scores, const float* grad_weights,
                    const Sizes& s, float* to) {
  for (int64_t e = 0; e < s.experts; ++e) to[e] = grad_scores ? grad_scores[e] : 0.0f;
  if (grad_weights) {
    const float total = total_of(scores, chosen, s);
    float mean = 0.0f;
    if (s.normalize)
      for (int64_t j = 0; j < s.choices; ++j) mean += grad_weights[j] * scores[chosen[j]] / total;
    for (int64_t j = 0; j < s.choices; ++j) to[chosen[j]] += s.scaling * (grad_weights[j] - mean) / total;
  }
  for (int64_t e = 0; e < s.experts; ++e) to[e] *= scores[e] * (1.0f - scores[e]);
}

}  // namespace
}  // namespace openmimo

using namespace openmimo;

extern "C" {

// x (N, D), weight (E, D), bias (E), replay (N, k) or null -> scores (N, E), experts (N, k), weights (N, k).
void openmimo_router_forward(const bf16* x, const float* weight, const float* bias, const int64_t* replay,
                             float* scores, int64_t* experts, float* weights, int64_t tokens, int64_t hidden,
                             int64_t num_experts, int64_t choices, int64_t normalize, float scaling, int threads) {
  const Sizes s{tokens, hidden, num_experts, choices, normalize, scaling};
  const int64_t padded = round_up(num_experts, LANES);
  Buffer<float> across(hidden * padded);
  for (int64_t d = 0; d < hidden; ++d)
    for (int64_t e = 0; e < padded; ++e) across[d * padded + e] = e < num_experts ? weight[e * hidden + d] : 0.0f;
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> rows(TOKENS * hidden), sums(TOKENS * padded), left(num_experts);
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < tokens; begin += TOKENS) {
      const int64_t count = std::min(TOKENS, tokens - begin);
      unpack(x, s, begin, count, rows);
      for (int64_t e = 0; e < padded; e += LANES) {
        f32x16 sum[TOKENS] = {};
        for (int64_t d = 0; d < hidden; ++d) {
          const f32x16 w = load<f32x16>(across + d * padded + e);
          for (int64_t t = 0; t < TOKENS; ++t) sum[t] += rows[t * hidden + d] * w;
        }
        for (int64_t t = 0; t < TOKENS; ++t) store(sums + t * padded + e, sigmoid(sum[t]));
      }
      for (int64_t n = begin; n < begin + count; ++n) {
        float* own = scores + n * num_experts;
        std::memcpy(own, sums + (n - begin) * padded, num_experts * sizeof(float));
        int64_t* chosen = experts + n * choices;
        if (replay)
          std::memcpy(chosen, replay + n * choices, choices * sizeof(int64_t));
        else
          choose(own, bias, s, left, chosen);
        const float total = total_of(own, chosen, s);
        for (int64_t j = 0; j < choices; ++j) weights[n * choices + j] = own[chosen[j]] / total * scaling;
      }
    }
  }
}

// -> grad_x (N, D), grad_weight (slices, E, D): one per slice of `slice_rows` tokens, a multiple of TOKENS, so that the
// total does not depend on the threads.
void openmimo_router_backward(const bf16* x, const float* weight, const float* scores, const int64_t* experts,
                              const float* grad_scores, const float* grad_weights, bf16* grad_x, float* grad_weight,
                              int64_t tokens, int64_t hidden, int64_t num_experts, int64_t choices, int64_t normalize,
                              float scaling, int64_t slice_rows, int threads) {
  const Sizes s{tokens, hidden, num_experts, choices, normalize, scaling};
  const int64_t slices = (tokens + slice_rows - 1) / slice_rows;
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> rows(TOKENS * hidden), logits(TOKENS * num_experts);
#pragma omp for schedule(static)
    for (int64_t slice = 0; slice < slices; ++slice) {
      float* total = grad_weight + slice * num_experts * hidden;
      std::memset(total, 0, num_experts * hidden * sizeof(float));
      for (int64_t begin = slice * slice_rows; begin < std::min(tokens, (slice + 1) * slice_rows); begin += TOKENS) {
        const int64_t count = std::min(TOKENS, tokens - begin);
        unpack(x, s, begin, count, rows);
        std::memset(logits, 0, TOKENS * num_experts * sizeof(float));
        for (int64_t t = 0; t < count; ++t) {
          const int64_t n = begin + t;
          logit_gradient(scores + n * num_experts, experts + n * choices,
                         grad_scores ? grad_scores + n * num_experts : nullptr,
                         grad_weights ? grad_weights + n * choices : nullptr, s, logits + t * num_experts);
        }
        for (int64_t i = 0; i < hidden; i += LANES) {
          f32x16 sum[TOKENS] = {}, own[TOKENS];
          for (int64_t t = 0; t < TOKENS; ++t) own[t] = load<f32x16>(rows + t * hidden + i);
          for (int64_t e = 0; e < num_experts; ++e) {
            const f32x16 w = load<f32x16>(weight + e * hidden + i);
            f32x16 outer = load<f32x16>(total + e * hidden + i);
            for (int64_t t = 0; t < TOKENS; ++t) {
              const float change = logits[t * num_experts + e];
              sum[t] += change * w;
              outer += change * own[t];
            }
            store(total + e * hidden + i, outer);
          }
          for (int64_t t = 0; t < count; ++t) store_bf16(grad_x + (begin + t) * hidden + i, sum[t]);
        }
      }
    }
  }
}

}  // extern "C"
