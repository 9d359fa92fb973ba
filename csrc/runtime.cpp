#include "runtime.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "runtime_state.h"
#include "words.h"

namespace openmimo {

Runtime::Runtime(RuntimeConfig config)
    : config_(std::move(config)), kernels_(choose_kernels(config_.kernels)), pool_(config_.threads) {
  const RuntimeConfig& c = config_;
  const bool packed = c.arithmetic == Arithmetic::BF16;
  if ((c.arithmetic == Arithmetic::F32) != (c.format == Format::F32))
    throw std::invalid_argument("fp32 arithmetic needs fp32 weights, and bf16 arithmetic bf16 or int8 weights");
  if (c.int8_activations && c.format != Format::INT8 && c.format != Format::INT8_BLOCK)
    throw std::invalid_argument("activations=\"int8\" needs weights=\"int8\" or \"int8_block\"");
  if (c.int8_cache && !packed) throw std::invalid_argument("cache=\"int8\" needs bf16 arithmetic, not weights=\"float32\"");
  if (packed && (c.hidden % 2 || c.global.v % 2 || c.sliding.v % 2))
    throw std::invalid_argument("bf16 arithmetic needs even hidden and V sizes; use weights=\"float32\"");
  if (std::max({c.global.qk, c.sliding.qk, c.global.v, c.sliding.v}) > 1024)
    throw std::invalid_argument("head sizes above 1024 are not supported");
  int64_t ring_words = 0, page_words = 0;
  int sparse = 0;
  const int count = static_cast<int>(c.is_sliding.size()) + c.mtp_heads;
  for (int i = 0; i < count; ++i) {
    auto layer = std::make_unique<Layer>();
    const bool is_head = i >= static_cast<int>(c.is_sliding.size());
    layer->sliding = is_head || c.is_sliding[i];
    layer->moe = !is_head && c.is_moe[i];
    if (layer->moe) layer->sparse_index = sparse++;
    const Geometry& g = layer->sliding ? c.sliding : c.global;
    layer->cache.arithmetic = c.arithmetic;
    layer->cache.int8 = c.int8_cache;
    layer->cache.qk_words = static_cast<int>(words_for(c.arithmetic, g.qk));
    layer->cache.v_padded = static_cast<int>(round_up(g.v, 16));
    layer->cache.groups = g.groups;
    layer->cache.slots = layer->sliding ? static_cast<int>(round_up(g.window + c.mtp_heads, 2)) : BLOCK;
    int64_t& total = layer->sliding ? ring_words : page_words;
    layer->offset = total;
    total += layer->cache.words();
    layers_.push_back(std::move(layer));
  }
  declare_weights();
  ring_words_ = ring_words;
  page_words_ = page_words;
  short_tokens_ = std::min(attention_tile(c.global), attention_tile(c.sliding));
  rings_ = Buffer<uint32_t>(ring_words * c.num_rows);
  pages_ = Buffer<uint32_t>(page_words * c.num_pages);
  histories_.resize(c.num_rows);
  for (auto& history : histories_) history.next.assign(c.mtp_heads, 0);
  main_ = std::make_unique<Step>(c, c.max_step_tokens);
  if (c.mtp_heads > 0)
    heads_ = std::make_unique<Step>(c, std::max(c.num_rows * (MAX_BACKLOG + c.mtp_heads + 1), layers_.back()->cache.slots));
  for (int thread = 0; thread <= pool_.size(); ++thread)
    locals_.push_back(std::make_unique<Local>(c, std::max(main_->capacity, heads_ ? heads_->capacity : 0),
                                              thread == pool_.size(), round_up(std::max(c.global.v, c.sliding.v), 16)));
}

Runtime::~Runtime() = default;

const Geometry& Runtime::geometry(const Layer& layer) const {
  return layer.sliding ? config_.sliding : config_.global;
}

Runtime::Local& Runtime::local(const Step& step, int thread) {
  return step.replicated ? *locals_[thread] : *locals_.back();
}

CacheShape Runtime::sliding_shape() const {
  for (const auto& layer : layers_)
    if (layer->sliding) return layer->cache;
  return {};
}

Store Runtime::ring(const Layer& layer, int row, int group) {
  return {layer.cache, rings_.data() + row * ring_words_ + layer.offset, group};
}

// Pages of one layer and group lie side by side, so that a long context is read in a stream where its pages follow each other.
Store Runtime::page(const Layer& layer, int32_t number, int group) {
  const int64_t words = layer.cache.group_words();
  return {layer.cache, pages_.data() + (layer.offset + group * words) * config_.num_pages + number * words, 0};
}

// What attention reads first of a group.
Store Runtime::first_store(const Layer& layer, const Sequence& s, int group) {
  return layer.sliding ? ring(layer, s.row, group) : page(layer, s.pages[0], group);
}

void Runtime::embed(int32_t token, float* out) const {
  const int64_t at = static_cast<int64_t>(token) * config_.hidden;
  if (embedding_f32_) {
    std::memcpy(out, embedding_f32_ + at, config_.hidden * sizeof(float));
  } else {
    for (int i = 0; i < config_.hidden; ++i) out[i] = to_float(embedding_bf16_[at + i]);
  }
}

// Angles as the published code computes them: all in fp32.
void Runtime::ensure_angles(int64_t positions) {
  if (positions <= num_angles_) return;
  const int64_t target = round_up(positions, 1024);
  for (int kind = 0; kind < 2; ++kind) {
    const Geometry& g = kind ? config_.sliding : config_.global;
    angles_[kind].resize(target * 2 * g.rotary_half);
    for (int64_t position = num_angles_; position < target; ++position)
      for (int i = 0; i < g.rotary_half; ++i) {
        const float exponent = static_cast<float>(2 * i) / static_cast<float>(2 * g.rotary_half);
        const float angle = static_cast<float>(position) * (1.0f / std::pow(g.theta, exponent));
        float* row = angles_[kind].data() + position * 2 * g.rotary_half;
        row[i] = std::cos(angle);
        row[g.rotary_half + i] = std::sin(angle);
      }
  }
  num_angles_ = target;
}

void Runtime::prepare(Step& step, const std::vector<Sequence>& sequences) {
  step.sequences = sequences;
  step.n = 0;
  step.num_queries = 0;
  step.has_linear = false;
  int64_t most = 0, linear_slots = 0;
  for (Sequence& s : step.sequences) {
    s.offset = step.n;
    s.query_offset = step.num_queries;
    for (int i = 0; i < s.count; ++i) {
      step.position[step.n] = static_cast<int32_t>(s.start + i);
      step.owner[step.n++] = static_cast<int32_t>(&s - step.sequences.data());
    }
    step.num_queries += s.count - s.query_from;
    // More tokens than a ring has room for beside the window: attention works on a copy of the old keys and the new.
    s.is_long = s.count - s.query_from > 0 && s.count > 1 + config_.mtp_heads;
    s.linear_first = std::max<int64_t>(0, (s.start - config_.sliding.window + 1)) / BLOCK * BLOCK;
    s.linear_slots = static_cast<int>(round_up(s.start + s.count - s.linear_first, BLOCK));
    s.linear_offset = linear_slots;
    if (s.is_long) linear_slots += s.linear_slots;
    step.has_linear |= s.is_long;
    most = std::max<int64_t>(most, s.start + s.count);
  }
  step.is_short = true;
  for (const Sequence& s : step.sequences)  // one attention tile per group, and queries that need it
    step.is_short &= s.count <= 1 + config_.mtp_heads && s.query_from < s.count && s.count <= short_tokens_;
  step.replicated = step.n <= std::max<int64_t>(4, 4096 / config_.hidden);
  for (auto& l : locals_) l->pending = Pending::NONE;
  if (step.has_linear) step.reserve_linear(linear_slots, sliding_shape());
  ensure_angles(most);
}

// x += what the phase before left.
void Runtime::absorb(Step& step, Local& l, int64_t begin, int64_t end, int thread) {
  const int64_t dim = config_.hidden;
  const Pending pending = locals_[thread]->pending;
  const float* parts[MAX_CHOICES];
  for (int64_t n = begin; n < end; ++n) {
    float* x = l.x.data() + n * dim;
    if (pending == Pending::ROWS) {
      parts[0] = step.y.data() + n * step.y_stride;
      kernels_.add(x, parts, nullptr, 1, dim);
    } else if (pending == Pending::EXPERTS) {
      for (int j = 0; j < config_.top_k; ++j)
        parts[j] = step.y.data() + static_cast<int64_t>(locals_[thread]->place[n * config_.top_k + j]) * step.y_stride;
      kernels_.add(x, parts, l.weights.data() + n * config_.top_k, config_.top_k, dim);
    }
  }
}

void Runtime::norm_rows(Step& step, Local& l, int64_t begin, int64_t end, const float* weight) {
  for (int64_t n = begin; n < end; ++n) {
    uint32_t* words = l.normed.data() + n * step.hidden_words;
    kernels_.norm(config_.arithmetic, l.x.data() + n * config_.hidden, weight, config_.hidden, config_.eps, words);
    if (config_.int8_activations)
      kernels_.quantize(words, config_.hidden, l.quantized.data() + n * quantized_words(config_.hidden));
  }
}

const uint32_t* Runtime::normed_row(const Step& step, const Local& l, int64_t n) const {
  return config_.int8_activations ? l.quantized.data() + n * quantized_words(config_.hidden)
                                  : l.normed.data() + n * step.hidden_words;
}

// The attended rows, when all threads have written them, for the output projection of `values` inputs.
void Runtime::use_attended(Step& step, int64_t values, int thread) {
  auto& rows = locals_[thread]->rows;
  const int64_t count = step.num_queries, length = quantized_words(values);
  if (!config_.int8_activations) {
    for (int64_t i = 0; i < count; ++i) rows[i] = step.attended.data() + i * step.attended_words;
    return;
  }
  uint32_t* quantized = local(step, thread).quantized.data();
  const auto [begin, end] = step.query_rows_of(thread, pool_.size());
  for (int64_t i = begin; i < end; ++i)
    kernels_.quantize(step.attended.data() + i * step.attended_words, values, quantized + i * length);
  for (int64_t i = 0; i < count; ++i) rows[i] = quantized + i * length;
  if (!step.replicated) pool_.barrier();
}

// out = rows times the matrix: each thread takes a run of panels or, of many rows and panels that do not come out even, a run
// of rows.
void Runtime::project(const Matrix& matrix, const uint32_t* const* rows, int64_t num_rows, float* out, int64_t stride,
                      int thread) {
  const int threads = pool_.size();
  if (matrix.panels() % threads != 0 && matrix.panels() < 16 * threads && num_rows >= TILE_ROWS * threads) {
    const auto [first, last] = share(num_rows, thread, threads);
    for (int64_t panel = 0; panel < matrix.panels(); ++panel)
      matrix.multiply(kernels_, panel, rows + first, static_cast<int>(last - first), out + first * stride + panel * PANEL,
                      stride);
    return;
  }
  const auto [begin, end] = share(matrix.panels(), thread, threads);
  for (int64_t panel = begin; panel < end; ++panel)
    matrix.multiply(kernels_, panel, rows, static_cast<int>(num_rows), out + panel * PANEL, stride);
}

void Runtime::forward(const int32_t* tokens, std::vector<Sequence> sequences, const int32_t* wanted, int num_wanted,
                      float* logits, int32_t* routes) {
  Step& step = *main_;
  for (const Sequence& s : sequences) {
    rewind(s.row, s.start);
    clear_new(s);
  }
  prepare(step, sequences);
  const int64_t dim = config_.hidden, n = step.n;
  const int num_sparse = num_sparse_layers();
  if (static_cast<int64_t>(step.logits.size()) < num_wanted * step.logit_stride)
    step.logits = Buffer<float>(num_wanted * step.logit_stride);
  pool_.run([&](int thread) {
    const InKernels scope(kernels_);
    Local& l = local(step, thread);
    const auto [begin, end] = step.replicated ? std::pair<int64_t, int64_t>{0, n} : share(n, thread, pool_.size());
    for (int64_t i = begin; i < end; ++i) embed(tokens[i], l.x.data() + i * dim);
    for (size_t i = 0; i < config_.is_sliding.size(); ++i) {
      Layer& layer = *layers_[i];
      attention_inputs(layer, step, thread);
      attention_phase(layer, step, thread);
      feed_forward(layer, step, thread);
      if (layer.moe && routes && (thread == 0 || !step.replicated))
        for (int64_t t = begin; t < end; ++t)
          for (int j = 0; j < config_.top_k; ++j)
            routes[(t * num_sparse + layer.sparse_index) * config_.top_k + j] = l.experts[t * config_.top_k + j];
    }
    absorb(step, l, begin, end, thread);
    if (thread == 0 || !step.replicated)
      std::memcpy(step.hidden.data() + begin * dim, l.x.data() + begin * dim, (end - begin) * dim * sizeof(float));
    norm_rows(step, l, begin, end, norm_);
    if (!step.replicated) pool_.barrier();
    auto& rows = locals_[thread]->rows;
    for (int i = 0; i < num_wanted; ++i) rows[i] = normed_row(step, l, wanted[i]);
    project(head_, rows.data(), num_wanted, step.logits.data(), step.logit_stride, thread);
  });
  for (int i = 0; i < num_wanted; ++i)
    std::memcpy(logits + static_cast<int64_t>(i) * config_.vocab, step.logits.data() + i * step.logit_stride,
                config_.vocab * sizeof(float));
  last_ = step.sequences;
  last_tokens_.assign(tokens, tokens + n);
}

// Residual, norm, joint projection, then keys into the cache and rotated queries.
void Runtime::attention_inputs(Layer& layer, Step& step, int thread) {
  Local& l = local(step, thread);
  const auto [begin, end] = step.rows_of(thread, pool_.size());
  absorb(step, l, begin, end, thread);
  norm_rows(step, l, begin, end, layer.input_norm);
  if (!step.replicated) pool_.barrier();
  auto& rows = locals_[thread]->rows;
  for (int64_t n = 0; n < step.n; ++n) rows[n] = normed_row(step, l, n);
  project(layer.qkv, rows.data(), step.n, step.qkv.data(), step.qkv_stride, thread);
  pool_.barrier();
  locals_[thread]->pending = Pending::NONE;

  if (places_itself(layer, step)) return;
  const Geometry& g = geometry(layer);
  const CacheShape& shape = layer.cache;
  const int parts = g.heads + g.groups;
  const auto [from, to] = share(step.n * parts, thread, pool_.size());
  for (int64_t task = from; task < to; ++task) place(layer, step, task / parts, static_cast<int>(task % parts));
  if (layer.sliding && step.has_linear)  // the keys of the window before the new tokens
    for (const Sequence& s : step.sequences) {
      if (!s.is_long) continue;
      const int64_t first = std::max<int64_t>(0, s.start - g.window + 1);
      const auto [a, b] = share((s.start - first) * g.groups, thread, pool_.size());
      for (int64_t task = a; task < b; ++task) {
        const int64_t position = first + task / g.groups;
        const int group = static_cast<int>(task % g.groups);
        step.linear(s, shape, group).copy_from(ring(layer, s.row, group), static_cast<int>(position % shape.slots),
                                               static_cast<int>(position - s.linear_first), g.v);
      }
    }
  pool_.barrier();
}

// Of token n: rotate a query head (`part` below the number of heads) or put the key and value of a group into the cache.
void Runtime::place(Layer& layer, Step& step, int64_t n, int part) {
  const Geometry& g = geometry(layer);
  const CacheShape& shape = layer.cache;
  const Sequence& s = step.sequences[step.owner[n]];
  const int64_t position = step.position[n];
  const float* row = step.qkv.data() + n * step.qkv_stride;
  const float* cosine = angles_[layer.sliding].data() + position * 2 * g.rotary_half;
  if (part < g.heads) {
    if (n - s.offset < s.query_from) return;
    kernels_.rotate(config_.arithmetic, row + part * g.qk, cosine, cosine + g.rotary_half, g.rotary_half, g.qk,
                    step.queries.data() + (n * g.heads + part) * step.query_words);
    return;
  }
  const int group = part - g.heads;
  uint32_t key[1024];
  kernels_.rotate(config_.arithmetic, row + g.heads * g.qk + group * g.qk, cosine, cosine + g.rotary_half, g.rotary_half,
                  g.qk, key);
  const float* value = row + (g.heads + g.groups) * g.qk + group * g.v;
  if (!layer.sliding) {
    page(layer, s.pages[position / BLOCK], group).write(static_cast<int>(position % BLOCK), key, value, g.v, config_.value_scale);
  } else if (s.is_long) {
    step.linear(s, shape, group).write(static_cast<int>(position - s.linear_first), key, value, g.v, config_.value_scale);
  } else if (n - s.offset >= s.count - shape.slots) {
    ring(layer, s.row, group).write(static_cast<int>(position % shape.slots), key, value, g.v, config_.value_scale);
  }
}

// Whether whoever attends to a group also places its keys and queries, without waiting for the others.
bool Runtime::places_itself(const Layer& layer, const Step& step) const {
  return step.is_short && static_cast<int>(step.sequences.size()) * geometry(layer).groups >= pool_.size();
}

void Runtime::place_group(Layer& layer, Step& step, const Sequence& s, int group) {
  const Geometry& g = geometry(layer);
  const int per_group = g.heads / g.groups;
  for (int64_t n = s.offset; n < s.offset + s.count; ++n) {
    for (int head = group * per_group; head < (group + 1) * per_group; ++head) place(layer, step, n, head);
    place(layer, step, n, g.heads + group);
  }
}

void Runtime::attention_phase(Layer& layer, Step& step, int thread) {
  const Geometry& g = geometry(layer);
  const int tile = attention_tile(g), per_group = g.heads / g.groups;
  const bool places = places_itself(layer, step);
  // With fewer groups than threads their heads are shared out too.
  const auto tasks = static_cast<int>(step.sequences.size()) * g.groups;
  const int parts = std::clamp(pool_.size() / tasks, 1, per_group);
  const auto run = [&](const Sequence& s, int begin, int i) {
    const int group = i / parts, part = i % parts, first = group * per_group;
    if (places) place_group(layer, step, s, group);
    attend(layer, step, s, group, first + per_group * part / parts, first + per_group * (part + 1) / parts, begin,
           std::min(begin + tile, s.count), thread);
  };
  if (step.is_short) {
    for (int64_t task = thread; task < tasks * parts; task += pool_.size()) {
      // A few tokens' attention takes less time than waiting for what it reads, once no second-level cache holds that.
      const int64_t next = task + pool_.size();
      if (step.sequences.size() >= 4 && next < tasks * parts)
        fetch_lines(first_store(layer, step.sequences[next / (g.groups * parts)],
                                static_cast<int>(next % (g.groups * parts) / parts)).base,
                    layer.cache.group_words() * static_cast<int64_t>(sizeof(uint32_t)));
      const Sequence& s = step.sequences[task / (g.groups * parts)];
      run(s, s.query_from, static_cast<int>(task % (g.groups * parts)));
    }
  } else {
    int64_t task = 0;
    for (const Sequence& s : step.sequences)
      for (int begin = s.query_from; begin < s.count; begin += tile)
        for (int i = 0; i < g.groups * parts; ++i)
          if (task++ % pool_.size() == thread) run(s, begin, i);
  }
  if (layer.sliding && step.has_linear) write_kept(layer, step, thread);
  pool_.barrier();
  if (step.num_queries != step.n) {  // MTP heads: only some tokens go on
    if (step.replicated || thread == 0) step.compact(local(step, thread).x.data(), config_.hidden);
    pool_.barrier();
  }
  use_attended(step, static_cast<int64_t>(g.heads) * g.v, thread);
  project(layer.o, locals_[thread]->rows.data(), step.num_queries, step.y.data(), step.y_stride, thread);
  pool_.barrier();
  locals_[thread]->pending = Pending::ROWS;
}

// Tokens begin .. end - 1 of a sequence, heads first_head .. end_head - 1 of one group: softmax over all visible keys.
void Runtime::attend(Layer& layer, Step& step, const Sequence& s, int group, int first_head, int end_head, int begin,
                     int end, int thread) {
  const Geometry& g = geometry(layer);
  const CacheShape& shape = layer.cache;
  Local& mine = *locals_[thread];
  int rows = 0;
  for (int i = begin; i < end; ++i)
    for (int head = first_head; head < end_head; ++head, ++rows) {
      const int64_t position = s.start + i, out = s.query_offset + i - s.query_from;
      mine.query_rows[rows] = step.queries.data() + ((s.offset + i) * g.heads + head) * step.query_words;
      mine.out_rows[rows] = step.attended.data() + out * step.attended_words + head * words_for(config_.arithmetic, g.v);
      mine.last[rows] = static_cast<int32_t>(position);
      mine.first[rows] = static_cast<int32_t>(layer.sliding ? std::max<int64_t>(0, position - g.window + 1) : 0);
      mine.sinks[rows] = g.sink ? layer.sinks[head] : 0.0f;
    }
  const int64_t first = mine.first[0], last = mine.last[rows - 1];
  mine.blocks.clear();
  if (!layer.sliding || s.is_long) {
    for (int64_t block = first / BLOCK; block <= last / BLOCK; ++block) {
      const int64_t from = std::max<int64_t>(0, first - block * BLOCK) / 16 * 16;
      const int64_t to = std::min<int64_t>(BLOCK, round_up(last - block * BLOCK + 1, 16));
      KeyBlock b{block * BLOCK, 0, 0, {}, {}};
      const auto lane = static_cast<int>(from), count = static_cast<int>(to - from);
      if (layer.sliding) {
        step.linear(s, shape, group).add_to(b, static_cast<int>(block * BLOCK - s.linear_first) + lane, lane, count);
      } else {
        page(layer, s.pages[block], group).add_to(b, lane, lane, count);
      }
      mine.blocks.push_back(b);
    }
  } else {
    ring_blocks(ring(layer, s.row, group), first, last, g.v, mine);
  }
  kernels_.attention(config_.arithmetic,
                     {mine.query_rows.data(), rows, mine.first.data(), mine.last.data(),
                      g.sink ? mine.sinks.data() : nullptr, mine.blocks.data(),
                      static_cast<int>(mine.blocks.size()), shape.qk_words, g.v, shape.v_padded, shape.int8,
                      1.0f / std::sqrt(static_cast<float>(g.qk)), mine.attention.data(), mine.out_rows.data()});
}

// The blocks of a window that lies in a ring. Sixteen lanes that straddle the ring's end are copied side by side.
void Runtime::ring_blocks(const Store& ring, int64_t first, int64_t last, int v_dim, Local& mine) {
  const int slots = ring.shape.slots;
  int64_t used = 0;
  for (int64_t position = first / BLOCK * BLOCK; position <= last; position += BLOCK) {
    KeyBlock b{position, 0, 0, {}, {}};
    const int from = static_cast<int>(std::max<int64_t>(0, first - position)) / 16 * 16;
    const int to = static_cast<int>(std::min<int64_t>(BLOCK, round_up(last - position + 1, 16)));
    const int slot = static_cast<int>((position + from) % slots), until_end = slots - slot;
    if (until_end >= to - from) {
      ring.add_to(b, slot, from, to - from);
    } else if (slots < BLOCK) {  // wraps more than once: copy what is visible
      CacheShape shape = ring.shape;
      shape.slots = BLOCK;
      const Store copy(shape, mine.straddling.data() + used, 0);
      used += shape.group_words();
      for (int lane = from; lane < to; ++lane)
        copy.copy_from(ring, static_cast<int>((position + lane) % slots), lane, v_dim);
      copy.add_to(b, from, from, to - from);
    } else {
      const int whole = until_end / 16 * 16, next = std::min(whole == until_end ? whole : whole + 16, to - from);
      if (whole > 0) ring.add_keys_to(b, slot, from, whole);
      if (next > whole) {
        // Lanes before the ring's end, the others follow from its start: one store of sixteen.
        CacheShape shape = ring.shape;
        shape.slots = 16;
        const Store copy(shape, mine.straddling.data() + used, 0);
        used += shape.group_words();
        const int before = until_end - whole, bytes = shape.word_bytes();
        for (int w = 0; w < shape.qk_words; ++w) {
          const uint8_t* row = ring.key(0) + w * ring.key_stride();
          uint8_t* to_row = copy.key(0) + w * copy.key_stride();
          std::memcpy(to_row, row + (slot + whole) * bytes, before * bytes);
          std::memcpy(to_row + before * bytes, row, (16 - before) * bytes);
        }
        if (shape.int8) {
          std::memcpy(copy.key_scales(0), ring.key_scales(slot + whole), before * sizeof(float));
          std::memcpy(copy.key_scales(before), ring.key_scales(0), (16 - before) * sizeof(float));
        }
        copy.add_keys_to(b, 0, from + whole, 16);
      }
      if (to - from > next) ring.add_keys_to(b, (slot + next) % slots, from + next, to - from - next);
      ring.add_values_to(b, slot, from, until_end);
      ring.add_values_to(b, 0, from + until_end, to - from - until_end);
    }
    mine.blocks.push_back(b);
  }
}

// After a long stretch: its last keys go into the ring.
void Runtime::write_kept(Layer& layer, Step& step, int thread) {
  const Geometry& g = geometry(layer);
  pool_.barrier();
  for (const Sequence& s : step.sequences) {
    if (!s.is_long) continue;
    const int64_t first = std::max<int64_t>(s.start, s.start + s.count - layer.cache.slots);
    const auto [a, b] = share((s.start + s.count - first) * g.groups, thread, pool_.size());
    for (int64_t task = a; task < b; ++task) {
      const int64_t position = first + task / g.groups;
      const int group = static_cast<int>(task % g.groups);
      ring(layer, s.row, group).copy_from(step.linear(s, layer.cache, group), static_cast<int>(position - s.linear_first),
                                          static_cast<int>(position % layer.cache.slots), g.v);
    }
  }
}

void Runtime::feed_forward(Layer& layer, Step& step, int thread) {
  Local& l = local(step, thread);
  const auto [begin, end] = step.query_rows_of(thread, pool_.size());
  absorb(step, l, begin, end, thread);
  locals_[thread]->pending = Pending::NONE;
  norm_rows(step, l, begin, end, layer.post_norm);
  if (layer.moe) {
    route(layer, step, l, begin, end, thread);
    if (!step.replicated) pool_.barrier();
    sparse_phase(layer, step, thread);
  } else {
    if (!step.replicated) pool_.barrier();
    dense_phase(layer, step, thread);
  }
}

void Runtime::dense_phase(Layer& layer, Step& step, int thread) {
  Local& l = local(step, thread);
  Local& mine = *locals_[thread];
  const int64_t n = step.num_queries;
  for (int64_t i = 0; i < n; ++i) mine.rows[i] = normed_row(step, l, i);
  const auto [begin, end] = share(layer.gate_up.panels(), thread, pool_.size());
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t first = 0; first < n; first += TILE_ROWS)
      gate_up_tile(layer.gate_up, panel, mine.rows.data() + first, std::min<int64_t>(TILE_ROWS, n - first), config_.dense_dim,
                   step.inner.data() + first * step.inner_words, step.inner_words, mine);
  pool_.barrier();
  for (int64_t i = 0; i < n; ++i) mine.rows[i] = step.inner.data() + i * step.inner_words;
  project(layer.down, mine.rows.data(), n, step.y.data(), step.y_stride, thread);
  pool_.barrier();
  locals_[thread]->pending = Pending::ROWS;
}

