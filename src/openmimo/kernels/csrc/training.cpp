// Fused training kernels for CPUs: attention, norm, SwiGLU, expert dispatch, combine and cross-entropy.
//
// Everything is bf16 in memory and fp32 in registers. Matrix products inside the attention use AVX-512 BF16 where the
// compiler was told of it, plain loops elsewhere; both run on the same packed operands. Each function has a twin in
// PyTorch (see kernels/training.py) and is compared with float64 in tests/unit/kernels.
//
// Suffixes in comments: B batch, T tokens, H query heads, G key/value heads, K QK dim, V value dim, N rows, D columns.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#define OPENMIMO_BF16_DOT 1
#endif

namespace {

using bf16 = uint16_t;

inline float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Round to nearest, ties to even, kept in the upper half.
inline uint32_t rounded_bits(float x) {
  const uint32_t bits = bits_of(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

inline bf16 to_bf16(float x) { return static_cast<bf16>(rounded_bits(x) >> 16); }

inline uint32_t pair(float low, float high) { return (rounded_bits(low) >> 16) | (rounded_bits(high) & 0xffff0000u); }

// e^x for x <= 88 with a relative error below 3e-7; 0 below -87. Written so that compilers vectorise it.
inline float fast_exp(float x) {
  const float clamped = std::min(std::max(x, -87.0f), 88.0f);
  const float whole = std::floor(clamped * 1.44269504f + 0.5f);
  const float r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t exponent = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, 4);
  return x < -87.0f ? 0.0f : p * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-std::min(std::max(x, -87.0f), 87.0f))); }

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <typename T>
struct Buffer {  // cleared, 64-byte aligned
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, round_up(std::max<int64_t>(count, 1) * sizeof(T), 64)))) {
    std::memset(data, 0, round_up(std::max<int64_t>(count, 1) * sizeof(T), 64));
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data; }
  T* data;
};

// ---------------------------------------------------------------- products of packed tiles

constexpr int TILE = 64;  // queries and keys per tile

// C (M x 16*NV) [+]= A (M x 2*depth, bf16 rows) * B (depth x 16*NV, bf16 pairs).
#ifdef OPENMIMO_BF16_DOT
template <int MR, int NV>
inline void product_block(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, int depth,
                          bool accumulate) {
  __m512 sum[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) sum[i][j] = accumulate ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
  for (int p = 0; p < depth; ++p) {
    __m512bh columns[NV];
    for (int j = 0; j < NV; ++j) columns[j] = (__m512bh)_mm512_loadu_si512(b + p * ldb + 16 * j);
    for (int i = 0; i < MR; ++i) {
      uint32_t two;
      std::memcpy(&two, a + i * lda + 2 * p, 4);
      const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int>(two));
      for (int j = 0; j < NV; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], row, columns[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(c + i * ldc + 16 * j, sum[i][j]);
}
#else
template <int MR, int NV>
inline void product_block(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, int depth,
                          bool accumulate) {
  float sum[MR][16 * NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 16 * NV; ++j) sum[i][j] = accumulate ? c[i * ldc + j] : 0.0f;
  for (int p = 0; p < depth; ++p)
    for (int i = 0; i < MR; ++i) {
      const float low = to_float(a[i * lda + 2 * p]), high = to_float(a[i * lda + 2 * p + 1]);
      for (int j = 0; j < 16 * NV; ++j) {
        const uint32_t two = b[p * ldb + j];
        sum[i][j] += low * to_float(static_cast<bf16>(two)) + high * to_float(static_cast<bf16>(two >> 16));
      }
    }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 16 * NV; ++j) c[i * ldc + j] = sum[i][j];
}
#endif

template <int NV>
inline void product_columns(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, int rows,
                            int depth, bool accumulate) {
  constexpr int MR = NV >= 4 ? 4 : 8;  // rows are multiples of 16
  for (int i = 0; i < rows; i += MR)
    product_block<MR, NV>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, accumulate);
}

