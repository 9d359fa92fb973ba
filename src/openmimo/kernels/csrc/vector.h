// Sixteen floats at a time, bf16 <-> fp32 and exponentials: compiler vectors, with AVX-512 instructions where they help.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define OPENMIMO_AVX512 1
#if defined(__AVX512BF16__)
#define OPENMIMO_BF16_DOT 1
#else
#define OPENMIMO_FMA 1
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define OPENMIMO_AVX2 1
#define OPENMIMO_FMA 1
#endif

namespace openmimo {

using bf16 = uint16_t;
constexpr int LANES = 16;

#ifdef OPENMIMO_AVX2
// Sixteen numbers in two registers. GCC takes vectors of 64 bytes too, but passes them through memory.
template <typename V>
struct Two {
  V low, high;

  Two() = default;
  Two(V low_, V high_) : low(low_), high(high_) {}
  template <typename U>
  explicit Two(const Two<U>& bits) : low((V)bits.low), high((V)bits.high) {}
};

template <typename V>
inline V low_of(const Two<V>& x) { return x.low; }
template <typename V>
inline V high_of(const Two<V>& x) { return x.high; }
template <typename S>
  requires std::is_arithmetic_v<S>
inline S low_of(S x) { return x; }
template <typename S>
  requires std::is_arithmetic_v<S>
inline S high_of(S x) { return x; }

// f of the lower halves and of the upper ones.
template <typename F, typename... A>
inline auto by_halves(F f, const A&... x) {
  return Two<decltype(f(low_of(x)...))>(f(low_of(x)...), f(high_of(x)...));
}

template <typename T>
constexpr bool is_two = false;
template <typename V>
constexpr bool is_two<Two<V>> = true;

#define OPENMIMO_OPERATOR(op)                               \
  template <typename A, typename B>                         \
    requires(is_two<A> || is_two<B>)                        \
  inline auto operator op(const A& a, const B& b) {         \
    return by_halves([](auto x, auto y) { return x op y; }, a, b); \
  }
OPENMIMO_OPERATOR(+) OPENMIMO_OPERATOR(-) OPENMIMO_OPERATOR(*) OPENMIMO_OPERATOR(/) OPENMIMO_OPERATOR(&)
OPENMIMO_OPERATOR(|) OPENMIMO_OPERATOR(<<) OPENMIMO_OPERATOR(>>) OPENMIMO_OPERATOR(<) OPENMIMO_OPERATOR(>)
OPENMIMO_OPERATOR(<=) OPENMIMO_OPERATOR(>=) OPENMIMO_OPERATOR(==)
#undef OPENMIMO_OPERATOR

template <typename V>
inline Two<V> operator~(const Two<V>& x) { return {~x.low, ~x.high}; }
template <typename V, typename B>
inline Two<V>& operator+=(Two<V>& a, const B& b) { return a = a + b; }
template <typename V, typename B>
inline Two<V>& operator*=(Two<V>& a, const B& b) { return a = a * b; }
#endif

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
#ifdef OPENMIMO_AVX2
using f32x16 = Two<f32x8>;
using i32x16 = Two<i32x8>;
using u32x16 = Two<u32x8>;
using u16x16 = Two<u16x8>;
#else
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
#endif

template <typename V, typename T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V, typename T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

#ifdef OPENMIMO_AVX2
// By halves: a copy of 64 bytes goes through registers of 16.
template <typename V, typename T>
  requires is_two<V>
inline V load(const T* from) {
  using Half = decltype(V::low);
  const auto* at = reinterpret_cast<const char*>(from);
  return {load<Half>(at), load<Half>(at + sizeof(Half))};
}

template <typename V, typename T>
inline void store(T* to, Two<V> value) {
  auto* at = reinterpret_cast<char*>(to);
  store(at, value.low);
  store(at + sizeof(V), value.high);
}
#endif

inline f32x16 splat(float x) { return f32x16{} + x; }

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// ---------------------------------------------------------------- bf16

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// Round to nearest, ties to even.
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <typename F, typename U>
inline U rounded_bits(F x) {
  const U bits = (U)x;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

#ifdef OPENMIMO_AVX2
inline u32x16 widened(u16x16 x) {
  return by_halves([](u16x8 half) { return __builtin_convertvector(half, u32x8); }, x);
}
inline u16x16 narrowed(u32x16 x) {
  return by_halves([](u32x8 half) { return __builtin_convertvector(half, u16x8); }, x);
}
#else
inline u32x16 widened(u16x16 x) { return __builtin_convertvector(x, u32x16); }
inline u16x16 narrowed(u32x16 x) { return __builtin_convertvector(x, u16x16); }
#endif

inline f32x16 load_bf16(const bf16* from) { return (f32x16)(widened(load<u16x16>(from)) << 16); }

inline f32x8 load_bf16_8(const bf16* from) {
  return (f32x8)(__builtin_convertvector(load<u16x8>(from), u32x8) << 16);
}

inline void store_bf16(bf16* to, f32x16 x) {
#ifdef OPENMIMO_BF16_DOT
  store(to, _mm512_cvtneps_pbh((__m512)x));
#else
  store(to, narrowed(rounded_bits<f32x16, u32x16>(x) >> 16));
#endif
}

inline void store_bf16_8(bf16* to, f32x8 x) {
#ifdef OPENMIMO_BF16_DOT
  store(to, _mm256_cvtneps_pbh((__m256)x));
#else
  store(to, __builtin_convertvector(rounded_bits<f32x8, u32x8>(x) >> 16, u16x8));
#endif
}

// What storing as bf16 and loading again would give.
inline f32x16 rounded(f32x16 x) {
#ifdef OPENMIMO_BF16_DOT
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
#else
  return (f32x16)(rounded_bits<f32x16, u32x16>(x) & 0xffff0000u);
#endif
}

// The first `count` lanes; the others read as 0 and are not written.
inline f32x16 load_bf16_part(const bf16* from, int64_t count) {
  bf16 padded[LANES] = {};
  std::memcpy(padded, from, count * sizeof(bf16));
  return load_bf16(padded);
}

inline void store_bf16_part(bf16* to, f32x16 x, int64_t count) {
  bf16 padded[LANES];
  store_bf16(padded, x);
  std::memcpy(to, padded, count * sizeof(bf16));
}

// Lane i becomes the pair (low[i], high[i]) of bf16, low in the lower half.
inline u32x16 pair(f32x16 low, f32x16 high) {
#ifdef OPENMIMO_BF16_DOT
  alignas(64) static constexpr uint16_t interleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (u32x16)_mm512_permutexvar_epi16(_mm512_load_si512(interleave), both);
#else
  return (rounded_bits<f32x16, u32x16>(low) >> 16) | (rounded_bits<f32x16, u32x16>(high) & 0xffff0000u);
#endif
}

// The same from two rows of bf16 with `count` entries, a multiple of 16.
inline void pair_rows(const bf16* low, const bf16* high, int64_t count, uint32_t* to) {
  int64_t i = 0;
#ifdef OPENMIMO_AVX512
  alignas(64) static constexpr uint16_t interleave[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i first = _mm512_load_si512(interleave), second = _mm512_load_si512(interleave + 32);
  for (; i + 32 <= count; i += 32) {
    const __m512i a = _mm512_loadu_si512(low + i), b = _mm512_loadu_si512(high + i);
    _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(to + i + 16, _mm512_permutex2var_epi16(a, second, b));
  }
#endif
  for (; i < count; i += LANES)
    store(to + i, widened(load<u16x16>(low + i)) | (widened(load<u16x16>(high + i)) << 16));
}

// ---------------------------------------------------------------- arithmetic

inline f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) {
#ifdef OPENMIMO_AVX512
  return (f32x16)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)mask), (__m512)no, (__m512)yes);