void Runtime::gate_up_tile(const Matrix& matrix, int64_t panel, const uint32_t* const* rows, int64_t num_rows,
                           int64_t width, uint32_t* out, int64_t out_stride, Local& mine) {
  constexpr int HALF = PANEL / 2;
  float* tile = mine.tile.data();
  matrix.multiply(kernels_, panel, rows, static_cast<int>(num_rows), tile, PANEL);
  const int64_t first = panel * HALF;
  for (int64_t i = 0; i < num_rows; ++i)
    kernels_.swiglu(config_.arithmetic, tile + i * PANEL, tile + i * PANEL + HALF,
                    static_cast<int>(std::min<int64_t>(HALF, width - first)),
                    out + i * out_stride + words_for(config_.arithmetic, first));
}

// Scores of all experts in fp32, some tokens at a time; then each token's choice.
void Runtime::route(Layer& layer, Step& step, Local& l, int64_t begin, int64_t end, int thread) {
  const int64_t stride = round_up(config_.experts, PANEL), dim = config_.hidden;
  float* values = locals_[thread]->router_rows.data();
  const uint32_t* rows[ROUTER_ROWS];
  for (int64_t first = begin; first < end; first += ROUTER_ROWS) {
    const auto count = static_cast<int>(std::min<int64_t>(ROUTER_ROWS, end - first));
    for (int i = 0; i < count; ++i) {
      const uint32_t* words = l.normed.data() + (first + i) * step.hidden_words;
      rows[i] = reinterpret_cast<const uint32_t*>(values + i * dim);
      if (config_.arithmetic == Arithmetic::F32) {
        std::memcpy(values + i * dim, words, dim * sizeof(float));
        continue;
      }
      for (int64_t w = 0; w < dim / 2; ++w) {
        values[i * dim + 2 * w] = float_from_bits(words[w] << 16);
        values[i * dim + 2 * w + 1] = float_from_bits(words[w] & 0xffff0000u);
      }
    }
    for (int64_t panel = 0; panel < layer.router.panels(); ++panel)
      layer.router.multiply(kernels_, panel, rows, count, l.scores.data() + first * stride + panel * PANEL, stride);
    for (int i = 0; i < count; ++i) choose_experts(layer, l, first + i);
  }
}