// `rows` and `columns` are multiples of 16.
void product(const bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, int rows, int columns,
             int depth, bool accumulate) {
  while (columns > 0) {
    const int now = std::min(columns, 64);
    if (now == 64) product_columns<4>(a, lda, b, ldb, c, ldc, rows, depth, accumulate);
    if (now == 48) product_columns<3>(a, lda, b, ldb, c, ldc, rows, depth, accumulate);
    if (now == 32) product_columns<2>(a, lda, b, ldb, c, ldc, rows, depth, accumulate);
    if (now == 16) product_columns<1>(a, lda, b, ldb, c, ldc, rows, depth, accumulate);
    b += now, c += now, columns -= now;
  }
}

// ---------------------------------------------------------------- attention

struct Shape {
  int64_t batch, tokens, heads, groups, qk, value, half;  // half: rotated dims / 2
  float score_scale, value_scale;

  int64_t width() const { return heads * qk + groups * (qk + value); }
  int64_t per_group() const { return heads / groups; }
  int64_t qk_padded() const { return round_up(qk, 16); }
  int64_t value_padded() const { return round_up(value, 16); }
  int64_t tiles() const { return (tokens + TILE - 1) / TILE; }
};

// Rotate dims i and i + half by the position's angle; `sign` -1 turns back.
inline void rotated_row(const float* x, float* y, const float* cosine, const float* sine, const Shape& s, float sign) {
  for (int64_t i = 0; i < s.half; ++i) {
    y[i] = x[i] * cosine[i] - sign * x[s.half + i] * sine[i];
    y[s.half + i] = x[s.half + i] * cosine[i] + sign * x[i] * sine[i];
  }
  for (int64_t i = 2 * s.half; i < s.qk; ++i) y[i] = x[i];
}

// One head's tokens, rotated, as bf16 rows of length qk_padded.
void pack_rotated(const bf16* x, int64_t stride, const float* cosine, const float* sine, const Shape& s, int64_t count,
                  bf16* out) {
  float row[1024], turned[1024];
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < s.qk; ++i) row[i] = to_float(x[t * stride + i]);
    rotated_row(row, turned, cosine + t * s.half, sine + t * s.half, s, 1.0f);
    for (int64_t i = 0; i < s.qk; ++i) out[t * s.qk_padded() + i] = to_bf16(turned[i]);
  }
}

// (TILE x dim) rows -> (dim / 2 x TILE) pairs: columns are tokens, a pair is two neighbouring dims.
void pairs_across(const bf16* rows, int64_t dim, uint32_t* out) {
  const int64_t pairs = dim / 2;
  for (int64_t block = 0; block < TILE; block += 16)
    for (int64_t p = 0; p < pairs; ++p) {
      uint32_t column[16];
      for (int64_t t = 0; t < 16; ++t) std::memcpy(&column[t], rows + (block + t) * dim + 2 * p, 4);
      std::memcpy(out + p * TILE + block, column, 64);
    }
}

// (TILE x dim) rows -> (TILE / 2 x dim) pairs: columns are dims, a pair is two neighbouring tokens.
void pairs_down(const bf16* rows, int64_t dim, uint32_t* out) {
  for (int64_t t = 0; t < TILE; t += 2)
    for (int64_t i = 0; i < dim; ++i)
      out[t / 2 * dim + i] = rows[t * dim + i] | static_cast<uint32_t>(rows[(t + 1) * dim + i]) << 16;
}

// (TILE x dim) rows -> (dim x TILE).
void transposed(const bf16* rows, int64_t dim, bf16* out) {
  for (int64_t block = 0; block < dim; block += 16)
    for (int64_t t = 0; t < TILE; ++t)
      for (int64_t i = block; i < block + 16; ++i) out[i * TILE + t] = rows[t * dim + i];
}

// A tile of queries: which keys each may see. Lanes without a query see none.
struct Queries {
  alignas(64) float first[TILE], last[TILE];
  int64_t start, count, first_tile;
  int64_t highest_first;

