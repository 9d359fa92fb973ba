// The kernels, written once over a small vector type `Isa` that the including file defines:
//   Vec, LANES; zero, set, load, store, add, sub, mul, fma, max, reduce_max, reduce_sum, any_above
//   keep, nearest, scale, store_bf16
//   REGISTERS for sums, PLAIN_REGISTERS where what is multiplied is fp32 or bf16; WIDE_VECTORS of columns at a time, and
//   WIDER_ALONE if one or two rows leave room for more
//   Pair (bf16 words ready for a product), pair_of_{bf16,int8,fp8,int4}(ptr), load_bf16(ptr), dot(sum, word, Pair)
//   and where registers are few, the halves of bf16 words: low_of, high_of (of a vector's bytes or of one word)
#pragma once

#include <initializer_list>

#include "kernels.h"
#include "kernels_int8.h"
#include "words.h"

namespace {

using namespace openmimo;

template <Format F>
struct Operand {
  using B = Isa::Pair;
  static B load(const uint8_t* at) {
    if constexpr (F == Format::BF16) return Isa::pair_of_bf16(at);
    else if constexpr (F == Format::INT8 || F == Format::INT8_BLOCK) return Isa::pair_of_int8(at);
    else if constexpr (F == Format::FP8) return Isa::pair_of_fp8(at);
    else return Isa::pair_of_int4(at);
  }
  static Isa::Vec dot(Isa::Vec sum, uint32_t word, B b) { return Isa::dot(sum, word, b); }
};

template <>
struct Operand<Format::F32> {
  using B = Isa::Vec;
  static B load(const uint8_t* at) { return Isa::load(reinterpret_cast<const float*>(at)); }
  static Isa::Vec dot(Isa::Vec sum, uint32_t word, B b) { return Isa::fma(Isa::set(float_from_bits(word)), b, sum); }
};

// The same pointer, of which the compiler does not know that: what was read there before it would keep in registers that
// sums need.
template <typename T>
inline const T* read_anew(const T* at) {
#if defined(__GNUC__)
  asm("" : "+r"(at));
#endif
  return at;
}

// Both halves of all columns do not fit beside the sums of many rows: one after the other.
template <typename I, int MR, int NV>
  requires requires(const uint8_t* at) { I::low_of(at); }
inline void dot_halves(typename I::Vec (&sum)[MR][NV], const uint32_t* const (&a)[MR], const uint8_t* b, int step) {
  typename I::Vec columns[NV];
  for (int j = 0; j < NV; ++j) columns[j] = I::low_of(b + j * I::LANES * 4);
  for (int i = 0; i < MR; ++i) {
    const typename I::Vec row = I::low_of(a[i][step]);
    for (int j = 0; j < NV; ++j) sum[i][j] = I::fma(row, columns[j], sum[i][j]);
  }
  b = read_anew(b);
  for (int j = 0; j < NV; ++j) columns[j] = I::high_of(b + j * I::LANES * 4);
  for (int i = 0; i < MR; ++i) {
    const typename I::Vec row = I::high_of(read_anew(a[i])[step]);
    for (int j = 0; j < NV; ++j) sum[i][j] = I::fma(row, columns[j], sum[i][j]);
  }
}

template <typename I, Format F>
constexpr bool BY_HALVES = F == Format::BF16 && requires(const uint8_t* at) { I::low_of(at); };

template <Format F, int MR, int NV, bool FETCH = false>
inline void dot_steps(Isa::Vec (&sum)[MR][NV], const uint32_t* const (&a)[MR], const uint8_t* b, int64_t stride, int begin,
                      int end, int64_t ahead = 0) {
  using O = Operand<F>;
  for (int step = begin; step < end; ++step, b += stride) {
    typename O::B columns[NV];
    if constexpr (FETCH)
      for (int j = 0; j < NV; ++j) __builtin_prefetch(b + ahead + j * Isa::LANES * column_bytes(F));
    if constexpr (BY_HALVES<Isa, F>) {
      dot_halves<Isa>(sum, a, b, step);
      continue;
    }
    for (int j = 0; j < NV; ++j) columns[j] = O::load(b + j * Isa::LANES * column_bytes(F));
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) sum[i][j] = O::dot(sum[i][j], a[i][step], columns[j]);
  }
}

template <Format F>
inline Isa::Vec load_scales(const uint8_t* at) {
  if constexpr (F == Format::FP8) return Isa::load(reinterpret_cast<const float*>(at));
  else return Isa::load_bf16(reinterpret_cast<const uint16_t*>(at));
}

