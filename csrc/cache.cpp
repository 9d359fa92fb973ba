#include "cache.h"

#include <algorithm>

#include "words.h"

namespace openmimo {
namespace {

// x as signed bytes with the scale max|x| / 127, which is returned; `together` neighbours, then a stride.
float write_bytes(const float* x, int count, uint8_t* to, int together, int64_t stride) {
  float most = 0.0f;
  for (int i = 0; i < count; ++i) most = std::max(most, std::fabs(x[i]));
  const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
  for (int i = 0; i < count; ++i)
    to[i / together * stride + i % together] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(x[i] * inverse)));
  return most / 127.0f;
}

}  // namespace

void Store::write(int slot, const uint32_t* words, const float* value, int v_dim, float value_scale) const {
  uint8_t* keys = key(slot);
  const int64_t stride = key_stride();
  if (shape.int8) {
    float x[1024 + 1];
    for (int w = 0; w < shape.qk_words; ++w) {
      x[2 * w] = float_from_bits(words[w] << 16);
      x[2 * w + 1] = float_from_bits(words[w] & 0xffff0000u);
    }
    *key_scales(slot) = write_bytes(x, 2 * shape.qk_words, keys, 2, stride);
    for (int i = 0; i < v_dim; ++i) x[i] = value[i] * value_scale;
    *value_scales(slot) = write_bytes(x, v_dim, value_row(slot) + slot % 2, 1, 2);
    return;
  }
  for (int w = 0; w < shape.qk_words; ++w) std::memcpy(keys + w * stride, words + w, 4);
  if (shape.arithmetic == Arithmetic::F32) {
    auto* v = reinterpret_cast<float*>(value_row(slot));
    for (int i = 0; i < v_dim; ++i) v[i] = value[i] * value_scale;
  } else {
    auto* v = reinterpret_cast<bf16*>(value_row(slot)) + slot % 2;
    for (int i = 0; i < v_dim; ++i) v[2 * i] = to_bf16(value[i] * value_scale);
  }
}

void Store::copy_from(const Store& other, int other_slot, int slot, int v_dim) const {
  const int64_t stride = key_stride(), other_stride = other.key_stride();
  uint8_t* to = key(slot);
  const uint8_t* from = other.key(other_slot);
  if (shape.int8) {
    for (int w = 0; w < shape.qk_words; ++w) std::memcpy(to + w * stride, from + w * other_stride, 2);
    uint8_t* v = value_row(slot) + slot % 2;
    const uint8_t* theirs = other.value_row(other_slot) + other_slot % 2;
    for (int i = 0; i < v_dim; ++i) v[2 * i] = theirs[2 * i];
    *key_scales(slot) = *other.key_scales(other_slot);
    *value_scales(slot) = *other.value_scales(other_slot);
    return;
  }
  for (int w = 0; w < shape.qk_words; ++w) std::memcpy(to + w * stride, from + w * other_stride, 4);
  if (shape.arithmetic == Arithmetic::F32) {
    std::memcpy(value_row(slot), other.value_row(other_slot), v_dim * sizeof(float));
  } else {
    auto* v = reinterpret_cast<bf16*>(value_row(slot)) + slot % 2;
    const auto* theirs = reinterpret_cast<const bf16*>(other.value_row(other_slot)) + other_slot % 2;
    for (int i = 0; i < v_dim; ++i) v[2 * i] = theirs[2 * i];
  }
}

void Store::add_keys_to(KeyBlock& block, int slot, int lane, int count) const {
  block.keys[block.num_keys++] = {key(slot), key_stride(), lane, count, key_scales(slot)};
}

void Store::add_values_to(KeyBlock& block, int slot, int lane, int count) const {
  const int per = shape.per_word();
  block.values[block.num_values++] = {value_row(slot), lane / per, count / per, value_scales(slot)};
}

void Store::add_to(KeyBlock& block, int slot, int lane, int count) const {
  add_keys_to(block, slot, lane, count);
  add_values_to(block, slot, lane, count);
}

}  // namespace openmimo