  Queries(const int32_t* first_key, int64_t start_, int64_t tokens) : start(start_) {
    count = std::min<int64_t>(TILE, tokens - start);
    int64_t lowest = start;
    highest_first = 0;
    for (int64_t i = 0; i < TILE; ++i) {
      const bool real = i < count;
      first[i] = real ? static_cast<float>(first_key[start + i]) : 1e9f;
      last[i] = real ? static_cast<float>(start + i) : -1.0f;
      if (real) lowest = std::min<int64_t>(lowest, first_key[start + i]);
      if (real) highest_first = std::max<int64_t>(highest_first, first_key[start + i]);
    }
    first_tile = lowest / TILE;
  }
  bool sees_all(int64_t tile) const { return tile * TILE + TILE <= start + 1 && tile * TILE >= highest_first && count == TILE; }
};

constexpr float HIDDEN = -1e30f;

// Scale the scores of a tile (keys x queries) and hide what a query may not see.
void scale_and_mask(float* scores, const Queries& q, int64_t tile, float scale) {
  if (q.sees_all(tile)) {
    for (int i = 0; i < TILE * TILE; ++i) scores[i] *= scale;
    return;
  }
  for (int j = 0; j < TILE; ++j) {
    const float key = static_cast<float>(tile * TILE + j);
    float* row = scores + j * TILE;
    for (int i = 0; i < TILE; ++i) row[i] = (key >= q.first[i] && key <= q.last[i]) ? row[i] * scale : HIDDEN;
  }
}

struct Keys {  // one key/value head of one sequence, packed tile by tile
  Keys(const Shape& s) : rows(s.tiles() * TILE * s.qk_padded()), values(s.tiles() * TILE * s.value_padded()) {}
  Buffer<bf16> rows, values;
};

void pack_keys(const bf16* qkv, const float* cosine, const float* sine, const Shape& s, int64_t group, Keys& keys) {
  const bf16* k = qkv + s.heads * s.qk + group * s.qk;
  const bf16* v = qkv + (s.heads + s.groups) * s.qk + group * s.value;
  pack_rotated(k, s.width(), cosine, sine, s, s.tokens, keys.rows);
  for (int64_t t = 0; t < s.tokens; ++t)
    for (int64_t i = 0; i < s.value; ++i)
      keys.values[t * s.value_padded() + i] = to_bf16(to_float(v[t * s.width() + i]) * s.value_scale);
}