// MR rows times NV vectors of columns, all sums in registers.
template <Format F, int MR, int NV>
void product_tile(const Product& p, int row, int column) {
  Isa::Vec sum[MR][NV];
  const uint32_t* a[MR];
  float* out = p.out + row * p.out_stride + column;
  for (int i = 0; i < MR; ++i) {
    a[i] = p.rows[row + i];
    for (int j = 0; j < NV; ++j)
      sum[i][j] = p.accumulate ? Isa::load(out + i * p.out_stride + j * Isa::LANES) : Isa::zero();
  }
  const uint8_t* b = p.panel + column * column_bytes(F);
  if constexpr (group_steps(F) == 0) {
    if (p.ahead != 0 && row == 0) dot_steps<F, MR, NV, true>(sum, a, b, p.stride, 0, p.depth, p.ahead);
    else dot_steps<F, MR, NV>(sum, a, b, p.stride, 0, p.depth);
  } else {
    const uint8_t* scales = p.scales + column * scale_bytes(F);
    for (int begin = 0; begin < p.depth; begin += group_steps(F), scales += PANEL * scale_bytes(F)) {
      const int end = begin + group_steps(F) < p.depth ? begin + group_steps(F) : p.depth;
      Isa::Vec part[MR][NV];
      for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NV; ++j) part[i][j] = Isa::zero();
      dot_steps<F, MR, NV>(part, a, b + begin * p.stride, p.stride, begin, end);
      for (int j = 0; j < NV; ++j) {
        const Isa::Vec scale = load_scales<F>(scales + j * Isa::LANES * scale_bytes(F));
        for (int i = 0; i < MR; ++i) sum[i][j] = Isa::fma(part[i][j], scale, sum[i][j]);
      }
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) Isa::store(out + i * p.out_stride + j * Isa::LANES, sum[i][j]);
}

template <Format F, int NV, int MR>
void product_some(const Product& p, int row, int rows, int column) {
  if (rows == MR) return product_tile<F, MR, NV>(p, row, column);
  if constexpr (MR > 1) product_some<F, NV, MR - 1>(p, row, rows, column);
}

// As few tiles as there are registers for, of about the same number of rows: a tile of one row waits for its own sums.
template <Format F, int NV>
void product_rows(const Product& p, int column) {
  constexpr int ROOM = F == Format::F32 || F == Format::BF16 ? Isa::PLAIN_REGISTERS : Isa::REGISTERS;
  constexpr int FIT = ROOM / (group_steps(F) ? 2 * NV : NV), MR = FIT < 1 ? 1 : (FIT > 8 ? 8 : FIT);
  for (int row = 0; row < p.num_rows;) {
    const int left = p.num_rows - row, tiles = (left + MR - 1) / MR, rows = (left + tiles - 1) / tiles;
    product_some<F, NV, MR>(p, row, rows, column);
    row += rows;
  }
}

template <Format F, int WIDE>
void product_columns(const Product& p) {
  constexpr int SIXTEEN = 16 / Isa::LANES;
  int column = 0;
  for (; column + WIDE * Isa::LANES <= p.columns; column += WIDE * Isa::LANES) product_rows<F, WIDE>(p, column);
  switch ((p.columns - column) / 16) {
    case 3: if constexpr (3 * SIXTEEN < WIDE) product_rows<F, 3 * SIXTEEN>(p, column); break;
    case 2: if constexpr (2 * SIXTEEN < WIDE) product_rows<F, 2 * SIXTEEN>(p, column); break;
    case 1: if constexpr (SIXTEEN < WIDE) product_rows<F, SIXTEEN>(p, column); break;
    default: break;
  }
}

template <Format F>
void product_of(const Product& p) {
  if constexpr (Isa::WIDER_ALONE) {
    if (p.num_rows == 1) return product_columns<F, 4 * Isa::WIDE_VECTORS>(p);
    if (p.num_rows == 2) return product_columns<F, 2 * Isa::WIDE_VECTORS>(p);
  }
  product_columns<F, Isa::WIDE_VECTORS>(p);
}

void product(Format format, const Product& p) {
  switch (format) {
    case Format::F32: return product_of<Format::F32>(p);
    case Format::BF16: return product_of<Format::BF16>(p);
    case Format::INT8: return product_of<Format::INT8>(p);
    case Format::FP8: return product_of<Format::FP8>(p);
    case Format::INT4: return product_of<Format::INT4>(p);
    case Format::INT8_BLOCK: return product_of<Format::INT8_BLOCK>(p);
  }
}

constexpr float HIDDEN = -1e30f;