// The choice is made with the bias, the weights without it; of equal scores the first expert wins.
void Runtime::choose_experts(const Layer& layer, Local& l, int64_t n) {
  const int experts = config_.experts, k = config_.top_k;
  float* scores = l.scores.data() + n * round_up(experts, PANEL);
  int32_t* chosen = l.experts.data() + n * k;
  float* weights = l.weights.data() + n * k;
  kernels_.sigmoid(scores, experts);
  float total = 0.0f;
  for (int j = 0; j < k; ++j) {
    int best = -1;
    float most = 0.0f;
    for (int e = 0; e < experts; ++e) {
      const float score = scores[e] + layer.router_bias[e];
      if ((best < 0 || score > most) && std::find(chosen, chosen + j, e) == chosen + j) best = e, most = score;
    }
    chosen[j] = best;
    weights[j] = scores[best];
    total += weights[j];
  }
  for (int j = 0; j < k; ++j) {
    if (config_.normalize_weights) weights[j] /= total + 1e-20f;
    weights[j] *= config_.routed_scaling;
  }
}

// (token, choice) pairs in the order of their experts: `order[place]` is the pair, `place[pair]` its place.
void Runtime::group_by_expert(Step& step, const Local& l, Local& mine) {
  const int64_t pairs = step.num_queries * config_.top_k;
  std::fill(mine.starts.begin(), mine.starts.end(), 0);
  for (int64_t p = 0; p < pairs; ++p) ++mine.starts[l.experts[p] + 1];
  for (int e = 0; e < config_.experts; ++e) mine.starts[e + 1] += mine.starts[e];
  mine.fill.assign(mine.starts.begin(), mine.starts.end());
  for (int64_t p = 0; p < pairs; ++p) {
    const int32_t at = mine.fill[l.experts[p]]++;
    mine.place[p] = at;
    mine.order[at] = static_cast<int32_t>(p);
  }
}

