// What the runtime keeps between and during its calls. Included by its two source files only.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "runtime.h"
#include "words.h"

namespace openmimo {

constexpr int TILE_ROWS = 64;       // rows of a feed-forward tile
constexpr int ATTENTION_ROWS = 64;  // query rows (tokens times heads of a group) of an attention tile
constexpr int ROUTER_ROWS = 8;
constexpr int MAX_CHOICES = 256;  // experts per token
constexpr int MAX_BACKLOG = 16;   // positions that a head may take over in the pass that drafts

// Tokens of an attention tile.
inline int attention_tile(const Geometry& g) { return std::max(1, ATTENTION_ROWS * g.groups / g.heads); }

// What waits to be added to the residual stream.
enum class Pending { NONE, ROWS, EXPERTS };

struct Runtime::Layer {
  bool sliding = false, moe = false;
  int sparse_index = -1;
  CacheShape cache;
  int64_t offset = 0;  // words within a row's rings or within a page
  float *input_norm = nullptr, *post_norm = nullptr, *sinks = nullptr, *router_bias = nullptr;
  Matrix qkv, o, gate_up, down, router;
  std::vector<Matrix> experts_gate_up, experts_down;
  // MTP heads only.
  float *embedding_norm = nullptr, *hidden_norm = nullptr, *final_norm = nullptr;
  Matrix join;
};

// Positions of a row whose hidden states the heads may still need, oldest first; the last is the newest kept one.
struct Runtime::History {
  std::vector<float> hidden;
  std::vector<int32_t> tokens;
  int64_t length = 0;             // tokens kept in the row's cache
  bool tracked = false;           // whether drafts may be asked for; without it nothing is remembered
  std::vector<int64_t> next;      // per head: the first position without a true entry

  int64_t first() const { return length - static_cast<int64_t>(tokens.size()); }
};

// A step's tokens and the buffers that all threads share.
struct Runtime::Step {
  Step(const RuntimeConfig& c, int capacity_) : capacity(capacity_) {
    const auto w = [&](int64_t values) { return words_for(c.arithmetic, values); };
    int64_t attended = 0, query_words_max = 0, query_total = 0, qkv_width = 0;
    for (const Geometry* g : {&c.global, &c.sliding}) {
      attended = std::max(attended, g->heads * w(g->v));
      query_words_max = std::max(query_words_max, w(g->qk));
      query_total = std::max<int64_t>(query_total, g->heads);
      qkv_width = std::max<int64_t>(qkv_width, static_cast<int64_t>(g->heads + g->groups) * g->qk + g->groups * g->v);
    }
    hidden_words = w(c.hidden);
    query_words = query_words_max;
    attended_words = attended;
    qkv_stride = round_up(qkv_width, PANEL);
    y_stride = round_up(c.hidden, PANEL);
    logit_stride = round_up(c.vocab, PANEL);
    inner_words = w(round_up(std::max(c.dense_dim, c.expert_dim), PANEL));
    const bool sparse = c.top_k > 0;
    const int64_t pairs = static_cast<int64_t>(capacity) * (sparse ? c.top_k : 1);
    position.resize(capacity);
    owner.resize(capacity);
    qkv = Buffer<float>(capacity * qkv_stride);
    queries = Buffer<uint32_t>(capacity * query_total * query_words);
    this->attended = Buffer<uint32_t>(capacity * attended_words);
    y = Buffer<float>(std::max<int64_t>(pairs, capacity) * y_stride);
    inner = Buffer<uint32_t>(std::max<int64_t>(pairs, capacity) * inner_words);
    hidden = Buffer<float>(static_cast<int64_t>(capacity) * c.hidden);
  }

  std::pair<int64_t, int64_t> rows_of(int thread, int threads) const {
    return replicated ? std::pair<int64_t, int64_t>{0, n} : share(n, thread, threads);
  }
  std::pair<int64_t, int64_t> query_rows_of(int thread, int threads) const {
    return replicated ? std::pair<int64_t, int64_t>{0, num_queries} : share(num_queries, thread, threads);
  }

