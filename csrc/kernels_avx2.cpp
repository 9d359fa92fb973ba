// AVX2 and FMA: bf16 words are split into two vectors of floats.
#include <immintrin.h>

#include "words.h"

namespace {

struct Isa {
  static constexpr int LANES = 8, REGISTERS = 8, PLAIN_REGISTERS = 10, WIDE_VECTORS = 2;  // of 16: GCC spills 12
  static constexpr bool WIDER_ALONE = true;
  using Vec = __m256;
  struct Pair { __m256 low, high; };

  static Vec set(float x) { return _mm256_set1_ps(x); }
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static bool any_above(Vec x, float y) { return _mm256_movemask_ps(_mm256_cmp_ps(x, set(y), _CMP_GT_OQ)) != 0; }
  static float reduce_max(Vec x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
  }
  static float reduce_sum(Vec x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
  }
  static Vec keep(Vec x, int first, int last, float other) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i left_out = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane),
                                             _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(last)));
    return _mm256_blendv_ps(x, _mm256_set1_ps(other), _mm256_castsi256_ps(left_out));
  }
  static Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Vec scale(Vec x, Vec n) {
    const __m256i exponent = _mm256_slli_epi32(
        _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-127.0f))), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
  }
  static __m128i narrow(Vec x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i words =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  static void store_bf16(uint32_t* to, Vec low, Vec high) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow(low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + 1, narrow(high));
  }
  static Vec low_half(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
  static Vec high_half(__m256i words) {
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static Vec low_of(const uint8_t* at) { return low_half(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))); }
  static Vec high_of(const uint8_t* at) { return high_half(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))); }
  // The vector units take words from memory and halve them, rather than the other way round.
  static Vec low_of(uint32_t word) { return low_half(_mm256_set1_epi32(static_cast<int>(word))); }
  static Vec high_of(uint32_t word) { return high_half(_mm256_set1_epi32(static_cast<int>(word))); }
  static Pair pair_of_bf16(const uint8_t* at) { return {low_of(at), high_of(at)}; }
  static Pair pair_of_int8(const uint8_t* at) {
    const __m256i both = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(both, 24), 24)),
            _mm256_cvtepi32_ps(_mm256_srai_epi32(both, 8))};
  }
  static __m256 floats_of_e4m3(__m256i codes) {  // one code per lane
    const __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi32(0x7f));
    const __m256 normal = _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23)));
    const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
    const __m256 value = _mm256_blendv_ps(
        normal, small, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude)));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(0x80)), 24);
    return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
  }
  static Pair pair_of_fp8(const uint8_t* at) {
    const __m256i both = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return {floats_of_e4m3(both), floats_of_e4m3(_mm256_srli_epi32(both, 8))};
  }
  static Pair pair_of_int4(const uint8_t* at) {
    const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
    const __m256i eight = _mm256_set1_epi32(8);
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(both, _mm256_set1_epi32(15)), eight)),
            _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(both, 4), eight))};
  }
  static Vec load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static Vec dot(Vec sum, uint32_t word, const Pair& b) {
    return _mm256_fmadd_ps(high_of(word), b.high, _mm256_fmadd_ps(low_of(word), b.low, sum));
  }
};

struct Ints {
  using Vec = __m256i;
  // Bytes 0 and 2, 1 and 3 of every lane as int16: their products and the sum of two are exact.
  struct Bytes { __m256i even, odd; };
  using Word = Bytes;

  static Vec set(int32_t x) { return _mm256_set1_epi32(x); }
  static Isa::Vec floats(Vec x) { return _mm256_cvtepi32_ps(x); }
  static Bytes bytes_of(const uint8_t* at) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return {_mm256_and_si256(x, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(x, 8)};
  }
  static Word word_of(uint32_t word) {
    const __m256i x = _mm256_set1_epi32(static_cast<int>(word));
    return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
  }
  static Vec dot(Vec sum, const Word& word, const Bytes& bytes) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(bytes.even, word.even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(bytes.odd, word.odd));
  }
};

}  // namespace

#include "kernels_impl.h"

OPENMIMO_KERNELS(kernels_avx2, "avx2");