void Runtime::sparse_phase(Layer& layer, Step& step, int thread) {
  Local& l = local(step, thread);
  Local& mine = *locals_[thread];
  group_by_expert(step, l, mine);
  const int64_t pairs = step.num_queries * config_.top_k;
  for (int64_t at = 0; at < pairs; ++at)
    mine.rows[at] = normed_row(step, l, mine.order[at] / config_.top_k);
  int64_t task = 0;
  for (int e = 0; e < config_.experts; ++e) {
    const int64_t from = mine.starts[e], to = mine.starts[e + 1];
    if (from == to) continue;
    const Matrix& matrix = layer.experts_gate_up[e];
    for (int64_t panel = 0; panel < matrix.panels(); ++panel) {
      if (task++ % pool_.size() != thread) continue;
      for (int64_t first = from; first < to; first += TILE_ROWS)
        gate_up_tile(matrix, panel, mine.rows.data() + first, std::min<int64_t>(TILE_ROWS, to - first), config_.expert_dim,
                     step.inner.data() + first * step.inner_words, step.inner_words, mine);
    }
  }
  pool_.barrier();
  for (int64_t at = 0; at < pairs; ++at) mine.rows[at] = step.inner.data() + at * step.inner_words;
  task = 0;
  for (int e = 0; e < config_.experts; ++e) {
    const int64_t from = mine.starts[e], to = mine.starts[e + 1];
    if (from == to) continue;
    const Matrix& matrix = layer.experts_down[e];
    for (int64_t panel = 0; panel < matrix.panels(); ++panel)
      if (task++ % pool_.size() == thread)
        matrix.multiply(kernels_, panel, mine.rows.data() + from, static_cast<int>(to - from),
                        step.y.data() + from * step.y_stride + panel * PANEL, step.y_stride);
  }
  pool_.barrier();
  locals_[thread]->pending = Pending::EXPERTS;
}

}  // namespace openmimo