  // The stretch of keys that a long sequence attends to in sliding layers; stretches lie behind each other. Lanes that no
  // key fills are masked, and must be finite for that.
  void reserve_linear(int64_t slots, CacheShape shape) {
    shape.slots = static_cast<int>(slots);
    if (linear_words.size() < shape.words()) linear_words = Buffer<uint32_t>(shape.words() * 5 / 4);
    std::fill_n(linear_words.data(), shape.words(), 0u);
  }
  Store linear(const Sequence& s, CacheShape shape, int group) {
    shape.slots = static_cast<int>(s.linear_offset);
    uint32_t* start = linear_words.data() + shape.words();
    shape.slots = s.linear_slots;
    return {shape, start, group};
  }
  // Keep only the rows that need an output.
  void compact(float* x, int64_t dim) const {
    for (const Sequence& s : sequences)
      for (int i = s.query_from; i < s.count; ++i)
        std::memmove(x + (s.query_offset + i - s.query_from) * dim, x + (s.offset + i) * dim, dim * sizeof(float));
  }

  int capacity;
  int64_t n = 0, num_queries = 0;
  bool replicated = false;  // every thread computes all rows of the cheap parts for itself, which saves barriers
  bool has_linear = false;
  bool is_short = false;  // every sequence has so few tokens that one tile per group attends for all of them
  std::vector<Sequence> sequences;
  std::vector<int32_t> position, owner;
  int64_t hidden_words, query_words, attended_words, qkv_stride, y_stride, logit_stride, inner_words;
  Buffer<float> qkv, y, hidden, logits;
  Buffer<uint32_t> queries, attended, inner, linear_words;
};

// One thread's buffers. The last of them belongs to all threads: it holds what they share in large steps.
struct Runtime::Local {
  Local(const RuntimeConfig& c, int capacity, bool shared, int64_t v_padded) {
    // Replicated steps are small; see Runtime::prepare.
    const int64_t few = std::max<int64_t>(4, 4096 / c.hidden), n = shared ? capacity : std::min<int64_t>(few, capacity);
    const int64_t k = std::max(c.top_k, 1), hidden_words = words_for(c.arithmetic, c.hidden);
    x = Buffer<float>(n * c.hidden);
    normed = Buffer<uint32_t>(n * hidden_words * 2);
    if (c.int8_activations) {
      const int attended = std::max(c.global.heads * c.global.v, c.sliding.heads * c.sliding.v);
      quantized = Buffer<uint32_t>(n * quantized_words(std::max(2 * c.hidden, attended)));
    }
    scores = Buffer<float>(n * round_up(std::max(c.experts, 1), PANEL));
    experts.resize(n * k);
    weights.resize(n * k);
    if (shared) return;
    rows.resize(capacity * k);
    place.resize(capacity * k);
    order.resize(capacity * k);
    starts.resize(c.experts + 1);
    router_rows = Buffer<float>(static_cast<int64_t>(ROUTER_ROWS) * c.hidden);
    tile = Buffer<float>(TILE_ROWS * PANEL);
    const int most = std::max({ATTENTION_ROWS, c.global.heads / c.global.groups, c.sliding.heads / c.sliding.groups});
    attention = Buffer<float>(attention_scratch(most, v_padded));
    const int64_t qk_words = words_for(c.arithmetic, std::max(c.global.qk, c.sliding.qk));
    straddling = Buffer<uint32_t>((c.sliding.window / BLOCK + 3) * BLOCK * (qk_words + v_padded));
    query_rows.resize(most);
    out_rows.resize(most);
    first.resize(most);
    last.resize(most);
    sinks.resize(most);
  }

  Pending pending = Pending::NONE;
  Buffer<float> x, scores, router_rows, tile, attention;
  Buffer<uint32_t> normed, quantized, straddling;
  std::vector<float> weights, sinks;
  std::vector<int32_t> experts, place, order, starts, fill, first, last;
  std::vector<const uint32_t*> rows, query_rows;
  std::vector<uint32_t*> out_rows;
  std::vector<KeyBlock> blocks;
};

}  // namespace openmimo