void forward_group(const bf16* qkv, const float* cosine, const float* sine, const int32_t* first_key, const float* sink,
                   const Shape& s, int64_t group, bf16* out, float* lse) {
  const int64_t K = s.qk_padded(), V = s.value_padded();
  Keys keys(s);
  pack_keys(qkv, cosine, sine, s, group, keys);
  Buffer<bf16> values_across(s.tiles() * TILE * V), q_rows(TILE * K);
  for (int64_t tile = 0; tile < s.tiles(); ++tile)
    transposed(keys.values + tile * TILE * V, V, values_across + tile * TILE * V);
  Buffer<uint32_t> q_pairs(TILE * K / 2), p_pairs(TILE * TILE / 2);
  Buffer<float> scores(TILE * TILE), sums(TILE * V);
  alignas(64) float top[TILE], total[TILE], shrink[TILE];

  for (int64_t start = 0; start < s.tokens; start += TILE) {
    const Queries q(first_key, start, s.tokens);
    for (int64_t r = 0; r < s.per_group(); ++r) {
      const int64_t head = group * s.per_group() + r;
      std::memset(q_rows, 0, TILE * K * sizeof(bf16));
      pack_rotated(qkv + start * s.width() + head * s.qk, s.width(), cosine + start * s.half, sine + start * s.half, s,
                   q.count, q_rows);
      pairs_across(q_rows, K, q_pairs);
      std::fill(top, top + TILE, sink ? sink[head] : HIDDEN);
      std::fill(total, total + TILE, sink ? 1.0f : 0.0f);
      for (int64_t tile = q.first_tile; tile * TILE <= start; ++tile) {
        product(keys.rows + tile * TILE * K, K, q_pairs, TILE, scores, TILE, TILE, TILE, K / 2, false);
        scale_and_mask(scores, q, tile, s.score_scale);
        alignas(64) float best[TILE];
        for (int i = 0; i < TILE; ++i) best[i] = top[i];
        for (int j = 0; j < TILE; ++j)
          for (int i = 0; i < TILE; ++i) best[i] = std::max(best[i], scores[j * TILE + i]);
        for (int i = 0; i < TILE; ++i) {
          shrink[i] = fast_exp(top[i] - best[i]);
          top[i] = best[i];
          total[i] *= shrink[i];
        }
        for (int j = 0; j < TILE; j += 2) {
          const float* low = scores + j * TILE;
          const float* high = low + TILE;
          uint32_t* pairs = p_pairs + j / 2 * TILE;
          for (int i = 0; i < TILE; ++i) {
            // A lane that has seen nothing yet has top = HIDDEN too, and e^0 must not count.
            const float a = low[i] <= HIDDEN ? 0.0f : fast_exp(low[i] - top[i]);
            const float b = high[i] <= HIDDEN ? 0.0f : fast_exp(high[i] - top[i]);
            total[i] += a + b;
            pairs[i] = pair(a, b);
          }
        }
        const bool later = tile > q.first_tile;
        if (later)
          for (int64_t v = 0; v < V; ++v)
            for (int i = 0; i < TILE; ++i) sums[v * TILE + i] *= shrink[i];
        product(values_across + tile * TILE * V, TILE, p_pairs, TILE, sums, TILE, V, TILE, TILE / 2, later);
      }
      for (int64_t i = 0; i < q.count; ++i) {
        const float inverse = 1.0f / total[i];
        bf16* row = out + (start + i) * s.heads * s.value + head * s.value;
        for (int64_t v = 0; v < s.value; ++v) row[v] = to_bf16(sums[v * TILE + i] * inverse);
        if (lse) lse[head * s.tokens + start + i] = top[i] + std::log(total[i]);
      }
    }
  }
}

