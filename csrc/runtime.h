// The model on flat tokens: one call runs all layers for the tokens of several sequences, another the MTP heads.
//
// All threads run the whole forward together and meet at barriers between its phases. Every sum has a fixed order that
// depends only on the sequence's own tokens and their positions: what else is in the batch, how a prompt was cut into
// chunks, and how many drafts were verified change no bit of a result.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cache.h"
#include "cpu.h"
#include "matrix.h"

namespace openmimo {

struct Geometry {
  int heads = 0, groups = 0, qk = 0, v = 0;
  int window = 0;  // visible keys, 0 for all
  int rotary_half = 0;
  float theta = 0.0f;
  bool sink = false;
};

struct RuntimeConfig {
  int vocab = 0, hidden = 0, dense_dim = 0;
  std::vector<int> is_sliding, is_moe;  // per layer
  Geometry global, sliding;
  int experts = 0, top_k = 0, expert_dim = 0;
  bool normalize_weights = true;
  float routed_scaling = 1.0f;
  int mtp_heads = 0;
  float value_scale = 1.0f, eps = 1e-5f;
  Arithmetic arithmetic = Arithmetic::BF16;
  Format format = Format::BF16;
  bool int8_activations = false;  // of all products but the down projections
  bool int8_cache = false;
  int num_rows = 1, num_pages = 0, max_step_tokens = 512, threads = 1;
  std::string kernels;
};

// One sequence's tokens in a step, flat places `offset` .. `offset + count - 1`, from position `start` on.
struct Sequence {
  int row = 0;
  int64_t start = 0;
  int count = 0;
  int64_t offset = 0;
  const int32_t* pages = nullptr;
  int num_pages = 0;
  int query_from = 0;  // the first of its tokens that needs an output

  // Filled in by the runtime.
  int64_t query_offset = 0;
  bool is_long = false;  // more tokens than a ring has room for beside the window
  int64_t linear_first = 0, linear_offset = 0;
  int linear_slots = 0;
};

class Runtime {
 public:
  explicit Runtime(RuntimeConfig config);
  ~Runtime();

  // Take the weights from a packed file; false if it is not there, not these weights, or damaged. See WeightMemory::open.
  bool open_weights(const std::string& path, const std::string& fingerprint);
  // Keep the weights that `set` is about to bring in a new file; `finish_weights` completes it.
  void create_weights(const std::string& path);
  void finish_weights(const std::string& fingerprint);

  // Set one weight: `layer` counts main layers, then MTP heads; parts without a layer or expert ignore those.
  // Throws std::invalid_argument for an unknown part, a wrong shape, or E4M3 codes for anything but FP8 weights.
  void set(const std::string& part, int layer, int expert, const Source& source);
  // Throws std::invalid_argument if a weight is missing.
  void check_complete() const;

  // Run the main model; `logits` (wanted x vocab), `routes` (tokens x sparse layers x top_k).
  void forward(const int32_t* tokens, std::vector<Sequence> sequences, const int32_t* wanted, int num_wanted,
               float* logits, int32_t* routes);

  // Remember hidden states of these rows, until a step starts anew at position 0: drafts will be asked for. Called between
  // the row's first `forward` and its `commit`.
  void track(const int32_t* rows, int num_rows);

  // Keep the first `kept` tokens of each sequence of the last forward.
  void commit(const int32_t* kept);

  // The heads' proposals after the newest (not yet fed) token of each row; they first take over what was kept since the
  // last time, as far as their windows reach.
  void draft(const int32_t* rows, const int32_t* newest, int num_rows, int32_t* drafts);

  void copy_row(int source, int target);
  void copy_page(int source, int target);
  int64_t row_state_bytes() const;
  void read_row(int row, uint8_t* state) const;
  void write_row(int row, const uint8_t* state);

  const RuntimeConfig& config() const { return config_; }
  const char* kernels_name() const { return kernels_.name; }
  int64_t row_bytes() const;   // rings of one row
  int64_t page_bytes() const;  // one page, all global layers
  int64_t weight_bytes() const { return weight_bytes_; }
  int num_sparse_layers() const;
  size_t step_sequences() const { return last_.size(); }

 private:
  struct Layer;
  struct Local;
  struct Step;
  struct History;
  struct Slot {  // where a weight goes
    Matrix* matrix = nullptr;
    float** vector = nullptr;
    int64_t rows = 0, columns = 0;
    bool is_set = false;
  };

