// Number formats and element-wise functions. Everything has internal linkage: each translation unit is compiled for its
// own instruction set, and the linker must never merge code of one into another.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;

// Start to load into the second-level cache. Compilers take a function that only prefetches for one without effect and drop
// calls of it, so this one must not remain a function.
[[gnu::always_inline]] inline void fetch_lines(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 0, 2);
}

constexpr float float_from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

constexpr uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }

constexpr float to_float(bf16 x) { return float_from_bits(static_cast<uint32_t>(x) << 16); }

// Round to nearest, ties to even; the result is in the upper half. NaN stays NaN.
constexpr uint32_t rounded_bits(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return x == x ? rounded : 0x7fc00000u;
}

constexpr bf16 to_bf16(float x) { return static_cast<bf16>(rounded_bits(x) >> 16); }

constexpr uint32_t bf16_pair(float low, float high) {
  return (rounded_bits(low) >> 16) | (rounded_bits(high) & 0xffff0000u);
}

// E4M3 without NaN: four bits of exponent, three of mantissa, largest value 448.
constexpr float from_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f
                                    : float_from_bits((magnitude << 20) + (120u << 23));
  return code & 0x80u ? -value : value;
}

// The nearest, ties to even; values beyond 448 become 448.
inline uint8_t to_e4m3(float x) {
  const uint32_t sign = (bits_of(x) >> 24) & 0x80u;
  const float magnitude = std::fabs(x);
  if (!(magnitude < 448.0f)) return static_cast<uint8_t>(sign | 0x7eu);
  if (magnitude < 0x1p-6f) return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::lrintf(magnitude * 512.0f)));
  const uint32_t bits = bits_of(magnitude);
  const uint32_t code = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
  return static_cast<uint8_t>(sign | (code > 0x7eu ? 0x7eu : code));
}

// e^x with a relative error below 3e-7 for -87 <= x <= 88, exactly 0 below. Branch-free, so that compilers vectorise it.
inline float fast_exp(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number.
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const float whole = shifted - 12582912.0f;
  const float r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t exponent = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
  return x < -87.0f ? 0.0f : p * float_from_bits(exponent);
}

inline float sigmoid(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 87.0f ? 87.0f : x);
  return 1.0f / (1.0f + fast_exp(-clamped));
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace
