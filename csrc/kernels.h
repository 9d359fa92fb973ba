// The table of kernels. Each instruction set fills one; the runtime chooses at start.
//
// Operands are made of 32-bit *words*: two bf16 values (bf16 arithmetic) or one float (fp32 arithmetic) that lie next to
// each other along the dimension that a product sums over. A row of activations is `depth` words. The other operand has,
// for each of the `depth` steps, one word per column. Every output element is one running sum over the steps in order,
// whatever the number of rows is, so that a token's result never depends on what else is in the batch.
#pragma once

#include <cstdint>

namespace openmimo {

enum class Arithmetic : int { F32 = 0, BF16 = 1 };

// How weights are stored. The narrow ones are widened to bf16 words on the way into a product; all their values are exact
// in bf16. INT8 has one scale per output. FP8 (E4M3) has one scale per 128 x 128 block, INT4 and INT8_BLOCK one per output
// and 32 inputs: for these a product sums each group of steps by itself, then adds it times its scale.
enum class Format : int { F32 = 0, BF16 = 1, INT8 = 2, FP8 = 3, INT4 = 4, INT8_BLOCK = 5 };

// Steps (of two values) that share a scale; 0 where a product needs no scales.
constexpr int group_steps(Format format) {
  return format == Format::FP8 ? 64 : format == Format::INT4 || format == Format::INT8_BLOCK ? 16 : 0;
}

constexpr int scale_bytes(Format format) { return format == Format::FP8 ? 4 : 2; }

// Bytes of one column in one step.
constexpr int column_bytes(Format format) {
  return format == Format::INT4 ? 1 : format == Format::F32 || format == Format::BF16 ? 4 : 2;
}

constexpr int PANEL = 64;  // columns of a packed panel
constexpr int BLOCK = 64;  // keys of an attention block; blocks start at positions that are multiples of it

constexpr int64_t words_for(Arithmetic arithmetic, int64_t values) {
  return arithmetic == Arithmetic::F32 ? values : (values + 1) / 2;
}

// One product: `num_rows` rows times one panel.
struct Product {
  const uint32_t* const* rows;
  int num_rows;
  const uint8_t* panel;
  int64_t stride;  // bytes from one step of the panel to the next
  int depth;
  int columns;  // a multiple of 16, at most PANEL
  float* out;
  int64_t out_stride;
  bool accumulate;
  const uint8_t* scales = nullptr;  // one row of PANEL per group of steps: floats for FP8, else bf16
  int64_t ahead = 0;                // bytes from here to a panel that is needed soon, to be fetched meanwhile; 0 for none
};

// Whole-number products: a step is four inputs, signed bytes in a row's word and bytes above 128 in the panel, so that
//   sum of x * w = sum of x * byte - 128 * sum of x
// with sums of int32 over a block of inputs, which are exact. A quantised row holds its words, then a scale (a float) per
// block, then 128 times the sum of the numbers of each block.
constexpr int INTEGER_BLOCK_STEPS = group_steps(Format::INT8_BLOCK) / 2;

constexpr int64_t quantized_steps(int64_t values) { return (values + 3) / 4; }

constexpr int64_t quantized_words(int64_t values) {
  const int64_t steps = quantized_steps(values);
  return steps + 2 * ((steps + INTEGER_BLOCK_STEPS - 1) / INTEGER_BLOCK_STEPS);
}

// Steps `begin` to `end` of `num_rows` quantised rows times one panel, added to `out` unless `begin` is 0.
struct IntegerProduct {
  const uint32_t* const* rows;
  int num_rows;
  const uint8_t* panel;  // of step `begin`, PANEL words per step
  int begin, end, row_steps;
  int columns;  // a multiple of 16, at most PANEL
  float* out;
  int64_t out_stride;
  const float* output_scales;    // one per column for the last steps of all; or null
  const uint16_t* block_scales;  // bf16, from the block of `begin` on one row of PANEL per block; or null
};

// Keys and values of (part of) one block. Scores of lanes that no segment covers are not used. With `narrow` attention a word
// is two signed bytes, and each position has a scale for its key and one for its value.
struct KeySegment {
  const uint8_t* words;  // QK rows of words, `stride` bytes apart, with `lanes` keys side by side
  int64_t stride;
  int lane, lanes;  // multiples of 16
  const float* scales;
};
struct ValueSegment {
  const uint8_t* words;  // (steps, padded V dim)
  int step, steps;
  const float* scales;
};
struct KeyBlock {
  int64_t position;  // of lane 0
  int num_keys, num_values;
  KeySegment keys[4];
  ValueSegment values[4];
};

// Softmax attention of some query rows to the blocks of one key/value head.
struct Attention {
  const uint32_t* const* queries;
  int num_rows;
  const int32_t* first;  // first and last visible position of each row
  const int32_t* last;
  const float* sinks;  // one per row, or null
  const KeyBlock* blocks;
  int num_blocks;
  int qk_words, v_dim, v_padded;
  bool narrow;
  float scale;
  float* scratch;              // attention_scratch(num_rows, v_padded) floats
  uint32_t* const* out;        // one row of words_for(v_dim) words per query row
};

struct Kernels {
  const char* name;
  // Called by every thread before and after it uses the others.
  void (*enter)();
  void (*leave)();
  void (*product)(Format, const Product&);
  void (*integer_product)(const IntegerProduct&);
  // A row of bf16 words as a quantised row: signed bytes with the scale max|x| / 127 of their block.
  void (*quantize)(const uint32_t* words, int64_t values, uint32_t* out);
  void (*attention)(Arithmetic, const Attention&);
  // x * r * weight with r = 1 / sqrt(mean(x^2) + eps), as words.
  void (*norm)(Arithmetic, const float* x, const float* weight, int64_t dim, float eps, uint32_t* out);
  // x += sum_j weights[j] * parts[j], in the order of j; null weights are 1.
  void (*add)(float* x, const float* const* parts, const float* weights, int num_parts, int64_t dim);
  // Rotate dims i and i + half by the position's angle, then write words.
  void (*rotate)(Arithmetic, const float* x, const float* cosine, const float* sine, int half, int dim, uint32_t* out);
  // silu(gate) * up as words.
  void (*swiglu)(Arithmetic, const float* gate, const float* up, int width, uint32_t* out);
  void (*sigmoid)(float* x, int64_t count);
  int64_t (*argmax)(const float* x, int64_t count);
};

// A thread's use of the kernels.
struct InKernels {
  explicit InKernels(const Kernels& kernels_) : kernels(kernels_) { kernels.enter(); }
  ~InKernels() { kernels.leave(); }
  const Kernels& kernels;
};

inline int64_t attention_scratch(int64_t rows, int64_t v_padded) { return rows * (2 * BLOCK + v_padded + 16 + 4); }

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_vnni;  // whole numbers by VNNI; for processors without BF16
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx;           // bf16 products in tiles
extern const Kernels kernels_amx_emulated;  // the same with tiles in software, for tests; needs AVX-512 BF16
bool amx_granted();                         // whether the processor has AMX-BF16 and AMX-INT8 and the system lets us use it
#endif

}  // namespace openmimo
