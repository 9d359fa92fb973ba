// Where keys and values of a position live: rings of sliding layers, pages of global ones, and a stretch of scratch.
//
// Keys: one row of words per pair (or single) of dims, positions side by side. Values: one row of padded V words per pair
// (or single) of positions. So both are ready as the second operand of a product. In 8 bits a word is two signed bytes, and
// scales follow: one float per position for its key, then one for its value.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace openmimo {

struct CacheShape {
  Arithmetic arithmetic = Arithmetic::BF16;
  bool int8 = false;
  int qk_words = 0, v_padded = 0, groups = 0;
  int slots = 0;  // positions per ring, page or stretch; even

  int per_word() const { return arithmetic == Arithmetic::F32 ? 1 : 2; }
  int word_bytes() const { return int8 ? 2 : 4; }
  int64_t key_bytes() const { return static_cast<int64_t>(qk_words) * slots * word_bytes(); }
  int64_t value_bytes() const { return static_cast<int64_t>(slots / per_word()) * v_padded * word_bytes(); }
  int64_t scale_bytes() const { return int8 ? int64_t{2} * slots * 4 : 0; }
  // Of one group; stores begin at whole 32-bit words.
  int64_t group_words() const { return (key_bytes() + value_bytes() + scale_bytes()) / 4; }
  int64_t words() const { return groups * group_words(); }
};

// One key/value head's store.
struct Store {
  CacheShape shape;
  uint8_t* base;

  Store(const CacheShape& shape_, uint32_t* start, int group)
      : shape(shape_), base(reinterpret_cast<uint8_t*>(start + group * shape_.group_words())) {}

  // The word of a slot in the first row of keys; the row of values that a slot is in.
  uint8_t* key(int slot) const { return base + static_cast<int64_t>(slot) * shape.word_bytes(); }
  uint8_t* value_row(int slot) const {
    return base + shape.key_bytes() + static_cast<int64_t>(slot / shape.per_word()) * shape.v_padded * shape.word_bytes();
  }
  int64_t key_stride() const { return static_cast<int64_t>(shape.slots) * shape.word_bytes(); }
  // From a slot on; null where numbers have no scales.
  float* key_scales(int slot) const {
    return shape.int8 ? reinterpret_cast<float*>(base + shape.key_bytes() + shape.value_bytes()) + slot : nullptr;
  }
  float* value_scales(int slot) const { return shape.int8 ? key_scales(slot) + shape.slots : nullptr; }

  // `key`: QK words; `value`: `v_dim` floats.
  void write(int slot, const uint32_t* key, const float* value, int v_dim, float value_scale) const;
  // The same slot of another store of the same kind.
  void copy_from(const Store& other, int other_slot, int slot, int v_dim) const;
  // Add `count` lanes from `lane` on, found at `slot`, to a block; `slot` and `lane` even, no wrap.
  void add_to(KeyBlock& block, int slot, int lane, int count) const;
  void add_keys_to(KeyBlock& block, int slot, int lane, int count) const;
  void add_values_to(KeyBlock& block, int slot, int lane, int count) const;
};

}  // namespace openmimo
