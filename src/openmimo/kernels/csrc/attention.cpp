// Causal softmax attention from the joint projection on, forward and backward; see attention.h for the layout.

#include "attention.h"

namespace openmimo {
namespace {

// ---------------------------------------------------------------- forward

struct ForwardScratch {
  explicit ForwardScratch(const Shape& s)
      : keys(s.keys_padded() * s.qk_padded()), values(s.keys_padded() * s.value_padded()),
        values_across(s.keys_padded() * s.value_padded()), q_rows(COLUMNS * s.qk_padded()),
        q_pairs(COLUMNS * s.qk_padded() / 2), p_pairs(KEY_BLOCK * COLUMNS / 2), scores(KEY_BLOCK * COLUMNS),
        sums(COLUMNS * s.value_padded()), rows(COLUMNS * s.value_padded()) {}
  Buffer<bf16> keys, values, values_across, q_rows;
  Buffer<uint32_t> q_pairs, p_pairs;
  Buffer<float> scores, sums, rows;
};

// Softmax so far of every column: greatest score, sum of 2^(score - greatest).
struct Running {
  f32x16 top[VECTORS], total[VECTORS], shrink[VECTORS];
};

// Scores (keys x COLUMNS) -> probabilities up to the normaliser, as pairs of neighbouring keys.
template <bool MASKED>
inline void softmax_block(float* scores, const Tile& tile, int64_t key, int64_t keys, Running& run, uint32_t* pairs) {
  f32x16 best[VECTORS];
  for (int v = 0; v < VECTORS; ++v) best[v] = run.top[v];
  for (int64_t j = 0; j < keys; ++j)
    for (int v = 0; v < VECTORS; ++v) {
      float* at = scores + j * COLUMNS + LANES * v;
      f32x16 score = load<f32x16>(at);
      if constexpr (MASKED) store(at, score = select(tile.visible(key + j, v), score, splat(HIDDEN)));
      best[v] = maximum(best[v], score);
    }
  f32x16 total[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    run.shrink[v] = exp2_of(run.top[v] - best[v]);
    run.top[v] = best[v];
    total[v] = run.total[v] * run.shrink[v];
  }
  for (int64_t j = 0; j < keys; j += 2)
    for (int v = 0; v < VECTORS; ++v) {
      const float* at = scores + j * COLUMNS + LANES * v;
      const f32x16 low = exp2_of(load<f32x16>(at) - best[v]), high = exp2_of(load<f32x16>(at + COLUMNS) - best[v]);
      total[v] += low + high;
      store(pairs + j / 2 * COLUMNS + LANES * v, pair(low, high));
    }
  for (int v = 0; v < VECTORS; ++v) run.total[v] = total[v];
}

// Sums (V x COLUMNS) over the normaliser -> rows of `out` (T, H, V); log2 of the normaliser -> lse (H, T) or null.
void finish_forward(const Shape& s, const Tile& tile, int64_t head, const Running& run, ForwardScratch& w, bf16* out,
                    float* lse) {
  const int64_t V = s.value_padded();
  alignas(64) float top[COLUMNS], total[COLUMNS];
  for (int v = 0; v < VECTORS; ++v) {
    const f32x16 inverse = 1.0f / run.total[v];
    for (int64_t i = 0; i < V; ++i) {
      float* at = w.sums + i * COLUMNS + LANES * v;
      store(at, load<f32x16>(at) * inverse);
    }
    store(top + LANES * v, run.top[v]);
    store(total + LANES * v, run.total[v]);
  }
  for (int64_t i = 0; i < V; i += 16)
    for (int64_t column = 0; column < COLUMNS; column += 16)
      transpose_16(reinterpret_cast<uint32_t*>(w.sums + i * COLUMNS + column), COLUMNS,
                   reinterpret_cast<uint32_t*>(w.rows + column * V + i), V);
  for (int64_t column = 0; column < COLUMNS; ++column) {
    const int64_t i = column % s.tile_tokens(), t = tile.start + i, h = head + column / s.tile_tokens();
    if (i >= tile.count) continue;
    scale_row(w.rows + column * V, s.value, 1.0f, out + (t * s.heads + h) * s.value);
    if (lse) lse[h * s.tokens + t] = top[column] + std::log2(total[column]);
  }
}

void forward_group(const bf16* qkv, const float* cosine, const float* sine, const Sight& sight, const float* sink,
                   const Shape& s, int64_t group, ForwardScratch& w, bf16* out, float* lse) {
  const int64_t K = s.qk_padded(), V = s.value_padded(), all_keys = s.keys_padded();
  pack_keys(qkv, cosine, sine, s, group, w.keys, w.values);
  transpose_rows([&](int64_t r) { return w.values + r * V; }, all_keys, V, w.values_across, all_keys);
  for (int64_t start = 0; start < s.tokens; start += s.tile_tokens()) {
    const Tile tile(sight, start, s);
    for (int64_t head = group * s.per_group(); head < (group + 1) * s.per_group(); head += s.tile_heads()) {
      pack_queries(qkv, cosine, sine, s, tile, head, w.q_rows);
      pairs_across(w.q_rows, COLUMNS, K, w.q_pairs, COLUMNS);
      Running run;
      for (int v = 0; v < VECTORS; ++v) {
        run.top[v] = splat(sink ? sink[head + LANES * v / s.tile_tokens()] * LOG2E : NOTHING_YET);
        run.total[v] = splat(sink ? 1.0f : 0.0f);
      }
      for (int64_t key = tile.begin_key; key < tile.end_key; key += KEY_BLOCK) {
        const int64_t keys = std::min(KEY_BLOCK, tile.end_key - key);
        if (tile.sees_nothing(key, keys)) continue;
        product(w.keys + key * K, K, w.q_pairs, COLUMNS, w.scores, COLUMNS, keys, COLUMNS, K / 2, false);
        const auto softmax = tile.sees_all(key, keys) ? softmax_block<false> : softmax_block<true>;
        softmax(w.scores, tile, key, keys, run, w.p_pairs);
        const bool later = key > tile.begin_key;
        if (later)
          for (int64_t i = 0; i < V; ++i)
            for (int v = 0; v < VECTORS; ++v) {
              float* at = w.sums + i * COLUMNS + LANES * v;
              store(at, load<f32x16>(at) * run.shrink[v]);
            }
        product(w.values_across + key, all_keys, w.p_pairs, COLUMNS, w.sums, COLUMNS, V, COLUMNS, keys / 2, later);
      }
      finish_forward(s, tile, head, run, w, out, lse);
    }
  }
}

// ---------------------------------------------------------------- backward

struct BackwardScratch {
  explicit BackwardScratch(const Shape& s)
      : keys(s.keys_padded() * s.qk_padded()), values(s.keys_padded() * s.value_padded()),
        keys_across(s.keys_padded() * s.qk_padded()), q_rows(COLUMNS * s.qk_padded()),
        g_rows(COLUMNS * s.value_padded()), p_rows(KEY_BLOCK * COLUMNS), d_rows(KEY_BLOCK * COLUMNS),
        q_pairs(COLUMNS * s.qk_padded() / 2), q_down(COLUMNS * s.qk_padded() / 2),
        g_pairs(COLUMNS * s.value_padded() / 2), g_down(COLUMNS * s.value_padded() / 2),
        d_pairs(KEY_BLOCK * COLUMNS / 2), scores(KEY_BLOCK * COLUMNS), changes(KEY_BLOCK * COLUMNS),
        grad_q(COLUMNS * s.qk_padded()), grad_q_rows(COLUMNS * s.qk_padded()),
        grad_k(s.keys_padded() * s.qk_padded()), grad_v(s.keys_padded() * s.value_padded()) {}
  Buffer<bf16> keys, values, keys_across, q_rows, g_rows, p_rows, d_rows;
  Buffer<uint32_t> q_pairs, q_down, g_pairs, g_down, d_pairs;
  Buffer<float> scores, changes, grad_q, grad_q_rows, grad_k, grad_v;
  alignas(64) float lse[COLUMNS], delta[COLUMNS];
};

inline float dot(const bf16* a, const bf16* b, int64_t count) {
  f32x16 sums = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) sums += load_bf16(a + i) * load_bf16(b + i);
  if (i < count) sums += load_bf16_part(a + i, count - i) * load_bf16_part(b + i, count - i);
  return sum_of(sums);
}

// The tile's output gradients as rows, <gradient, output> and log2 of the normaliser per column.
void pack_gradients(const bf16* out, const float* lse, const bf16* grad_out, const float* sink, const Shape& s,
                    const Tile& tile, int64_t head, BackwardScratch& w, float* grad_sink) {
  const int64_t V = s.value_padded();
  for (int64_t column = 0; column < COLUMNS; ++column) {
    const int64_t i = column % s.tile_tokens(), t = tile.start + i, h = head + column / s.tile_tokens();
    bf16* row = w.g_rows + column * V;
    w.lse[column] = w.delta[column] = 0.0f;
    clear(row, V);
    if (i >= tile.count) continue;
    const int64_t at = (t * s.heads + h) * s.value;
    std::memcpy(row, grad_out + at, s.value * sizeof(bf16));
    w.lse[column] = lse[h * s.tokens + t];
    w.delta[column] = dot(grad_out + at, out + at, s.value);
    if (sink) grad_sink[h] -= std::exp2(sink[h] * LOG2E - w.lse[column]) * w.delta[column];
  }
}

// Scores and <gradient, value> (keys x COLUMNS) -> probabilities and score gradients, both as rows, the latter as pairs.
template <bool MASKED>
inline void gradient_block(const Tile& tile, int64_t key, int64_t keys, BackwardScratch& w) {
  f32x16 lse[VECTORS], delta[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    lse[v] = load<f32x16>(w.lse + LANES * v);
    delta[v] = load<f32x16>(w.delta + LANES * v);
  }
  for (int64_t j = 0; j < keys; j += 2)
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = j * COLUMNS + LANES * v;
      f32x16 d[2];
      for (int i = 0; i < 2; ++i) {
        f32x16 p = exp2_of(load<f32x16>(w.scores + at + i * COLUMNS) - lse[v]);
        if constexpr (MASKED) p = select(tile.visible(key + j + i, v), p, splat(0.0f));
        d[i] = p * (load<f32x16>(w.changes + at + i * COLUMNS) - delta[v]);
        store_bf16(w.p_rows + at + i * COLUMNS, p);
        store_bf16(w.d_rows + at + i * COLUMNS, d[i]);
      }
      store(w.d_pairs + j / 2 * COLUMNS + LANES * v, pair(d[0], d[1]));
    }
}

