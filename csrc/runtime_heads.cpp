// MTP heads, what they remember of each row, and copies of rows and pages.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "runtime_state.h"

namespace openmimo {

// x = join([norm of the next token's embedding, norm of the hidden state])
void Runtime::head_inputs(int head, Step& step, int thread) {
  Layer& layer = *layers_[config_.is_sliding.size() + head];
  Local& l = local(step, thread);
  const int64_t dim = config_.hidden, words = step.hidden_words;
  const auto [begin, end] = step.rows_of(thread, pool_.size());
  for (int64_t n = begin; n < end; ++n) {
    float* x = l.x.data() + n * dim;
    embed(head_tokens_[n], x);
    kernels_.norm(config_.arithmetic, x, layer.embedding_norm, dim, config_.eps, l.normed.data() + n * 2 * words);
    kernels_.norm(config_.arithmetic, head_hidden_[n], layer.hidden_norm, dim, config_.eps,
                  l.normed.data() + (n * 2 + 1) * words);
    std::memset(x, 0, dim * sizeof(float));
    if (layer.join.quantized_rows())
      kernels_.quantize(l.normed.data() + n * 2 * words, 2 * dim, l.quantized.data() + n * quantized_words(2 * dim));
  }
  if (!step.replicated) pool_.barrier();
  auto& rows = locals_[thread]->rows;
  for (int64_t n = 0; n < step.n; ++n)
    rows[n] = layer.join.quantized_rows() ? l.quantized.data() + n * quantized_words(2 * dim)
                                          : l.normed.data() + n * 2 * words;
  project(layer.join, rows.data(), step.n, step.y.data(), step.y_stride, thread);
  pool_.barrier();
  locals_[thread]->pending = Pending::ROWS;
}

std::vector<Sequence> Runtime::head_sequences(int head, const std::vector<int32_t>& rows, bool with_newest) {
  std::vector<Sequence> sequences;
  for (const int32_t row : rows) {
    const History& history = histories_[row];
    Sequence s;
    s.row = row;
    // Entries before the window of the last position are never read again.
    s.start = std::max({history.next[head], history.first(), history.length - layers_.back()->cache.slots});
    if (with_newest) s.start = std::min(s.start, history.length - 1);
    s.count = static_cast<int>(history.length - s.start - (with_newest ? 0 : head + 1));
    s.query_from = with_newest ? s.count - 1 : s.count;
    if (s.count > 0) sequences.push_back(s);
  }
  return sequences;
}

// Run a head over the positions it lacks. With `newest` it drafts: tokens behind the kept ones are `newest`, then `drafts`.
void Runtime::head_pass(int head, const std::vector<int32_t>& rows, const int32_t* newest, int32_t* drafts) {
  Step& step = *heads_;
  Layer& layer = *layers_[config_.is_sliding.size() + head];
  const std::vector<Sequence> sequences = head_sequences(head, rows, newest != nullptr);
  if (sequences.empty()) return;
  prepare(step, sequences);
  head_tokens_.resize(step.n);
  head_hidden_.resize(step.n);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = step.sequences[i];
    const History& history = histories_[s.row];
    for (int j = 0; j < s.count; ++j) {
      const int64_t position = s.start + j, next = position + 1 + head;
      head_hidden_[s.offset + j] = history.hidden.data() + (position - history.first()) * config_.hidden;
      head_tokens_[s.offset + j] = next < history.length    ? history.tokens[next - history.first()]
                                   : next == history.length ? newest[i]
                                                            : drafts[i * config_.mtp_heads + next - history.length - 1];
    }
  }
  if (newest && static_cast<int64_t>(step.logits.size()) < step.num_queries * step.logit_stride)
    step.logits = Buffer<float>(step.num_queries * step.logit_stride);
  pool_.run([&](int thread) {
    const InKernels scope(kernels_);
    head_inputs(head, step, thread);
    attention_inputs(layer, step, thread);
    if (!newest) return;
    attention_phase(layer, step, thread);
    feed_forward(layer, step, thread);
    Local& l = local(step, thread);
    const auto [begin, end] = step.query_rows_of(thread, pool_.size());
    absorb(step, l, begin, end, thread);
    norm_rows(step, l, begin, end, layer.final_norm);
    if (!step.replicated) pool_.barrier();
    auto& out = locals_[thread]->rows;
    for (int64_t i = 0; i < step.num_queries; ++i) out[i] = normed_row(step, l, i);
    project(head_, out.data(), step.num_queries, step.logits.data(), step.logit_stride, thread);
    pool_.barrier();
    for (int64_t i = thread; i < step.num_queries; i += pool_.size())
      drafts[i * config_.mtp_heads + head] =
          static_cast<int32_t>(kernels_.argmax(step.logits.data() + i * step.logit_stride, config_.vocab));
  });
  for (const Sequence& s : step.sequences) {
    History& history = histories_[s.row];
    history.next[head] = history.length - (newest ? head : head + 1);
  }
}