void backward_group(const bf16* qkv, const float* cosine, const float* sine, const int32_t* first_key,
                    const float* sink, const bf16* out, const float* lse, const bf16* grad_out, const Shape& s,
                    int64_t group, bf16* grad_qkv, float* grad_sink) {
  const int64_t K = s.qk_padded(), V = s.value_padded();
  Keys keys(s);
  pack_keys(qkv, cosine, sine, s, group, keys);
  Buffer<bf16> keys_across(s.tiles() * TILE * K), q_rows(TILE * K), g_rows(TILE * V);
  for (int64_t tile = 0; tile < s.tiles(); ++tile)
    transposed(keys.rows + tile * TILE * K, K, keys_across + tile * TILE * K);
  Buffer<uint32_t> q_pairs(TILE * K / 2), q_down(TILE * K / 2), g_pairs(TILE * V / 2), g_down(TILE * V / 2);
  Buffer<uint32_t> d_pairs(TILE * TILE / 2);
  Buffer<float> scores(TILE * TILE), changes(TILE * TILE), grad_q(K * TILE);
  Buffer<bf16> p_rows(TILE * TILE), d_rows(TILE * TILE);
  Buffer<float> grad_k(s.tiles() * TILE * K), grad_v(s.tiles() * TILE * V);
  alignas(64) float log_total[TILE], delta[TILE];
  float row[1024], turned[1024];

  for (int64_t r = 0; r < s.per_group(); ++r) grad_sink[group * s.per_group() + r] = 0.0f;
  for (int64_t start = 0; start < s.tokens; start += TILE) {
    const Queries q(first_key, start, s.tokens);
    for (int64_t r = 0; r < s.per_group(); ++r) {
      const int64_t head = group * s.per_group() + r;
      std::memset(q_rows, 0, TILE * K * sizeof(bf16));
      std::memset(g_rows, 0, TILE * V * sizeof(bf16));
      pack_rotated(qkv + start * s.width() + head * s.qk, s.width(), cosine + start * s.half, sine + start * s.half, s,
                   q.count, q_rows);
      for (int64_t i = 0; i < TILE; ++i) {
        log_total[i] = delta[i] = 0.0f;
        if (i >= q.count) continue;
        const int64_t at = (start + i) * s.heads * s.value + head * s.value;
        log_total[i] = lse[head * s.tokens + start + i];
        for (int64_t v = 0; v < s.value; ++v) {
          g_rows[i * V + v] = grad_out[at + v];
          delta[i] += to_float(grad_out[at + v]) * to_float(out[at + v]);
        }
        if (sink) grad_sink[head] -= fast_exp(sink[head] - log_total[i]) * delta[i];
      }
      pairs_across(q_rows, K, q_pairs);
      pairs_down(q_rows, K, q_down);
      pairs_across(g_rows, V, g_pairs);
      pairs_down(g_rows, V, g_down);
      for (int64_t tile = q.first_tile; tile * TILE <= start; ++tile) {
        product(keys.rows + tile * TILE * K, K, q_pairs, TILE, scores, TILE, TILE, TILE, K / 2, false);
        scale_and_mask(scores, q, tile, s.score_scale);
        product(keys.values + tile * TILE * V, V, g_pairs, TILE, changes, TILE, TILE, TILE, V / 2, false);
        for (int j = 0; j < TILE; j += 2) {
          float* p0 = scores + j * TILE;
          float* p1 = p0 + TILE;
          float* d0 = changes + j * TILE;
          float* d1 = d0 + TILE;
          uint32_t* pairs = d_pairs + j / 2 * TILE;
          for (int i = 0; i < TILE; ++i) {
            p0[i] = fast_exp(p0[i] - log_total[i]);
            p1[i] = fast_exp(p1[i] - log_total[i]);
            d0[i] = p0[i] * (d0[i] - delta[i]) * s.score_scale;
            d1[i] = p1[i] * (d1[i] - delta[i]) * s.score_scale;
            pairs[i] = pair(d0[i], d1[i]);
          }
        }
        for (int i = 0; i < TILE * TILE; ++i) p_rows[i] = to_bf16(scores[i]);
        for (int i = 0; i < TILE * TILE; ++i) d_rows[i] = to_bf16(changes[i]);
        product(p_rows, TILE, g_down, V, grad_v + tile * TILE * V, V, TILE, V, TILE / 2, true);
        product(d_rows, TILE, q_down, K, grad_k + tile * TILE * K, K, TILE, K, TILE / 2, true);
        product(keys_across + tile * TILE * K, TILE, d_pairs, TILE, grad_q, TILE, K, TILE, TILE / 2,
                tile > q.first_tile);
      }
      for (int64_t i = 0; i < q.count; ++i) {
        const int64_t t = start + i;
        for (int64_t d = 0; d < s.qk; ++d) row[d] = grad_q[d * TILE + i];
        rotated_row(row, turned, cosine + t * s.half, sine + t * s.half, s, -1.0f);
        bf16* to = grad_qkv + t * s.width() + head * s.qk;
        for (int64_t d = 0; d < s.qk; ++d) to[d] = to_bf16(turned[d]);
      }
    }
  }
  for (int64_t t = 0; t < s.tokens; ++t) {
    bf16* to = grad_qkv + t * s.width() + s.heads * s.qk + group * s.qk;
    rotated_row(grad_k + t * K, turned, cosine + t * s.half, sine + t * s.half, s, -1.0f);
    for (int64_t d = 0; d < s.qk; ++d) to[d] = to_bf16(turned[d]);
    to = grad_qkv + t * s.width() + (s.heads + s.groups) * s.qk + group * s.value;
    for (int64_t v = 0; v < s.value; ++v) to[v] = to_bf16(grad_v[t * V + v] * s.value_scale);
  }
}

}  // namespace

