// The weights of a runtime by name: where each lies, and how it gets there.
#include <stdexcept>

#include "runtime_state.h"

namespace openmimo {
namespace {

std::string slot_name(const std::string& part, int layer, int expert) {
  if (part == "embedding" || part == "norm" || part == "head") return part;
  const std::string name = std::to_string(layer) + "." + part;
  return part.rfind("expert_", 0) == 0 ? name + "." + std::to_string(expert) : name;
}

}  // namespace

void Runtime::declare(const std::string& name, Matrix& matrix, std::vector<int64_t> order, int64_t rows, int64_t columns,
                      Format format, bool quantized_rows) {
  matrix = Matrix(std::move(order), columns, format, quantized_rows);
  slots_[name] = {&matrix, nullptr, rows, columns, false};
}

void Runtime::declare(const std::string& name, float*& vector, int64_t count) {
  slots_[name] = {nullptr, &vector, 1, count, false};
}

void Runtime::declare_weights() {
  const RuntimeConfig& c = config_;
  slots_["embedding"] = {nullptr, nullptr, c.vocab, c.hidden, false};
  declare("norm", norm_, c.hidden);
  declare("head", head_, identity_order(c.vocab), c.vocab, c.hidden, c.format, c.int8_activations);
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = *layers_[i];
    const Geometry& g = geometry(layer);
    const auto name = [&](const std::string& part, int expert = 0) { return slot_name(part, static_cast<int>(i), expert); };
    const auto plain = [&](const std::string& part, Matrix& matrix, int64_t rows, int64_t columns, Format format,
                           bool quantized_rows = false) {
      declare(name(part), matrix, identity_order(rows), rows, columns, format, quantized_rows);
    };
    declare(name("input_norm"), layer.input_norm, c.hidden);
    declare(name("post_norm"), layer.post_norm, c.hidden);
    if (g.sink) declare(name("sinks"), layer.sinks, g.heads);
    plain("qkv", layer.qkv, static_cast<int64_t>(g.heads + g.groups) * g.qk + static_cast<int64_t>(g.groups) * g.v, c.hidden,
          c.format, c.int8_activations);
    plain("o", layer.o, c.hidden, static_cast<int64_t>(g.heads) * g.v, c.format, c.int8_activations);
    if (i >= c.is_sliding.size()) {
      declare(name("embedding_norm"), layer.embedding_norm, c.hidden);
      declare(name("hidden_norm"), layer.hidden_norm, c.hidden);
      declare(name("final_norm"), layer.final_norm, c.hidden);
      plain("join", layer.join, c.hidden, 2 * static_cast<int64_t>(c.hidden), c.format, c.int8_activations);
    }
    if (!layer.moe) {
      declare(name("gate_up"), layer.gate_up, gate_up_order(c.dense_dim), 2 * static_cast<int64_t>(c.dense_dim), c.hidden,
              c.format, c.int8_activations);
      // What SwiGLU gives has single large numbers, beside which 8 bits would lose the others.
      plain("down", layer.down, c.hidden, c.dense_dim, c.format);
      continue;
    }
    plain("router", layer.router, c.experts, c.hidden, Format::F32);
    declare(name("router_bias"), layer.router_bias, c.experts);
    layer.experts_gate_up.resize(c.experts);
    layer.experts_down.resize(c.experts);
    for (int e = 0; e < c.experts; ++e) {
      declare(name("expert_gate_up", e), layer.experts_gate_up[e], gate_up_order(c.expert_dim),
              2 * static_cast<int64_t>(c.expert_dim), c.hidden, c.format, c.int8_activations);
      declare(name("expert_down", e), layer.experts_down[e], identity_order(c.hidden), c.hidden, c.expert_dim, c.format);
    }
  }
  Arena counting;
  place_weights(counting);
  weight_bytes_ = counting.used();
}

// In the order of the slots' names, which depends on the model's shape alone.
void Runtime::place_weights(Arena& arena) {
  for (auto& [name, slot] : slots_) {
    if (slot.matrix) {
      slot.matrix->place(arena);
    } else if (slot.vector) {
      *slot.vector = reinterpret_cast<float*>(arena.take(slot.columns * 4));
    } else {
      const bool wide = config_.arithmetic == Arithmetic::F32;
      uint8_t* memory = arena.take(slot.rows * slot.columns * (wide ? 4 : 2));
      if (wide) embedding_f32_ = reinterpret_cast<float*>(memory);
      else embedding_bf16_ = reinterpret_cast<uint16_t*>(memory);
    }
  }
}

bool Runtime::open_weights(const std::string& path, const std::string& fingerprint) {
  if (!weights_.open(path, fingerprint, weight_bytes_, pool_)) return false;
  Arena arena(weights_.data());
  place_weights(arena);
  for (auto& [name, slot] : slots_) slot.is_set = true;
  return true;
}

void Runtime::create_weights(const std::string& path) {
  weights_.create(path, weight_bytes_);
  Arena arena(weights_.data());
  place_weights(arena);
}

void Runtime::finish_weights(const std::string& fingerprint) {
  check_complete();
  weights_.finish(fingerprint, pool_);
}

void Runtime::set(const std::string& part, int layer, int expert, const Source& source) {
  const auto found = slots_.find(slot_name(part, layer, expert));
  if (found == slots_.end())
    throw std::invalid_argument("no weight " + slot_name(part, layer, expert) + " in a model of this shape");
  Slot& slot = found->second;
  if (source.rows != slot.rows || source.columns != slot.columns)
    throw std::invalid_argument(found->first + " has shape (" + std::to_string(source.rows) + ", " +
                                std::to_string(source.columns) + "), expected (" + std::to_string(slot.rows) + ", " +
                                std::to_string(slot.columns) + ")");
  if (source.row_scales && !(slot.matrix && slot.matrix->format() == Format::FP8))
    throw std::invalid_argument(found->first + " is not kept in FP8, so it takes numbers, not E4M3 codes");
  if (!weights_.data()) {
    weights_.allocate(weight_bytes_);
    Arena arena(weights_.data());
    place_weights(arena);
  }
  if (!weights_.writable())
    throw std::invalid_argument("weights from a packed file cannot be changed; load the model from its folder instead");
  if (slot.matrix) {
    slot.matrix->pack(source, pool_);
  } else if (slot.vector) {
    for (int64_t i = 0; i < slot.columns; ++i) (*slot.vector)[i] = source.at(0, i);
  } else {
    pool_.run([&](int thread) {
      const auto [begin, end] = share(slot.rows, thread, pool_.size());
      for (int64_t row = begin; row < end; ++row)
        for (int64_t i = 0; i < slot.columns; ++i) {
          const float x = source.at(row, i);
          if (embedding_f32_) embedding_f32_[row * slot.columns + i] = x;
          else embedding_bf16_[row * slot.columns + i] = to_bf16(x);
        }
    });
  }
  slot.is_set = true;
}

void Runtime::check_complete() const {
  for (const auto& [name, slot] : slots_)
    if (!slot.is_set) throw std::invalid_argument("the weights are incomplete: " + name + " is missing");
}

}  // namespace openmimo