// 2^x, 0 far below, with a relative error below 2e-7 or, enough for bf16, 3e-6.
// Source: the polynomial of Cephes' exp2f; the shorter one has the least relative error on -0.5 .. 0.5 (Lawson's iteration)
constexpr float BF16_EXP2[] = {9.570101968e-3f, 5.591786076e-2f, 2.402474483e-1f, 6.931218147e-1f, 9.999992614e-1f};

template <Arithmetic A>
inline Isa::Vec exp2_of(Isa::Vec x) {
  const Isa::Vec whole = Isa::nearest(x), f = Isa::sub(x, whole);
  Isa::Vec p;
  if constexpr (A == Arithmetic::F32) {
    p = Isa::set(1.535336188319500e-4f);
    for (const float coefficient : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                                    2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f})
      p = Isa::fma(p, f, Isa::set(coefficient));
  } else {
    p = Isa::set(BF16_EXP2[0]);
    for (int i = 1; i < 5; ++i) p = Isa::fma(p, f, Isa::set(BF16_EXP2[i]));
  }
  return Isa::scale(p, whole);
}

// One block of scores becomes probabilities relative to a reference `top`; returns the factor for what was summed so far.
// `scale` includes log2(e), and `top` is in the same units. The reference moves only when a score passes it by far: what is
// summed up may grow by a factor of 2^MOST_ABOVE, and floats do not mind.
constexpr float MOST_ABOVE = 8.0f;

//
// With scales, those of keys apply to the scores and those of values to the probabilities: a factor per position either way.
struct Scales {
  alignas(64) float keys[BLOCK] = {}, values[BLOCK] = {};
};

template <Arithmetic A, bool NARROW>
float softmax_block(const float* scores, int first, int last, float scale, float& top, float* totals, uint32_t* words,
                    const Scales& scales) {
  constexpr int N = BLOCK / Isa::LANES;
  Isa::Vec p[N];
  for (int i = 0; i < N; ++i) p[i] = Isa::mul(Isa::load(scores + i * Isa::LANES), Isa::set(scale));
  if constexpr (NARROW)
    for (int i = 0; i < N; ++i) p[i] = Isa::mul(p[i], Isa::load(scales.keys + i * Isa::LANES));
  if (first > 0 || last < BLOCK - 1)
    for (int i = 0; i < N; ++i) p[i] = Isa::keep(p[i], first - i * Isa::LANES, last - i * Isa::LANES, HIDDEN);
  Isa::Vec most = p[0];
  for (int i = 1; i < N; ++i) most = Isa::max(most, p[i]);
  float shrink = 1.0f;
  Isa::Vec sum = Isa::load(totals);
  if (Isa::any_above(most, top + MOST_ABOVE)) {
    const float now = Isa::reduce_max(most);
    alignas(64) float lanes[Isa::LANES];
    Isa::store(lanes, exp2_of<A>(Isa::set(top - now)));
    shrink = lanes[0];
    sum = Isa::mul(sum, Isa::set(shrink));
    top = now;
  }
  for (int i = 0; i < N; ++i) {
    p[i] = exp2_of<A>(Isa::sub(p[i], Isa::set(top)));
    sum = Isa::add(sum, p[i]);
  }
  Isa::store(totals, sum);
  if constexpr (NARROW) {
    for (int i = 0; i < N; ++i) p[i] = Isa::mul(p[i], Isa::load(scales.values + i * Isa::LANES));
    if (first > 0 || last < BLOCK - 1)  // scales of hidden lanes may be anything, infinite or no numbers too
      for (int i = 0; i < N; ++i) p[i] = Isa::keep(p[i], first - i * Isa::LANES, last - i * Isa::LANES, 0.0f);
  }
  for (int i = 0; i < N; i += 2) {
    if constexpr (A == Arithmetic::F32) {
      Isa::store(reinterpret_cast<float*>(words) + i * Isa::LANES, p[i]);
      Isa::store(reinterpret_cast<float*>(words) + (i + 1) * Isa::LANES, p[i + 1]);
    } else {
      Isa::store_bf16(words + i * Isa::LANES / 2, p[i], p[i + 1]);
    }
  }
  return shrink;
}

template <Arithmetic A>
void write_words(const float* x, int count, uint32_t* out) {
  if constexpr (A == Arithmetic::F32) {
    std::memcpy(out, x, count * sizeof(float));
  } else {
    int i = 0;
    for (; i + 2 * Isa::LANES <= count; i += 2 * Isa::LANES)
      Isa::store_bf16(out + i / 2, Isa::load(x + i), Isa::load(x + i + Isa::LANES));
    for (; i + 2 <= count; i += 2) out[i / 2] = bf16_pair(x[i], x[i + 1]);
    if (count % 2) out[count / 2] = bf16_pair(x[count - 1], 0.0f);
  }
}

