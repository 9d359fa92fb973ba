// What the attention kernels share: sizes, packing with the rotation, visible keys.
//
// Scores are kept transposed, keys x columns, so that the softmax runs down whole registers. A column is a query of one
// head; a tile of 64 columns holds neighbouring tokens of up to four heads that read the same keys, which wastes less
// of a short window than 64 tokens of one head. Scores are in units of log 2, the scale being part of the packed queries.
//
// Suffixes in comments: B batch, T tokens, H query heads, G key/value heads, K QK dim, V value dim.
#pragma once

#include <climits>

#include "matrix.h"

namespace openmimo {

constexpr int64_t COLUMNS = 64;
constexpr int VECTORS = COLUMNS / LANES;
constexpr int64_t KEY_STEP = 32;   // a block of keys begins and ends at a multiple
constexpr int64_t KEY_BLOCK = 64;  // and has at most so many
constexpr float HIDDEN = -2e30f, NOTHING_YET = -1e30f;

struct Shape {
  int64_t batch, tokens, heads, groups, qk, value, half;  // half: rotated dims / 2
  float score_scale, value_scale;

  int64_t width() const { return heads * qk + groups * (qk + value); }
  int64_t per_group() const { return heads / groups; }
  int64_t tile_heads() const { return per_group() % 4 == 0 ? 4 : per_group() % 2 == 0 ? 2 : 1; }
  int64_t tile_tokens() const { return COLUMNS / tile_heads(); }
  int64_t qk_padded() const { return round_up(qk, DEPTH_STEP); }
  int64_t value_padded() const { return round_up(value, DEPTH_STEP); }
  int64_t keys_padded() const { return round_up(tokens, KEY_STEP); }
};

inline f32x8 load_8(const bf16* from) { return load_bf16_8(from); }
inline f32x8 load_8(const float* from) { return load<f32x8>(from); }
inline f32x16 load_16(const bf16* from) { return load_bf16(from); }
inline f32x16 load_16(const float* from) { return load<f32x16>(from); }
inline float load_1(const bf16* from) { return to_float(*from); }
inline float load_1(const float* from) { return *from; }

// out = scale * x as bf16, with dims i and i + half turned by the position's angle; `sign` -1 turns back.
template <typename T>
inline void rotate_row(const T* x, const float* cosine, const float* sine, const Shape& s, float sign, float scale,
                       bf16* out) {
  const float turn = sign * scale;
  int64_t i = 0;
  for (; i + 8 <= s.half; i += 8) {
    const f32x8 a = load_8(x + i), b = load_8(x + s.half + i);
    const f32x8 c = load<f32x8>(cosine + i) * scale, d = load<f32x8>(sine + i) * turn;
    store_bf16_8(out + i, a * c - b * d);
    store_bf16_8(out + s.half + i, b * c + a * d);
  }
  for (; i < s.half; ++i) {
    const float a = load_1(x + i), b = load_1(x + s.half + i), c = cosine[i] * scale, d = sine[i] * turn;
    out[i] = to_bf16(a * c - b * d);
    out[s.half + i] = to_bf16(b * c + a * d);
  }
  for (i = 2 * s.half; i + LANES <= s.qk; i += LANES) store_bf16(out + i, load_16(x + i) * scale);
  for (; i < s.qk; ++i) out[i] = to_bf16(load_1(x + i) * scale);
}

template <typename T>
inline void scale_row(const T* x, int64_t count, float scale, bf16* out) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_bf16(out + i, load_16(x + i) * scale);
  for (; i < count; ++i) out[i] = to_bf16(load_1(x + i) * scale);
}

// One key/value head of one sequence as bf16 rows: rotated keys (keys_padded x qk_padded), scaled values.
inline void pack_keys(const bf16* qkv, const float* cosine, const float* sine, const Shape& s, int64_t group,
                      bf16* keys, bf16* values) {
  const int64_t K = s.qk_padded(), V = s.value_padded();
  const bf16* k = qkv + s.heads * s.qk + group * s.qk;
  const bf16* v = qkv + (s.heads + s.groups) * s.qk + group * s.value;
  for (int64_t t = 0; t < s.tokens; ++t) {
    rotate_row(k + t * s.width(), cosine + t * s.half, sine + t * s.half, s, 1.0f, 1.0f, keys + t * K);
    clear(keys + t * K + s.qk, K - s.qk);
    scale_row(v + t * s.width(), s.value, s.value_scale, values + t * V);
    clear(values + t * V + s.value, V - s.value);
  }
  clear(keys + s.tokens * K, (s.keys_padded() - s.tokens) * K);
  clear(values + s.tokens * V, (s.keys_padded() - s.tokens) * V);
}

