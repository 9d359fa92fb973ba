// The gradient's norm and AdamW over all parameters, one pass each. Memory traffic is all they cost.
//
// A table has one row per parameter: addresses of master, first moment, second moment (fp32), gradient and parameter,
// number of entries, and whether gradient and parameter are bf16 (else fp32).

#include <vector>

#include "vector.h"

namespace openmimo {
namespace {

constexpr int64_t CHUNK = 16384;

struct Parameter {
  int64_t master, first, second, gradient, parameter, count, is_bf16;
};
static_assert(sizeof(Parameter) == 7 * sizeof(int64_t));

// What differs between parameters in an update.
struct Rates {
  float keep;             // 1 - learning rate * weight decay
  float step;             // learning rate / (1 - beta1^t)
  float second_scale;     // (1 - beta2^t)^-1/2
};

struct Chunk {
  const Parameter* of;
  int64_t index, begin, count;
};

std::vector<Chunk> chunks_of(const Parameter* table, int64_t parameters) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < parameters; ++i)
    for (int64_t at = 0; at < table[i].count; at += CHUNK)
      chunks.push_back({&table[i], i, at, std::min(CHUNK, table[i].count - at)});
  return chunks;
}

template <typename T>
T* address(int64_t value) {
  return reinterpret_cast<T*>(value);
}

inline f32x16 read(const float* from, int64_t count) {
  f32x16 x = {};
  std::memcpy(&x, from, count * sizeof(float));
  return x;
}

inline void write(float* to, f32x16 x, int64_t count) { std::memcpy(to, &x, count * sizeof(float)); }

// Entries begin + i .. of a bf16 or fp32 array; `count` lanes.
inline f32x16 read_entries(int64_t array, bool is_bf16, int64_t at, int64_t count) {
  if (!is_bf16) return count == LANES ? load<f32x16>(address<float>(array) + at) : read(address<float>(array) + at, count);
  return count == LANES ? load_bf16(address<bf16>(array) + at) : load_bf16_part(address<bf16>(array) + at, count);
}

inline void update_lanes(const Parameter& p, const Rates& rates, int64_t at, int64_t count, float factor, float beta1,
                         float beta2, float eps) {
  const bool whole = count == LANES;
  float *master = address<float>(p.master) + at, *first = address<float>(p.first) + at;
  float* second = address<float>(p.second) + at;
  const f32x16 g = read_entries(p.gradient, p.is_bf16, at, count) * factor;
  const f32x16 old_first = whole ? load<f32x16>(first) : read(first, count);
  const f32x16 old_second = whole ? load<f32x16>(second) : read(second, count);
  const f32x16 old = whole ? load<f32x16>(master) : read(master, count);
  const f32x16 m = old_first * beta1 + g * (1.0f - beta1), v = old_second * beta2 + g * g * (1.0f - beta2);
  const f32x16 next = old * rates.keep - rates.step * m / (square_root(v) * rates.second_scale + eps);
  if (whole) {
    store(first, m), store(second, v), store(master, next);
    if (p.is_bf16)
      store_bf16(address<bf16>(p.parameter) + at, next);
    else
      store(address<float>(p.parameter) + at, next);
    return;
  }
  write(first, m, count), write(second, v, count), write(master, next, count);
  if (p.is_bf16)
    store_bf16_part(address<bf16>(p.parameter) + at, next, count);
  else
    write(address<float>(p.parameter) + at, next, count);
}

}  // namespace
}  // namespace openmimo

using namespace openmimo;

extern "C" {

// norm (1): root of the sum of all squared gradients. Chunks are summed in their order, whichever thread had them.
// zeros (parameters), or null: how many of a parameter's gradient entries are exactly zero.
void openmimo_gradient_norm(const int64_t* table, double* norm, int64_t* zeros, int64_t parameters, int threads) {
  const std::vector<Chunk> chunks = chunks_of(reinterpret_cast<const Parameter*>(table), parameters);
  std::vector<double> sums(chunks.size());
  std::vector<int64_t> counts(chunks.size());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t c = 0; c < chunks.size(); ++c) {
    const Chunk& chunk = chunks[c];
    f32x16 squares = {};
    i32x16 zero = {};
    for (int64_t i = 0; i < chunk.count; i += LANES) {
      const int64_t count = std::min<int64_t>(LANES, chunk.count - i);
      const f32x16 g = read_entries(chunk.of->gradient, chunk.of->is_bf16, chunk.begin + i, count);
      squares += g * g;
      zero = zero - (i32x16)(g == 0.0f);  // a lane that is true is -1
    }
    sums[c] = sum_of(squares);
    alignas(64) int32_t zeros[LANES];
    store(zeros, zero);
    for (const int32_t lane : zeros) counts[c] += lane;
    counts[c] -= (LANES - chunk.count % LANES) % LANES;  // lanes behind the end
  }
  double total = 0.0;
  for (const double sum : sums) total += sum;
  *norm = std::sqrt(total);
  if (zeros == nullptr) return;
  std::fill_n(zeros, parameters, 0);
  for (size_t c = 0; c < chunks.size(); ++c) zeros[chunks[c].index] += counts[c];
}

// rates (parameters, 3), see Rates; `factor` scales every gradient first.
void openmimo_adamw(const int64_t* table, const float* rates, int64_t parameters, float factor, float beta1,
                    float beta2, float eps, int threads) {
  const std::vector<Chunk> chunks = chunks_of(reinterpret_cast<const Parameter*>(table), parameters);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t c = 0; c < chunks.size(); ++c) {
    const Chunk& chunk = chunks[c];
    const Rates& own = reinterpret_cast<const Rates*>(rates)[chunk.index];
    for (int64_t i = 0; i < chunk.count; i += LANES)
      update_lanes(*chunk.of, own, chunk.begin + i, std::min<int64_t>(LANES, chunk.count - i), factor, beta1, beta2,
                   eps);
  }
}

}  // extern "C"
