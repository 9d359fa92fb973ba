// Plain C++ for every processor. Eight lanes, so that compilers can use what vectors the target has.
#include "words.h"

namespace {

struct Isa {
  static constexpr int LANES = 8, REGISTERS = 4, PLAIN_REGISTERS = 4, WIDE_VECTORS = 2;
  static constexpr bool WIDER_ALONE = false;
  struct Vec { float v[LANES]; };
  struct Pair { Vec low, high; };

  static Vec set(float x) {
    Vec r;
    for (float& v : r.v) v = x;
    return r;
  }
  static Vec zero() { return set(0.0f); }
  static Vec load(const float* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static void store(float* p, const Vec& x) { std::memcpy(p, x.v, sizeof x.v); }
  static Vec add(Vec a, const Vec& b) {
    for (int i = 0; i < LANES; ++i) a.v[i] += b.v[i];
    return a;
  }
  static Vec sub(Vec a, const Vec& b) {
    for (int i = 0; i < LANES; ++i) a.v[i] -= b.v[i];
    return a;
  }
  static Vec mul(Vec a, const Vec& b) {
    for (int i = 0; i < LANES; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static Vec fma(const Vec& a, const Vec& b, Vec c) {
    for (int i = 0; i < LANES; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static Vec max(Vec a, const Vec& b) {
    for (int i = 0; i < LANES; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  static bool any_above(const Vec& x, float y) {
    bool any = false;
    for (float v : x.v) any |= v > y;
    return any;
  }
  static float reduce_max(const Vec& x) {
    float r = x.v[0];
    for (float v : x.v) r = v > r ? v : r;
    return r;
  }
  static float reduce_sum(const Vec& x) {
    float r = 0.0f;
    for (float v : x.v) r += v;
    return r;
  }
  static Vec keep(Vec x, int first, int last, float other) {
    for (int i = 0; i < LANES; ++i) x.v[i] = i >= first && i <= last ? x.v[i] : other;
    return x;
  }
  static Vec nearest(Vec x) {  // adding and taking away 1.5 * 2^23 rounds; larger numbers are whole already
    for (float& v : x.v) v = std::fabs(v) < 0x1p22f ? (v + 12582912.0f) - 12582912.0f : v;
    return x;
  }
  static Vec scale(Vec x, const Vec& n) {
    for (int i = 0; i < LANES; ++i) {
      const float whole = n.v[i] < -127.0f ? -127.0f : n.v[i];
      x.v[i] *= float_from_bits(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
    }
    return x;
  }
  static void store_bf16(uint32_t* to, const Vec& low, const Vec& high) {
    for (int i = 0; i < LANES / 2; ++i) to[i] = bf16_pair(low.v[2 * i], low.v[2 * i + 1]);
    for (int i = 0; i < LANES / 2; ++i) to[LANES / 2 + i] = bf16_pair(high.v[2 * i], high.v[2 * i + 1]);
  }
  static Pair pair_of_bf16(const uint8_t* at) {
    Pair r;
    uint32_t words[LANES];
    std::memcpy(words, at, sizeof words);
    for (int i = 0; i < LANES; ++i) {
      r.low.v[i] = float_from_bits(words[i] << 16);
      r.high.v[i] = float_from_bits(words[i] & 0xffff0000u);
    }
    return r;
  }
  static Pair pair_of_int8(const uint8_t* at) {
    Pair r;
    for (int i = 0; i < LANES; ++i) {
      r.low.v[i] = static_cast<float>(static_cast<int8_t>(at[2 * i]));
      r.high.v[i] = static_cast<float>(static_cast<int8_t>(at[2 * i + 1]));
    }
    return r;
  }
  static Pair pair_of_fp8(const uint8_t* at) {
    Pair r;
    for (int i = 0; i < LANES; ++i) {
      r.low.v[i] = from_e4m3(at[2 * i]);
      r.high.v[i] = from_e4m3(at[2 * i + 1]);
    }
    return r;
  }
  static Pair pair_of_int4(const uint8_t* at) {
    Pair r;
    for (int i = 0; i < LANES; ++i) {
      r.low.v[i] = static_cast<float>((at[i] & 15) - 8);
      r.high.v[i] = static_cast<float>((at[i] >> 4) - 8);
    }
    return r;
  }
  static Vec load_bf16(const uint16_t* p) {
    Vec r;
    for (int i = 0; i < LANES; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  static Vec dot(Vec sum, uint32_t word, const Pair& b) {
    const float low = float_from_bits(word << 16), high = float_from_bits(word & 0xffff0000u);
    for (int i = 0; i < LANES; ++i) sum.v[i] += low * b.low.v[i];
    for (int i = 0; i < LANES; ++i) sum.v[i] += high * b.high.v[i];
    return sum;
  }
};

struct Ints {
  static constexpr int LANES = Isa::LANES;
  struct Vec { int32_t v[LANES]; };
  struct Bytes { uint8_t v[LANES][4]; };
  struct Word { int8_t v[4]; };

  static Vec set(int32_t x) {
    Vec r;
    for (int32_t& v : r.v) v = x;
    return r;
  }
  static Isa::Vec floats(const Vec& x) {
    Isa::Vec r;
    for (int i = 0; i < LANES; ++i) r.v[i] = static_cast<float>(x.v[i]);
    return r;
  }
  static Bytes bytes_of(const uint8_t* at) {
    Bytes r;
    std::memcpy(r.v, at, sizeof r.v);
    return r;
  }
  static Word word_of(uint32_t word) { return std::bit_cast<Word>(word); }
  static Vec dot(Vec sum, const Word& word, const Bytes& bytes) {
    for (int i = 0; i < LANES; ++i)
      for (int part = 0; part < 4; ++part) sum.v[i] += int32_t{word.v[part]} * int32_t{bytes.v[i][part]};
    return sum;
  }
};

}  // namespace

#include "kernels_impl.h"

OPENMIMO_KERNELS(kernels_scalar, "scalar");