#elif defined(OPENMIMO_AVX2)
  return by_halves([](i32x8 m, f32x8 y, f32x8 n) { return m ? y : n; }, mask, yes, no);
#else
  return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
#endif
}

inline f32x16 maximum(f32x16 a, f32x16 b) {
#ifdef OPENMIMO_AVX512
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(OPENMIMO_AVX2)
  return by_halves([](f32x8 x, f32x8 y) { return (f32x8)_mm256_max_ps((__m256)x, (__m256)y); }, a, b);
#else
  return select((i32x16)(a > b), a, b);
#endif
}

inline f32x16 minimum(f32x16 a, f32x16 b) {
#ifdef OPENMIMO_AVX512
  return (f32x16)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(OPENMIMO_AVX2)
  return by_halves([](f32x8 x, f32x8 y) { return (f32x8)_mm256_min_ps((__m256)x, (__m256)y); }, a, b);
#else
  return select((i32x16)(a < b), a, b);
#endif
}

inline f32x16 square_root(f32x16 x) {
#ifdef OPENMIMO_AVX512
  return (f32x16)_mm512_sqrt_ps((__m512)x);
#elif defined(OPENMIMO_AVX2)
  return by_halves([](f32x8 y) { return (f32x8)_mm256_sqrt_ps((__m256)y); }, x);
#else
  for (int i = 0; i < LANES; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

inline float sum_of(f32x16 x) {
#ifdef OPENMIMO_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  alignas(64) float sums[LANES];
  store(sums, x);
  for (int i = 0; i < 8; ++i) sums[i] += sums[i + 8];
  for (int step = 4; step; step /= 2)
    for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
  return sums[0];
#endif
}

inline float max_of(f32x16 x) {
  alignas(64) float values[LANES];
  store(values, x);
  return *std::max_element(values, values + LANES);
}

// 2^r for r in -0.5 .. 0.5.
template <typename V>
inline V exp2_near_0(V r) {
  V p = r * 1.327647129e-3f + 9.675540961e-3f;
  p = p * r + 5.550713092e-2f;
  p = p * r + 2.402212024e-1f;
  p = p * r + 6.931469440e-1f;
  return p * r + 1.0f;
}

// 2^x with a relative error below 2e-7 where that is a normal number below 2^127; 0 far below.
inline f32x16 exp2_of(f32x16 x) {
#ifdef OPENMIMO_AVX512
  const f32x16 whole = (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (f32x16)_mm512_scalef_ps((__m512)exp2_near_0(x - whole), (__m512)whole);
#elif defined(OPENMIMO_AVX2)
  return by_halves([](f32x8 y) {
    // The second operand is what a comparison with NaN leaves.
    y = (f32x8)_mm256_min_ps(_mm256_set1_ps(127.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), (__m256)y));
    const f32x8 whole = (f32x8)_mm256_round_ps((__m256)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return exp2_near_0(y - whole) * (f32x8)(((i32x8)_mm256_cvtps_epi32((__m256)whole) + 127) << 23);
  }, x);
#else
  x = minimum(splat(127.0f), maximum(splat(-127.0f), x));  // so that NaN stays
  const i32x16 exponent = __builtin_convertvector(x + select((i32x16)(x < 0.0f), splat(-0.5f), splat(0.5f)), i32x16);
  return exp2_near_0(x - __builtin_convertvector(exponent, f32x16)) * (f32x16)((exponent + 127) << 23);
#endif
}

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.69314718055994531f;

inline f32x16 sigmoid(f32x16 x) {
  return 1.0f / (1.0f + exp2_of(minimum(splat(126.0f), maximum(splat(-126.0f), x * -LOG2E))));
}

// ---------------------------------------------------------------- layout

// 16 x 16 words, rows `from_stride` apart -> transposed, rows `to_stride` apart.
inline void transpose_16(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
#ifdef OPENMIMO_AVX512
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int half = 0; half < 16; half += 8)
    for (int i = 0; i < 4; ++i) {
      b[half + i] = _mm512_shuffle_i32x4(a[half + i], a[half + 4 + i], 0x88);
      b[half + 4 + i] = _mm512_shuffle_i32x4(a[half + i], a[half + 4 + i], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
    _mm512_storeu_si512(to + (8 + i) * to_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
  }
#else
  uint32_t block[16][16];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) block[j][i] = from[i * from_stride + j];
  for (int j = 0; j < 16; ++j) std::memcpy(to + j * to_stride, block[j], 64);
#endif
}

// 64-byte aligned memory. Not cleared.
template <typename T>
struct Buffer {
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, round_up(std::max<int64_t>(count, 1) * sizeof(T), 64)))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data; }
  T* data;
};

}  // namespace openmimo