void Runtime::draft(const int32_t* rows, const int32_t* newest, int num_rows, int32_t* drafts) {
  if (config_.mtp_heads == 0) throw std::invalid_argument("this runtime has no MTP heads to draft with");
  const std::vector<int32_t> all(rows, rows + num_rows);
  for (int i = 0; i < num_rows; ++i)
    if (histories_[rows[i]].tokens.empty())
      throw std::invalid_argument("row " + std::to_string(rows[i]) + " is not tracked for drafts, or kept no token yet");
  for (int head = 0; head < config_.mtp_heads; ++head) {
    for (const int32_t row : all)  // many positions at once would be more than a pass for all rows has room for
      if (histories_[row].length - histories_[row].next[head] > MAX_BACKLOG) head_pass(head, {row}, nullptr, nullptr);
    head_pass(head, all, newest, drafts);
  }
  for (const int32_t row : all) {
    History& history = histories_[row];
    forget(history, std::min(*std::min_element(history.next.begin(), history.next.end()), history.length - spare()));
  }
}

// Forget hidden states before a position.
void Runtime::forget(History& history, int64_t position) const {
  const int64_t drop = position - history.first();
  if (drop <= 0) return;
  history.tokens.erase(history.tokens.begin(), history.tokens.begin() + drop);
  history.hidden.erase(history.hidden.begin(), history.hidden.begin() + drop * config_.hidden);
}

void Runtime::commit(const int32_t* kept) {
  for (size_t i = 0; i < last_.size(); ++i) {
    const Sequence& s = last_[i];
    if (kept[i] < 0 || kept[i] > s.count) throw std::invalid_argument("cannot keep more tokens than the step had");
    History& history = histories_[s.row];
    history.length = s.start + kept[i];
    if (!history.tracked) continue;
    const float* hidden = main_->hidden.data() + s.offset * config_.hidden;
    history.hidden.insert(history.hidden.end(), hidden, hidden + static_cast<int64_t>(kept[i]) * config_.hidden);
    history.tokens.insert(history.tokens.end(), last_tokens_.begin() + s.offset, last_tokens_.begin() + s.offset + kept[i]);
    // Heads run when drafts are asked for, over no more than a window: until then a position costs a copy.
    if (static_cast<int64_t>(history.tokens.size()) > 2 * kept_positions()) forget(history, history.length - kept_positions());
  }
  last_.clear();
}

void Runtime::track(const int32_t* rows, int num_rows) {
  if (config_.mtp_heads == 0) throw std::invalid_argument("this runtime has no MTP heads to draft with");
  for (int i = 0; i < num_rows; ++i) histories_[rows[i]].tracked = true;
}

// A step starts at `length`: forget what lies behind it, or everything when the row belonged to another sequence.
void Runtime::rewind(int row, int64_t length) {
  History& history = histories_[row];
  if (length == 0) history.tracked = false;
  if (length == history.length) return;
  const int64_t keep = length > history.length ? 0 : std::max<int64_t>(0, length - history.first());
  history.tokens.resize(keep);
  history.hidden.resize(keep * config_.hidden);
  history.length = length;
  for (int head = 0; head < config_.mtp_heads; ++head)
    history.next[head] = keep > 0 ? std::min(history.next[head], length - head) : length;
}