// The first byte behind a block's values, and behind their scales and those of the keys where there are some.
inline const uint8_t* behind(const ValueSegment& v, Format format, int v_padded) {
  const uint8_t* end = v.words + v.steps * v_padded * int64_t{column_bytes(format)};
  return format == Format::INT8 ? end + 2 * BLOCK * sizeof(float) : end;
}

template <Arithmetic A, bool NARROW>
void attention_of(const Attention& t) {
  constexpr Format F = A == Arithmetic::F32 ? Format::F32 : NARROW ? Format::INT8 : Format::BF16;
  constexpr int PER_WORD = A == Arithmetic::F32 ? 1 : 2;
  const int rows = t.num_rows;
  float* scores = t.scratch;
  auto* words = reinterpret_cast<uint32_t*>(scores + rows * BLOCK);
  float* sums = scores + rows * 2 * BLOCK;
  float* totals = sums + rows * t.v_padded;  // lanes apart
  auto** p_rows = reinterpret_cast<const uint32_t**>(totals + rows * Isa::LANES);
  float* top = reinterpret_cast<float*>(p_rows + rows);
  constexpr float LOG2E = 1.44269504f;
  for (int i = 0; i < rows; ++i) {
    top[i] = t.sinks ? t.sinks[i] * LOG2E : HIDDEN;
  }
  std::memset(sums, 0, rows * (t.v_padded + Isa::LANES) * sizeof(float));
  if (t.sinks)
    for (int i = 0; i < rows; ++i) totals[i * Isa::LANES] = 1.0f;
  Scales scales;
  for (int b = 0; b < t.num_blocks; ++b) {
    const KeyBlock& block = t.blocks[b];
    // A block that lies elsewhere is fetched meanwhile. One right behind this one the processor fetches by itself, and
    // more lines at a time than it takes from a program.
    const KeyBlock* next = b + 1 < t.num_blocks && block.num_keys == 1 ? t.blocks + b + 1 : nullptr;
    if (next && next->keys[0].words == behind(block.values[0], F, t.v_padded)) next = nullptr;
    const auto ahead = [](const uint8_t* there, const uint8_t* here) {
      return reinterpret_cast<intptr_t>(there) - reinterpret_cast<intptr_t>(here);
    };
    if constexpr (NARROW) {
      for (int s = 0; s < block.num_keys; ++s)
        std::memcpy(scales.keys + block.keys[s].lane, block.keys[s].scales, block.keys[s].lanes * sizeof(float));
      for (int s = 0; s < block.num_values; ++s)
        std::memcpy(scales.values + PER_WORD * block.values[s].step, block.values[s].scales,
                    PER_WORD * block.values[s].steps * sizeof(float));
    }
    for (int s = 0; s < block.num_keys; ++s) {
      const KeySegment& k = block.keys[s];
      product(F, {t.queries, rows, k.words, k.stride, t.qk_words, k.lanes, scores + k.lane, BLOCK,
                  false, nullptr, next ? ahead(next->keys[0].words, k.words) : 0});
    }
    for (int i = 0; i < rows; ++i) {
      const auto first = static_cast<int>(t.first[i] - block.position), last = static_cast<int>(t.last[i] - block.position);
      if (first >= BLOCK || last < 0) {
        std::memset(words + i * BLOCK, 0, BLOCK * sizeof(float));
        continue;
      }
      const float shrink = softmax_block<A, NARROW>(scores + i * BLOCK, first, last, t.scale * LOG2E, top[i],
                                                    totals + i * Isa::LANES, words + i * BLOCK, scales);
      if (shrink != 1.0f)
        for (int v = 0; v < t.v_padded; ++v) sums[i * t.v_padded + v] *= shrink;
    }
    for (int s = 0; s < block.num_values; ++s) {
      const ValueSegment& v = block.values[s];
      for (int i = 0; i < rows; ++i) p_rows[i] = words + i * BLOCK + v.step;
      for (int column = 0; column < t.v_padded; column += PANEL) {
        const int columns = t.v_padded - column < PANEL ? t.v_padded - column : PANEL;
        product(F, {p_rows, rows, v.words + column * int64_t{column_bytes(F)}, t.v_padded * int64_t{column_bytes(F)}, v.steps,
                    columns, sums + column, t.v_padded, true, nullptr, next ? ahead(next->values[0].words, v.words) : 0});
      }
    }
  }
  for (int i = 0; i < rows; ++i) {
    const float inverse = 1.0f / Isa::reduce_sum(Isa::load(totals + i * Isa::LANES));
    float* row = sums + i * t.v_padded;
    for (int v = 0; v < t.v_dim; ++v) row[v] *= inverse;
    write_words<A>(row, t.v_dim, t.out[i]);
  }
}