  const Geometry& geometry(const Layer& layer) const;
  void declare_weights();
  void place_weights(Arena& arena);
  void declare(const std::string& name, Matrix& matrix, std::vector<int64_t> order, int64_t rows, int64_t columns, Format f,
               bool quantized_rows = false);
  void declare(const std::string& name, float*& vector, int64_t count);
  Local& local(const Step& step, int thread);
  void embed(int32_t token, float* out) const;
  void ensure_angles(int64_t positions);

  // Phases of a layer; every thread runs all of them.
  void prepare(Step& step, const std::vector<Sequence>& sequences);
  void absorb(Step& step, Local& l, int64_t begin, int64_t end, int thread);
  void norm_rows(Step& step, Local& l, int64_t begin, int64_t end, const float* weight);
  // A normed row as products take it.
  const uint32_t* normed_row(const Step& step, const Local& l, int64_t n) const;
  void use_attended(Step& step, int64_t values, int thread);
  void project(const Matrix& matrix, const uint32_t* const* rows, int64_t num_rows, float* out, int64_t stride,
               int thread);
  void attention_inputs(Layer& layer, Step& step, int thread);
  void place(Layer& layer, Step& step, int64_t n, int part);
  bool places_itself(const Layer& layer, const Step& step) const;
  void place_group(Layer& layer, Step& step, const Sequence& sequence, int group);
  void attention_phase(Layer& layer, Step& step, int thread);
  void attend(Layer& layer, Step& step, const Sequence& sequence, int group, int first_head, int end_head,
              int begin, int end, int thread);
  void write_kept(Layer& layer, Step& step, int thread);
  void ring_blocks(const Store& ring, int64_t first, int64_t last, int v_dim, Local& mine);
  void feed_forward(Layer& layer, Step& step, int thread);
  CacheShape sliding_shape() const;  // of any sliding layer or head
  Store ring(const Layer& layer, int row, int group);
  Store page(const Layer& layer, int32_t number, int group);
  Store first_store(const Layer& layer, const Sequence& sequence, int group);
  void clear_new(const Sequence& sequence);
  void gate_up_tile(const Matrix& matrix, int64_t panel, const uint32_t* const* rows, int64_t num_rows, int64_t width,
                    uint32_t* out, int64_t out_stride, Local& mine);
  void dense_phase(Layer& layer, Step& step, int thread);
  void sparse_phase(Layer& layer, Step& step, int thread);
  void route(Layer& layer, Step& step, Local& l, int64_t begin, int64_t end, int thread);
  void choose_experts(const Layer& layer, Local& l, int64_t n);
  void group_by_expert(Step& step, const Local& l, Local& mine);
  void head_inputs(int head, Step& step, int thread);
  // The positions that a head lacks true entries for, as one sequence per row; with `newest`, up to the last position.
  std::vector<Sequence> head_sequences(int head, const std::vector<int32_t>& rows, bool with_newest);
  void head_pass(int head, const std::vector<int32_t>& rows, const int32_t* newest, int32_t* drafts);
  void forget(History& history, int64_t position) const;
  int64_t spare() const;
  int64_t kept_positions() const;
  void rewind(int row, int64_t length);

  RuntimeConfig config_;
  const Kernels& kernels_;
  Pool pool_;
  std::vector<std::unique_ptr<Layer>> layers_;  // main layers, then MTP heads
  uint16_t* embedding_bf16_ = nullptr;  // one of the two, by arithmetic
  float* embedding_f32_ = nullptr;
  float* norm_ = nullptr;
  Matrix head_;
  WeightMemory weights_;
  int64_t weight_bytes_ = 0;
  std::map<std::string, Slot> slots_;
  Buffer<uint32_t> rings_, pages_;
  std::vector<History> histories_;
  int64_t ring_words_ = 0, page_words_ = 0;     // of one row, of one page
  int short_tokens_ = 0;                        // see Step::is_short
  std::unique_ptr<Step> main_, heads_;
  std::vector<std::unique_ptr<Local>> locals_;  // one per thread, then the shared one
  std::vector<float> angles_[2];                // cos and sin rows of global and sliding layers
  int64_t num_angles_ = 0;
  std::vector<Sequence> last_;
  std::vector<int32_t> last_tokens_;
  std::vector<int32_t> head_tokens_;
  std::vector<const float*> head_hidden_;
};

}  // namespace openmimo