void Runtime::copy_row(int source, int target) {
  std::copy_n(rings_.data() + source * ring_words_, ring_words_, rings_.data() + target * ring_words_);
  histories_.at(target) = histories_.at(source);
}

void Runtime::copy_page(int source, int target) {
  for (const auto& layer : layers_)
    for (int group = 0; !layer->sliding && group < layer->cache.groups; ++group)
      std::memcpy(page(*layer, target, group).base, page(*layer, source, group).base,
                  layer->cache.group_words() * sizeof(uint32_t));
}

// A ring at its sequence's beginning, and pages that this step begins, hold what a predecessor left. It is masked, which
// multiplies it by 0; should it be NaN, so would be the result.
void Runtime::clear_new(const Sequence& s) {
  if (s.start == 0) std::fill_n(rings_.data() + s.row * ring_words_, ring_words_, 0u);
  const int64_t end = s.start + s.count;
  for (int64_t block = (s.start + BLOCK - 1) / BLOCK; block * BLOCK < end; ++block)
    for (const auto& layer : layers_)
      for (int group = 0; !layer->sliding && group < layer->cache.groups; ++group)
        std::memset(page(*layer, s.pages[block], group).base, 0, layer->cache.group_words() * sizeof(uint32_t));
}

// Positions that stay beyond what the heads have taken: a draft needs the last one, and a step may take tokens back.
int64_t Runtime::spare() const { return 1 + config_.mtp_heads; }

// Positions whose hidden states a draft may need: the window of a head's last position.
int64_t Runtime::kept_positions() const { return config_.mtp_heads ? layers_.back()->cache.slots + spare() : 0; }

// Rings, then length, whether it is tracked, next positions, number of held positions, their tokens and hidden states.
int64_t Runtime::row_state_bytes() const {
  return row_bytes() + 8 * (3 + config_.mtp_heads) + kept_positions() * (4 + 4 * static_cast<int64_t>(config_.hidden));
}

void Runtime::read_row(int row, uint8_t* state) const {
  const History& history = histories_.at(row);
  const auto put = [&](const void* from, int64_t bytes) {
    std::copy_n(static_cast<const uint8_t*>(from), bytes, state);  // which may be nothing at a null pointer
    state += bytes;
  };
  const auto held = static_cast<int64_t>(history.tokens.size());
  const int64_t count = std::min(held, kept_positions());
  put(rings_.data() + row * ring_words_, row_bytes());
  put(&history.length, 8);
  const int64_t tracked = history.tracked;
  put(&tracked, 8);
  put(history.next.data(), 8 * config_.mtp_heads);
  put(&count, 8);
  put(history.tokens.data() + held - count, 4 * count);
  put(history.hidden.data() + (held - count) * config_.hidden, 4 * count * config_.hidden);
}

void Runtime::write_row(int row, const uint8_t* state) {
  History& history = histories_.at(row);
  const auto take = [&](void* to, int64_t bytes) {
    std::copy_n(state, bytes, static_cast<uint8_t*>(to));
    state += bytes;
  };
  int64_t count = 0, tracked = 0;
  take(rings_.data() + row * ring_words_, row_bytes());
  take(&history.length, 8);
  take(&tracked, 8);
  history.tracked = tracked != 0;
  take(history.next.data(), 8 * config_.mtp_heads);
  take(&count, 8);
  history.tokens.resize(count);
  history.hidden.resize(count * config_.hidden);
  take(history.tokens.data(), 4 * count);
  take(history.hidden.data(), 4 * count * config_.hidden);
}

int64_t Runtime::row_bytes() const { return ring_words_ * static_cast<int64_t>(sizeof(uint32_t)); }

int64_t Runtime::page_bytes() const { return page_words_ * static_cast<int64_t>(sizeof(uint32_t)); }

int Runtime::num_sparse_layers() const {
  return static_cast<int>(std::count(config_.is_moe.begin(), config_.is_moe.end(), 1));
}

}  // namespace openmimo