void finish_queries(const float* cosine, const float* sine, const Shape& s, const Tile& tile, int64_t head,
                    BackwardScratch& w, bf16* grad_qkv) {
  const int64_t K = s.qk_padded();
  for (int64_t i = 0; i < K; i += 16)
    for (int64_t column = 0; column < COLUMNS; column += 16)
      transpose_16(reinterpret_cast<uint32_t*>(w.grad_q + i * COLUMNS + column), COLUMNS,
                   reinterpret_cast<uint32_t*>(w.grad_q_rows + column * K + i), K);
  for (int64_t column = 0; column < COLUMNS; ++column) {
    const int64_t i = column % s.tile_tokens(), t = tile.start + i, h = head + column / s.tile_tokens();
    if (i >= tile.count) continue;
    rotate_row(w.grad_q_rows + column * K, cosine + t * s.half, sine + t * s.half, s, -1.0f, s.score_scale,
               grad_qkv + t * s.width() + h * s.qk);
  }
}

void backward_group(const bf16* qkv, const float* cosine, const float* sine, const Sight& sight, const float* sink,
                    const bf16* out, const float* lse, const bf16* grad_out, const Shape& s,
                    int64_t group, BackwardScratch& w, bf16* grad_qkv, float* grad_sink) {
  const int64_t K = s.qk_padded(), V = s.value_padded(), all_keys = s.keys_padded();
  pack_keys(qkv, cosine, sine, s, group, w.keys, w.values);
  transpose_rows([&](int64_t r) { return w.keys + r * K; }, all_keys, K, w.keys_across, all_keys);
  std::memset(w.grad_k, 0, all_keys * K * sizeof(float));
  std::memset(w.grad_v, 0, all_keys * V * sizeof(float));
  std::fill(grad_sink + group * s.per_group(), grad_sink + (group + 1) * s.per_group(), 0.0f);
  for (int64_t start = 0; start < s.tokens; start += s.tile_tokens()) {
    const Tile tile(sight, start, s);
    for (int64_t head = group * s.per_group(); head < (group + 1) * s.per_group(); head += s.tile_heads()) {
      pack_queries(qkv, cosine, sine, s, tile, head, w.q_rows);
      pack_gradients(out, lse, grad_out, sink, s, tile, head, w, grad_sink);
      pairs_across(w.q_rows, COLUMNS, K, w.q_pairs, COLUMNS);
      pairs_across(w.g_rows, COLUMNS, V, w.g_pairs, COLUMNS);
      pairs_down(w.q_rows, COLUMNS, K, w.q_down);
      pairs_down(w.g_rows, COLUMNS, V, w.g_down);
      for (int64_t key = tile.begin_key; key < tile.end_key; key += KEY_BLOCK) {
        const int64_t keys = std::min(KEY_BLOCK, tile.end_key - key);
        if (tile.sees_nothing(key, keys)) continue;
        product(w.keys + key * K, K, w.q_pairs, COLUMNS, w.scores, COLUMNS, keys, COLUMNS, K / 2, false);
        product(w.values + key * V, V, w.g_pairs, COLUMNS, w.changes, COLUMNS, keys, COLUMNS, V / 2, false);
        const auto gradient = tile.sees_all(key, keys) ? gradient_block<false> : gradient_block<true>;
        gradient(tile, key, keys, w);
        product(w.p_rows, COLUMNS, w.g_down, V, w.grad_v + key * V, V, keys, V, COLUMNS / 2, true);
        product(w.d_rows, COLUMNS, w.q_down, K, w.grad_k + key * K, K, keys, K, COLUMNS / 2, true);
        product(w.keys_across + key, all_keys, w.d_pairs, COLUMNS, w.grad_q, COLUMNS, K, COLUMNS, keys / 2,
                key > tile.begin_key);
      }
      finish_queries(cosine, sine, s, tile, head, w, grad_qkv);
    }
  }
  for (int64_t t = 0; t < s.tokens; ++t) {
    bf16* to = grad_qkv + t * s.width() + s.heads * s.qk + group * s.qk;
    rotate_row(w.grad_k + t * K, cosine + t * s.half, sine + t * s.half, s, -1.0f, LN2, to);
    to = grad_qkv + t * s.width() + (s.heads + s.groups) * s.qk + group * s.value;
    scale_row(w.grad_v + t * V, s.value, s.value_scale, to);
  }
}

}  // namespace
}  // namespace openmimo