void attention(Arithmetic a, const Attention& t) {
  if (a == Arithmetic::F32) attention_of<Arithmetic::F32, false>(t);
  else if (t.narrow) attention_of<Arithmetic::BF16, true>(t);
  else attention_of<Arithmetic::BF16, false>(t);
}

void norm(Arithmetic a, const float* x, const float* weight, int64_t dim, float eps, uint32_t* out) {
  const int64_t whole = dim / Isa::LANES * Isa::LANES;
  Isa::Vec squares = Isa::zero();
  for (int64_t i = 0; i < whole; i += Isa::LANES) squares = Isa::fma(Isa::load(x + i), Isa::load(x + i), squares);
  float sum = Isa::reduce_sum(squares);
  for (int64_t i = whole; i < dim; ++i) sum += x[i] * x[i];
  const float r = 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
  if (a == Arithmetic::F32) {
    for (int64_t i = 0; i < dim; ++i) out[i] = bits_of(x[i] * r * weight[i]);
  } else {
    const Isa::Vec factor = Isa::set(r);
    const auto scaled = [&](int64_t i) { return Isa::mul(Isa::mul(Isa::load(x + i), factor), Isa::load(weight + i)); };
    int64_t i = 0;
    for (; i + 2 * Isa::LANES <= dim; i += 2 * Isa::LANES) Isa::store_bf16(out + i / 2, scaled(i), scaled(i + Isa::LANES));
    for (; i + 2 <= dim; i += 2) out[i / 2] = bf16_pair(x[i] * r * weight[i], x[i + 1] * r * weight[i + 1]);
    if (dim % 2) out[dim / 2] = bf16_pair(x[dim - 1] * r * weight[dim - 1], 0.0f);
  }
}

void add(float* x, const float* const* parts, const float* weights, int num_parts, int64_t dim) {
  for (int j = 0; j < num_parts; ++j) {
    const float* part = parts[j];
    const float w = weights ? weights[j] : 1.0f;
    for (int64_t i = 0; i < dim; ++i) x[i] += w * part[i];
  }
}

void rotate(Arithmetic a, const float* x, const float* cosine, const float* sine, int half, int dim, uint32_t* out) {
  float turned[1024];
  for (int i = 0; i < half; ++i) {
    turned[i] = x[i] * cosine[i] - x[half + i] * sine[i];
    turned[half + i] = x[half + i] * cosine[i] + x[i] * sine[i];
  }
  for (int i = 2 * half; i < dim; ++i) turned[i] = x[i];
  if (a == Arithmetic::F32) write_words<Arithmetic::F32>(turned, dim, out);
  else write_words<Arithmetic::BF16>(turned, dim, out);
}

void swiglu(Arithmetic a, const float* gate, const float* up, int width, uint32_t* out) {
  float y[PANEL];
  for (int i = 0; i < width; ++i) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
  if (a == Arithmetic::F32) write_words<Arithmetic::F32>(y, width, out);
  else write_words<Arithmetic::BF16>(y, width, out);
}

void sigmoid_all(float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = sigmoid(x[i]);
}

// The first of the greatest.
int64_t argmax(const float* x, int64_t count) {
  int64_t best = 0;
  constexpr int64_t CHUNK = 1024;
  for (int64_t start = 0; start < count; start += CHUNK) {
    const int64_t end = start + CHUNK < count ? start + CHUNK : count;
    const int64_t whole = start + (end - start) / Isa::LANES * Isa::LANES;
    Isa::Vec most = Isa::set(x[best]);
    for (int64_t i = start; i < whole; i += Isa::LANES) most = Isa::max(most, Isa::load(x + i));
    float top = Isa::reduce_max(most);
    for (int64_t i = whole; i < end; ++i) top = x[i] > top ? x[i] : top;
    if (top > x[best])
      for (int64_t i = start; i < end; ++i)
        if (x[i] == top) {
          best = i;
          break;
        }
  }
  return best;
}

void nothing() {}

#define OPENMIMO_KERNELS(NAME, TEXT)                                                                         \
  const openmimo::Kernels openmimo::NAME{TEXT, nothing, nothing, product, integer_product, quantize, attention, norm, \
                                         add,  rotate,  swiglu,  sigmoid_all, argmax}

}  // namespace
