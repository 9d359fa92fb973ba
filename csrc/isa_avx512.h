// AVX-512 (F, BW, DQ, VL): bf16 words by the dot instruction where the file is compiled for it, else by two products;
// whole numbers likewise (VNNI).
#pragma once

#include <immintrin.h>

#include "words.h"

namespace {

// Computed by the compiler: nothing of this file may run before the processor is known to have AVX-512.
struct Tables {
  alignas(64) uint16_t e4m3[128] = {};
  alignas(64) uint32_t int4_low[16] = {};
  alignas(64) uint32_t int4_high[16] = {};
  constexpr Tables() {
    for (int code = 0; code < 128; ++code) e4m3[code] = to_bf16(from_e4m3(static_cast<uint8_t>(code)));
    for (int i = 0; i < 16; ++i) {
      int4_low[i] = to_bf16(static_cast<float>(i - 8));
      int4_high[i] = int4_low[i] << 16;
    }
  }
};
constexpr Tables tables;

struct Isa {
  static constexpr int LANES = 16, REGISTERS = 24, PLAIN_REGISTERS = 24, WIDE_VECTORS = 4;
  static constexpr bool WIDER_ALONE = false;
  using Vec = __m512;

  static Vec set(float x) { return _mm512_set1_ps(x); }
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static bool any_above(Vec x, float y) { return _mm512_cmp_ps_mask(x, set(y), _CMP_GT_OQ) != 0; }
  static float reduce_max(Vec x) { return _mm512_reduce_max_ps(x); }
  static float reduce_sum(Vec x) { return _mm512_reduce_add_ps(x); }

  // Lanes `first` to `last` of x (any whole numbers), `other` elsewhere.
  static Vec keep(Vec x, int first, int last, float other) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 kept = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(first)) &
                           _mm512_cmple_epi32_mask(lane, _mm512_set1_epi32(last));
    return _mm512_mask_blend_ps(kept, _mm512_set1_ps(other), x);
  }
  static Vec nearest(Vec x) { return _mm512_roundscale_ps(x, 0); }
  // x * 2^n for whole n, with a graceful end at 0.
  static Vec scale(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
  // Two vectors as bf16 side by side.
  static void store_bf16(uint32_t* to, Vec low, Vec high) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + 1, narrow(high));
#endif
  }
  // Numbers and the usual NaN, as the instruction rounds.
  static __m256i narrow(Vec x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
  }

  // The two halves of sixteen int16 as floats: whole numbers up to 127 are exact in bf16 too.
  static void floats_of_int8(const uint8_t* at, __m512& low, __m512& high) {
    const __m512i both = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    low = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(both, 24), 24));
    high = _mm512_cvtepi32_ps(_mm512_srai_epi32(both, 8));
  }

  static Vec load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }

  // Thirty-two E4M3 codes as bf16: the magnitude's seven bits index a table of 128 in four registers.
  static __m512i words_of_fp8(const uint8_t* at) {
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    const __m512i low = _mm512_permutex2var_epi16(_mm512_load_si512(tables.e4m3), codes,
                                                  _mm512_load_si512(tables.e4m3 + 32));
    const __m512i high = _mm512_permutex2var_epi16(_mm512_load_si512(tables.e4m3 + 64), codes,
                                                   _mm512_load_si512(tables.e4m3 + 96));
    const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
    const __m512i magnitude = _mm512_mask_blend_epi16(upper, low, high);
    // magnitude | ((codes << 8) & 0x8000)
    return _mm512_ternarylogic_epi32(magnitude, _mm512_slli_epi16(codes, 8), _mm512_set1_epi16(static_cast<short>(0x8000)),
                                     0xf8);
  }

  // Sixteen pairs of four bits: each half indexes a table of sixteen bf16 values, in the word's lower or upper half.
  static __m512i words_of_int4(const uint8_t* at) {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return _mm512_or_si512(_mm512_permutexvar_epi32(both, _mm512_load_si512(tables.int4_low)),
                           _mm512_permutexvar_epi32(_mm512_srli_epi32(both, 4), _mm512_load_si512(tables.int4_high)));
  }

#if defined(__AVX512BF16__)
  using Pair = __m512i;
  static Pair pair_of_bf16(const uint8_t* at) { return _mm512_loadu_si512(at); }
  static Pair pair_of_fp8(const uint8_t* at) { return words_of_fp8(at); }
  static Pair pair_of_int4(const uint8_t* at) { return words_of_int4(at); }
  static Pair pair_of_int8(const uint8_t* at) {
    __m512 low, high;
    floats_of_int8(at, low, high);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    // (high & upper) | (low >> 16)
    return _mm512_ternarylogic_epi32(_mm512_castps_si512(high), upper, _mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                     0xea);
  }
  static Vec dot(Vec sum, uint32_t word, Pair b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(word)), (__m512bh)b);
  }
#else
  struct Pair { __m512 low, high; };
  static Pair pair_of_fp8(const uint8_t* at) { return split(words_of_fp8(at)); }
  static Pair pair_of_int4(const uint8_t* at) { return split(words_of_int4(at)); }
  static Pair pair_of_bf16(const uint8_t* at) { return split(_mm512_loadu_si512(at)); }
  static Pair split(__m512i words) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static Pair pair_of_int8(const uint8_t* at) {
    Pair r;
    floats_of_int8(at, r.low, r.high);
    return r;
  }
  static Vec dot(Vec sum, uint32_t word, const Pair& b) {
    sum = _mm512_fmadd_ps(_mm512_set1_ps(float_from_bits(word << 16)), b.low, sum);
    return _mm512_fmadd_ps(_mm512_set1_ps(float_from_bits(word & 0xffff0000u)), b.high, sum);
  }
#endif
};

struct Ints {
  using Vec = __m512i;
  static Vec set(int32_t x) { return _mm512_set1_epi32(x); }
  static Vec load(const float* p) { return _mm512_loadu_si512(p); }
  static Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static Isa::Vec floats(Vec x) { return _mm512_cvtepi32_ps(x); }
#if defined(__AVX512VNNI__)
  using Bytes = __m512i;
  using Word = __m512i;
  static Bytes bytes_of(const uint8_t* at) { return _mm512_loadu_si512(at); }
  static Word word_of(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
  static Vec dot(Vec sum, Word word, Bytes bytes) { return _mm512_dpbusd_epi32(sum, bytes, word); }
#else
  // Bytes 0 and 2, 1 and 3 of every lane as int16: their products and the sum of two are exact.
  struct Bytes { __m512i even, odd; };
  using Word = Bytes;
  static Bytes bytes_of(const uint8_t* at) {
    const __m512i x = _mm512_loadu_si512(at);
    return {_mm512_and_si512(x, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(x, 8)};
  }
  static Word word_of(uint32_t word) {
    const __m512i x = _mm512_set1_epi32(static_cast<int>(word));
    return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
  }
  static Vec dot(Vec sum, const Word& word, const Bytes& bytes) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(bytes.even, word.even));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(bytes.odd, word.odd));
  }
#endif
};

}  // namespace