using namespace openmimo;

extern "C" {

// What multiplies matrices: 0 plain loops, 1 AVX-512 BF16, 2 AMX, 3 floats by AVX2 or AVX-512.
int openmimo_product_kind() {
#ifdef OPENMIMO_AMX
  if (tiles_granted()) return 2;
#endif
#if defined(OPENMIMO_BF16_DOT)
  return 1;
#elif defined(OPENMIMO_FMA)
  return 3;
#else
  return 0;
#endif
}

// qkv (B, T, H*K + G*K + G*V) before rotation; tables (B, T, half); first_key (B, T): first visible key of each query,
// counted in its row; holes (B, T, 2) or null: keys from begin to before end that it does not see, after its first;
// sink (H) or null -> out (B, T, H, V), lse (B, H, T) or null: log2 of the normaliser.
void openmimo_attention_forward(const bf16* qkv, const float* cosine, const float* sine, const int32_t* first_key,
                                const int32_t* holes, const float* sink, bf16* out, float* lse, int64_t batch,
                                int64_t tokens, int64_t heads, int64_t groups, int64_t qk, int64_t value, int64_t half,
                                float score_scale, float value_scale, int threads) {
  const Sight sight{first_key, holes};
  const Shape s{batch, tokens, heads, groups, qk, value, half, score_scale, value_scale};
#pragma omp parallel num_threads(threads)
  {
    const TileScope tiles;
    ForwardScratch scratch(s);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < batch * groups; ++task) {
      const int64_t b = task / groups, at = b * tokens;
      forward_group(qkv + at * s.width(), cosine + at * half, sine + at * half, sight.from(at), sink, s,
                    task % groups, scratch, out + at * heads * value, lse ? lse + at * heads : nullptr);
    }
  }
}

// grad_sink (B, H): one row per sequence, so that the sum does not depend on the threads.
void openmimo_attention_backward(const bf16* qkv, const float* cosine, const float* sine, const int32_t* first_key,
                                 const int32_t* holes, const float* sink, const bf16* out, const float* lse,
                                 const bf16* grad_out, bf16* grad_qkv, float* grad_sink, int64_t batch, int64_t tokens,
                                 int64_t heads, int64_t groups, int64_t qk, int64_t value, int64_t half,
                                 float score_scale, float value_scale, int threads) {
  const Sight sight{first_key, holes};
  const Shape s{batch, tokens, heads, groups, qk, value, half, score_scale, value_scale};
#pragma omp parallel num_threads(threads)
  {
    const TileScope tiles;
    BackwardScratch scratch(s);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < batch * groups; ++task) {
      const int64_t b = task / groups, at = b * tokens;
      backward_group(qkv + at * s.width(), cosine + at * half, sine + at * half, sight.from(at), sink,
                     out + at * heads * value, lse + at * heads, grad_out + at * heads * value, s, task % groups,
                     scratch, grad_qkv + at * s.width(), grad_sink + b * heads);
    }
  }
}

}  // extern "C"
