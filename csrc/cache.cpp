#include "cache.h"

#include "words.h"

namespace openmimo {

void Store::write(int slot, const uint32_t* key, const float* value, int v_dim, float value_scale) const {
  uint32_t* k = keys() + slot;
  for (int w = 0; w < shape.qk_words; ++w) k[static_cast<int64_t>(w) * shape.slots] = key[w];
  if (shape.arithmetic == Arithmetic::F32) {
    uint32_t* v = values() + static_cast<int64_t>(slot) * shape.v_padded;
    for (int i = 0; i < v_dim; ++i) v[i] = bits_of(value[i] * value_scale);
  } else {
    auto* v = reinterpret_cast<uint16_t*>(values() + static_cast<int64_t>(slot / 2) * shape.v_padded) + slot % 2;
    for (int i = 0; i < v_dim; ++i) v[2 * i] = to_bf16(value[i] * value_scale);
  }
}

void Store::copy_from(const Store& other, int other_slot, int slot, int v_dim) const {
  for (int w = 0; w < shape.qk_words; ++w)
    keys()[static_cast<int64_t>(w) * shape.slots + slot] =
        other.keys()[static_cast<int64_t>(w) * other.shape.slots + other_slot];
  if (shape.arithmetic == Arithmetic::F32) {
    std::memcpy(values() + static_cast<int64_t>(slot) * shape.v_padded,
                other.values() + static_cast<int64_t>(other_slot) * shape.v_padded, v_dim * sizeof(uint32_t));
  } else {
    auto* to = reinterpret_cast<uint16_t*>(values() + static_cast<int64_t>(slot / 2) * shape.v_padded) + slot % 2;
    const auto* from = reinterpret_cast<const uint16_t*>(
                           other.values() + static_cast<int64_t>(other_slot / 2) * shape.v_padded) + other_slot % 2;
    for (int i = 0; i < v_dim; ++i) to[2 * i] = from[2 * i];
  }
}

void Store::add_to(KeyBlock& block, int slot, int lane, int count) const {
  block.keys[block.num_keys++] = {keys() + slot, shape.slots, lane, count};
  const int per = shape.per_word();
  block.values[block.num_values++] = {values() + static_cast<int64_t>(slot / per) * shape.v_padded, lane / per, count / per};
}

}  // namespace openmimo