// The keys that the queries of one sequence see: first[t] .. t, without holes[2t] <= key < holes[2t + 1] where there
// are holes.
struct Sight {
  const int32_t *first, *holes;

  Sight from(int64_t token) const { return {first + token, holes ? holes + 2 * token : nullptr}; }
};

// A tile of columns: column r * tokens_per_head + i is token start + i of the tile's r-th head.
struct Tile {
  // Keys that a column sees and does not see; columns without a query see none.
  alignas(64) int32_t first[COLUMNS], last[COLUMNS], hole_begin[COLUMNS], hole_end[COLUMNS];
  int64_t start, count, begin_key, end_key, highest_first;
  int64_t any_hole_begin = INT_MAX, any_hole_end = 0;  // keys outside are in no query's hole
  int64_t all_hole_begin = 0, all_hole_end = INT_MAX;  // keys inside are in every query's

  Tile(const Sight& sight, int64_t start_, const Shape& s)
      : start(start_), count(std::min(s.tile_tokens(), s.tokens - start_)), highest_first(0) {
    int64_t lowest = start;
    for (int64_t i = 0; i < s.tile_tokens(); ++i) {
      const bool real = i < count;
      const int32_t from = real ? sight.first[start + i] : INT_MAX;
      const int32_t begin = real && sight.holes ? sight.holes[2 * (start + i)] : 0;
      const int32_t end = real && sight.holes ? sight.holes[2 * (start + i) + 1] : 0;
      if (real) {
        lowest = std::min<int64_t>(lowest, from);
        highest_first = std::max<int64_t>(highest_first, from);
        if (begin < end) any_hole_begin = std::min<int64_t>(any_hole_begin, begin);
        any_hole_end = std::max<int64_t>(any_hole_end, end);
        all_hole_begin = std::max<int64_t>(all_hole_begin, begin);
        all_hole_end = std::min<int64_t>(all_hole_end, end);
      }
      for (int64_t column = i; column < COLUMNS; column += s.tile_tokens()) {
        first[column] = from;
        last[column] = real ? static_cast<int32_t>(start + i) : -1;
        hole_begin[column] = begin;
        hole_end[column] = end;
      }
    }
    begin_key = lowest / KEY_STEP * KEY_STEP;
    end_key = round_up(start + count, KEY_STEP);
  }

  // Whether every query sees all keys of the block.
  bool sees_all(int64_t key, int64_t keys) const {
    return key >= highest_first && key + keys <= start + 1 && (key + keys <= any_hole_begin || key >= any_hole_end);
  }

  // Whether no query sees any key of the block because of its hole; never so of the first block.
  bool sees_nothing(int64_t key, int64_t keys) const { return key >= all_hole_begin && key + keys <= all_hole_end; }

  i32x16 visible(int64_t key, int vector) const {
    const int32_t at = static_cast<int32_t>(key);
    const int64_t c = LANES * vector;
    const i32x16 hidden = (load<i32x16>(hole_begin + c) <= at) & (load<i32x16>(hole_end + c) > at);
    return (load<i32x16>(first + c) <= at) & (load<i32x16>(last + c) >= at) & ~hidden;
  }
};

// The tile's queries, rotated and scaled to units of log 2, as rows (COLUMNS x qk_padded).
inline void pack_queries(const bf16* qkv, const float* cosine, const float* sine, const Shape& s, const Tile& tile,
                         int64_t head, bf16* rows) {
  const int64_t K = s.qk_padded();
  for (int64_t column = 0; column < COLUMNS; ++column) {
    const int64_t i = column % s.tile_tokens(), t = tile.start + i;
    bf16* row = rows + column * K;
    if (i >= tile.count) {
      clear(row, K);
      continue;
    }
    const bf16* q = qkv + t * s.width() + (head + column / s.tile_tokens()) * s.qk;
    rotate_row(q, cosine + t * s.half, sine + t * s.half, s, 1.0f, s.score_scale * LOG2E, row);
    clear(row + s.qk, K - s.qk);
  }
}

}  // namespace openmimo
