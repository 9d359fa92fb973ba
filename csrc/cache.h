// Where keys and values of a position live: rings of sliding layers, pages of global ones, and a stretch of scratch.
//
// Keys: one row of words per pair (or single) of dims, positions side by side. Values: one row of padded V words per pair
// (or single) of positions. So both are ready as the second operand of a product.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace openmimo {

struct CacheShape {
  Arithmetic arithmetic = Arithmetic::BF16;
  int qk_words = 0, v_padded = 0, groups = 0;
  int slots = 0;  // positions per ring, page or stretch; even

  int per_word() const { return arithmetic == Arithmetic::F32 ? 1 : 2; }
  int64_t key_words() const { return static_cast<int64_t>(qk_words) * slots; }
  int64_t value_words() const { return static_cast<int64_t>(slots / per_word()) * v_padded; }
  int64_t group_words() const { return key_words() + value_words(); }
  int64_t words() const { return groups * group_words(); }
};

// One key/value head's store.
struct Store {
  CacheShape shape;
  uint32_t* base;

  Store(const CacheShape& shape_, uint32_t* start, int group) : shape(shape_), base(start + group * shape_.group_words()) {}

  uint32_t* keys() const { return base; }
  uint32_t* values() const { return base + shape.key_words(); }

  // `key`: QK words; `value`: `v_dim` floats.
  void write(int slot, const uint32_t* key, const float* value, int v_dim, float value_scale) const;
  // The same slot of another store of the same kind.
  void copy_from(const Store& other, int other_slot, int slot, int v_dim) const;
  // Add `count` lanes from `lane` on, found at `slot`, to a block; `slot` and `lane` even, no wrap.
  void add_to(KeyBlock& block, int slot, int lane, int count) const;
};

}  // namespace openmimo