extern "C" {

int openmimo_training_abi() { return 1; }

// 1 when the matrix products use bf16 dot instructions.
int openmimo_has_bf16_dot() {
#ifdef OPENMIMO_BF16_DOT
  return 1;
#else
  return 0;
#endif
}

// qkv (B, T, H*K + G*K + G*V) before rotation; tables (B, T, half); first_key (B, T): first visible key of each query,
// counted in its row; sink (H) or null -> out (B, T, H, V), lse (B, H, T) or null.
void openmimo_attention_forward(const bf16* qkv, const float* cosine, const float* sine, const int32_t* first_key,
                                const float* sink, bf16* out, float* lse, int64_t batch, int64_t tokens, int64_t heads,
                                int64_t groups, int64_t qk, int64_t value, int64_t half, float score_scale,
                                float value_scale, int threads) {
  const Shape s{batch, tokens, heads, groups, qk, value, half, score_scale, value_scale};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < batch * groups; ++task) {
    const int64_t b = task / groups, at = b * tokens;
    forward_group(qkv + at * s.width(), cosine + at * half, sine + at * half, first_key + at, sink, s, task % groups,
                  out + at * heads * value, lse ? lse + at * heads : nullptr);
  }
}

// grad_sink (B, H): one row per sequence, so that the sum does not depend on the threads.
void openmimo_attention_backward(const bf16* qkv, const float* cosine, const float* sine, const int32_t* first_key,
                                 const float* sink, const bf16* out, const float* lse, const bf16* grad_out,
                                 bf16* grad_qkv, float* grad_sink, int64_t batch, int64_t tokens, int64_t heads,
                                 int64_t groups, int64_t qk, int64_t value, int64_t half, float score_scale,
                                 float value_scale, int threads) {
  const Shape s{batch, tokens, heads, groups, qk, value, half, score_scale, value_scale};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < batch * groups; ++task) {
    const int64_t b = task / groups, at = b * tokens;
    backward_group(qkv + at * s.width(), cosine + at * half, sine + at * half, first_key + at, sink,
                   out + at * heads * value, lse + at * heads, grad_out + at * heads * value, s, task % groups,
                   grad_qkv + at * s.width(), grad_sink + b * heads);
  }
}

// y = bf16(x * r) * weight with r = (mean(x^2) + eps)^-1/2; keeps r (N) for the backward pass.
void openmimo_norm_forward(const bf16* x, const bf16* weight, bf16* y, float* scale, int64_t rows, int64_t dim,
                           float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const bf16* from = x + n * dim;
    float sum = 0.0f;
    for (int64_t i = 0; i < dim; ++i) sum += to_float(from[i]) * to_float(from[i]);
    const float r = 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
    for (int64_t i = 0; i < dim; ++i)
      y[n * dim + i] = to_bf16(to_float(to_bf16(to_float(from[i]) * r)) * to_float(weight[i]));
    scale[n] = r;
  }
}

// grad_weight (slices, D): one row per slice of `slice_rows` rows.
void openmimo_norm_backward(const bf16* x, const bf16* weight, const float* scale, const bf16* grad, bf16* grad_x,
                            float* grad_weight, int64_t rows, int64_t dim, int64_t slice_rows, int threads) {
  const int64_t slices = (rows + slice_rows - 1) / slice_rows;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t slice = 0; slice < slices; ++slice) {
    float* sums = grad_weight + slice * dim;
    std::fill(sums, sums + dim, 0.0f);
    for (int64_t n = slice * slice_rows; n < std::min(rows, (slice + 1) * slice_rows); ++n) {
      const bf16* from = x + n * dim;
      const bf16* g = grad + n * dim;
      const float r = scale[n];
      float projection = 0.0f;
      for (int64_t i = 0; i < dim; ++i) {
        const float y = to_float(from[i]) * r;
        projection += to_float(g[i]) * to_float(weight[i]) * y;
        sums[i] += to_float(g[i]) * y;
      }
      projection /= static_cast<float>(dim);
      for (int64_t i = 0; i < dim; ++i)
        grad_x[n * dim + i] = to_bf16((to_float(g[i]) * to_float(weight[i]) - to_float(from[i]) * r * projection) * r);
    }
  }
}

// gate_up (N, 2F), gate first -> silu(gate) * up (N, F).
void openmimo_swiglu_forward(const bf16* gate_up, bf16* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const bf16* gate = gate_up + n * 2 * width;
    const bf16* up = gate + width;
    for (int64_t i = 0; i < width; ++i) {
      const float g = to_float(gate[i]);
      out[n * width + i] = to_bf16(g * sigmoid(g) * to_float(up[i]));
    }
  }
}

void openmimo_swiglu_backward(const bf16* gate_up, const bf16* grad, bf16* grad_gate_up, int64_t rows, int64_t width,
                              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; ++n) {
    const bf16* gate = gate_up + n * 2 * width;
    const bf16* up = gate + width;
    bf16* to = grad_gate_up + n * 2 * width;
    for (int64_t i = 0; i < width; ++i) {
      const float g = to_float(gate[i]), d = to_float(grad[n * width + i]), sg = sigmoid(g);
      to[i] = to_bf16(d * to_float(up[i]) * sg * (1.0f + g * (1.0f - sg)));
      to[width + i] = to_bf16(d * g * sg);
    }
  }
}

// out[place[n*k + j]] = x[n] for every choice j of row n; other rows of out are untouched.
void openmimo_scatter_rows(const bf16* x, const int64_t* place, bf16* out, int64_t rows, int64_t choices, int64_t dim,
                           int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t j = 0; j < choices; ++j)
      std::memcpy(out + place[n * choices + j] * dim, x + n * dim, dim * sizeof(bf16));
}

// out[n] = sum_j weight[n, j] * y[place[n*k + j]]; weights of null are 1.
void openmimo_gather_sum(const bf16* y, const int64_t* place, const float* weight, bf16* out, int64_t rows,
                         int64_t choices, int64_t dim, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(dim);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; ++n) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t j = 0; j < choices; ++j) {
        const bf16* from = y + place[n * choices + j] * dim;
        const float w = weight ? weight[n * choices + j] : 1.0f;
        for (int64_t i = 0; i < dim; ++i) sums[i] += w * to_float(from[i]);
      }
      for (int64_t i = 0; i < dim; ++i) out[n * dim + i] = to_bf16(sums[i]);
    }
  }
}

// Gradients of openmimo_gather_sum: grad_y[place] = weight * grad, grad_weight = <grad, y[place]>.
void openmimo_gather_sum_backward(const bf16* y, const int64_t* place, const float* weight, const bf16* grad,
                                  bf16* grad_y, float* grad_weight, int64_t rows, int64_t choices, int64_t dim,
                                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t j = 0; j < choices; ++j) {
      const int64_t at = place[n * choices + j] * dim;
      const float w = weight[n * choices + j];
      float sum = 0.0f;
      for (int64_t i = 0; i < dim; ++i) {
        const float g = to_float(grad[n * dim + i]);
        grad_y[at + i] = to_bf16(w * g);
        sum += g * to_float(y[at + i]);
      }
      grad_weight[n * choices + j] = sum;
    }
}

// logits (N, V) become the gradient of weight[n] * -log softmax[target]; loss (N) gets the weighted losses.
void openmimo_cross_entropy(bf16* logits, const int64_t* targets, const float* weights, float* loss, int64_t rows,
                            int64_t vocabulary, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> values(vocabulary);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; ++n) {
      bf16* row = logits + n * vocabulary;
      float top = -INFINITY, total = 0.0f;
      for (int64_t i = 0; i < vocabulary; ++i) top = std::max(top, to_float(row[i]));
      const float target = to_float(row[targets[n]]);
      for (int64_t i = 0; i < vocabulary; ++i) {
        values[i] = fast_exp(to_float(row[i]) - top);
        total += values[i];
      }
      loss[n] = weights[n] * (top + std::log(total) - target);
      const float factor = weights[n] / total;
      for (int64_t i = 0; i < vocabulary; ++i) row[i] = to_bf16(values[i] * factor);
      row[targets[n]] = to_bf16(values[targets[n]] * factor - weights[n]);
    }
  }
}

}  // extern "C"
