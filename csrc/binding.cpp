// The Python module `openmimo._native`. Arrays are checked here, at the door; behind it sizes are trusted.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "cpu.h"
#include "runtime.h"
#include "words.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace openmimo;

namespace {

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

void check_ids(const Ints& values, int64_t limit, const char* what) {
  for (size_t i = 0; i < values.size(); ++i)
    require(values.data()[i] >= 0 && values.data()[i] < limit,
            std::string(what) + " " + std::to_string(values.data()[i]) + " is outside 0.." + std::to_string(limit - 1));
}

Source source_of(const nb::ndarray<nb::c_contig, nb::device::cpu>& array) {
  Source source;
  source.is_bf16 = array.dtype() == nb::dtype<uint16_t>();
  require(source.is_bf16 || array.dtype() == nb::dtype<float>(), "a weight must be float32, or bfloat16 as uint16");
  require(array.ndim() == 1 || array.ndim() == 2, "a weight must have one or two dimensions");
  source.data = array.data();
  source.rows = array.ndim() == 2 ? static_cast<int64_t>(array.shape(0)) : 1;
  source.columns = static_cast<int64_t>(array.shape(array.ndim() - 1));
  return source;
}

using Codes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Source source_of(const Codes& codes, const Scales& scales) {
  Source source;
  source.data = codes.data();
  source.row_scales = scales.data();
  source.rows = static_cast<int64_t>(codes.shape(0));
  source.columns = static_cast<int64_t>(codes.shape(1));
  require(scales.shape(0) == codes.shape(0) && scales.shape(1) == (codes.shape(1) + 127) / 128,
          "E4M3 codes need one float32 scale for each row's 128 columns");
  return source;
}

std::vector<Sequence> sequences_of(const Runtime& runtime, const Ints& tokens, const Ints& rows, const Ints& starts,
                                   const Ints& counts, const Ints& pages, const Ints& page_ends) {
  const RuntimeConfig& c = runtime.config();
  const size_t count = rows.size();
  require(starts.size() == count && counts.size() == count && page_ends.size() == count,
          "rows, starts, counts and page_ends must have one entry per sequence");
  check_ids(tokens, c.vocab, "token id");
  check_ids(rows, c.num_rows, "row");
  check_ids(pages, c.num_pages, "page");
  std::vector<Sequence> sequences(count);
  int64_t total = 0, page_start = 0;
  for (size_t i = 0; i < count; ++i) {
    Sequence& s = sequences[i];
    s.row = rows.data()[i];
    s.start = starts.data()[i];
    s.count = counts.data()[i];
    s.pages = pages.data() + page_start;
    s.num_pages = static_cast<int>(page_ends.data()[i] - page_start);
    require(s.start >= 0 && s.count > 0, "a sequence needs a start of 0 or more and at least one token");
    require(s.num_pages >= 0 && page_ends.data()[i] <= static_cast<int64_t>(pages.size()), "page_ends do not fit pages");
    require((s.start + s.count + BLOCK - 1) / BLOCK <= s.num_pages || runtime.page_bytes() == 0,
            "sequence " + std::to_string(i) + " has " + std::to_string(s.num_pages) + " pages, too few for " +
                std::to_string(s.start + s.count) + " tokens");
    for (size_t j = 0; j < i; ++j) require(sequences[j].row != s.row, "two sequences of a step share a row");
    total += s.count;
    page_start = page_ends.data()[i];
  }
  require(total == static_cast<int64_t>(tokens.size()), "counts do not add up to the number of tokens");
  require(total <= c.max_step_tokens, "a step takes at most " + std::to_string(c.max_step_tokens) + " tokens, got " +
                                          std::to_string(total));
  return sequences;
}

using Matrix32 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// out = x times the weight, both rounded to 8 bits: the product of the runtime alone, for tests and benchmarks.
void integer_product_of(const std::string& kernels_name, const std::string& format, const Matrix32& weight, const Matrix32& x,
                        const nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>& out) {
  require(format == "int8" || format == "int8_block", "the format must be int8 or int8_block, got " + format);
  const auto outputs = static_cast<int64_t>(weight.shape(0)), inputs = static_cast<int64_t>(weight.shape(1));
  const auto num_rows = static_cast<int64_t>(x.shape(0));
  require(static_cast<int64_t>(x.shape(1)) == inputs && static_cast<int64_t>(out.shape(0)) == num_rows &&
              static_cast<int64_t>(out.shape(1)) == outputs,
          "shapes do not fit: weight (outputs, inputs), x (rows, inputs), out (rows, outputs)");
  const Kernels& kernels = choose_kernels(kernels_name);
  Pool pool(1);
  Matrix matrix(identity_order(outputs), inputs, format == "int8" ? Format::INT8 : Format::INT8_BLOCK, true);
  Arena counting;
  matrix.place(counting);
  Buffer<uint8_t> memory(counting.used());
  Arena arena(memory.data());
  matrix.place(arena);
  matrix.pack({.data = weight.data(), .rows = outputs, .columns = inputs}, pool);
  const int64_t words = words_for(Arithmetic::BF16, inputs), length = quantized_words(inputs);
  Buffer<uint32_t> wide(words), quantized(num_rows * length);
  Buffer<float> sums(num_rows * matrix.panels() * PANEL);
  std::vector<const uint32_t*> rows(num_rows);
  const InKernels scope(kernels);
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t w = 0; w < words; ++w) {
      const float* at = x.data() + i * inputs + 2 * w;
      wide[w] = bf16_pair(at[0], 2 * w + 1 < inputs ? at[1] : 0.0f);
    }
    kernels.quantize(wide.data(), inputs, quantized.data() + i * length);
    rows[i] = quantized.data() + i * length;
  }
  const int64_t stride = matrix.panels() * PANEL;
  for (int64_t panel = 0; panel < matrix.panels(); ++panel)
    matrix.multiply(kernels, panel, rows.data(), static_cast<int>(num_rows), sums.data() + panel * PANEL, stride);
  for (int64_t i = 0; i < num_rows; ++i)
    std::copy_n(sums.data() + i * stride, outputs, out.data() + i * outputs);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("available_kernels", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
    return names;
  });

  m.def("integer_product", &integer_product_of, "kernels"_a, "weights"_a, "weight"_a, "x"_a, "out"_a);

  nb::class_<Geometry>(m, "Geometry")
      .def(nb::init<>())
      .def_rw("heads", &Geometry::heads)
      .def_rw("groups", &Geometry::groups)
      .def_rw("qk", &Geometry::qk)
      .def_rw("v", &Geometry::v)
      .def_rw("window", &Geometry::window)
      .def_rw("rotary_half", &Geometry::rotary_half)
      .def_rw("theta", &Geometry::theta)
      .def_rw("sink", &Geometry::sink);

  nb::class_<RuntimeConfig>(m, "RuntimeConfig")
      .def(nb::init<>())
      .def_rw("vocab", &RuntimeConfig::vocab)
      .def_rw("hidden", &RuntimeConfig::hidden)
      .def_rw("dense_dim", &RuntimeConfig::dense_dim)
      .def_rw("is_sliding", &RuntimeConfig::is_sliding)
      .def_rw("is_moe", &RuntimeConfig::is_moe)
      .def_rw("global_", &RuntimeConfig::global)
      .def_rw("sliding", &RuntimeConfig::sliding)
      .def_rw("experts", &RuntimeConfig::experts)
      .def_rw("top_k", &RuntimeConfig::top_k)
      .def_rw("expert_dim", &RuntimeConfig::expert_dim)
      .def_rw("normalize_weights", &RuntimeConfig::normalize_weights)
      .def_rw("routed_scaling", &RuntimeConfig::routed_scaling)
      .def_rw("mtp_heads", &RuntimeConfig::mtp_heads)
      .def_rw("value_scale", &RuntimeConfig::value_scale)
      .def_rw("eps", &RuntimeConfig::eps)
      .def_rw("num_rows", &RuntimeConfig::num_rows)
      .def_rw("num_pages", &RuntimeConfig::num_pages)
      .def_rw("max_step_tokens", &RuntimeConfig::max_step_tokens)
      .def_rw("threads", &RuntimeConfig::threads)
      .def_rw("kernels", &RuntimeConfig::kernels)
      .def("set_weights", [](RuntimeConfig& c, const std::string& name) {
        const std::pair<const char*, Format> formats[] = {{"float32", Format::F32}, {"bf16", Format::BF16},
                                                          {"int8", Format::INT8}, {"fp8", Format::FP8},
                                                          {"int4", Format::INT4}, {"int8_block", Format::INT8_BLOCK}};
        for (const auto& [known, format] : formats)
          if (name == known) {
            c.format = format;
            c.arithmetic = format == Format::F32 ? Arithmetic::F32 : Arithmetic::BF16;
            return;
          }
        require(false, "weights must be float32, bf16, int8, int8_block, fp8 or int4, got " + name);
      })
      .def("set_activations", [](RuntimeConfig& c, const std::string& name) {
        require(name == "auto" || name == "int8", "activations must be auto or int8, got " + name);
        c.int8_activations = name == "int8";
      })
      .def("set_cache", [](RuntimeConfig& c, const std::string& name) {
        require(name == "auto" || name == "int8", "cache must be auto or int8, got " + name);
        c.int8_cache = name == "int8";
      });

  nb::class_<Runtime>(m, "Runtime")
      .def(nb::init<RuntimeConfig>())
      .def_prop_ro("kernels", &Runtime::kernels_name)
      .def_prop_ro("row_bytes", &Runtime::row_bytes)
      .def_prop_ro("page_bytes", &Runtime::page_bytes)
      .def_prop_ro("weight_bytes", &Runtime::weight_bytes)
      .def_prop_ro("row_state_bytes", &Runtime::row_state_bytes)
      .def("set", [](Runtime& r, const std::string& part, int layer, int expert,
                     nb::ndarray<nb::c_contig, nb::device::cpu> array) { r.set(part, layer, expert, source_of(array)); })
      .def("set_codes", [](Runtime& r, const std::string& part, int layer, int expert, Codes codes, Scales scales) {
        r.set(part, layer, expert, source_of(codes, scales));
      })
      .def("open_weights", &Runtime::open_weights)
      .def("create_weights", &Runtime::create_weights)
      .def("finish_weights", &Runtime::finish_weights)
      .def("check_complete", &Runtime::check_complete)
      .def(
          "forward",
          [](Runtime& r, Ints tokens, Ints rows, Ints starts, Ints counts, Ints pages, Ints page_ends, Ints wanted,
             nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> logits,
             nb::ndarray<int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu> routes) {
            auto sequences = sequences_of(r, tokens, rows, starts, counts, pages, page_ends);
            check_ids(wanted, static_cast<int64_t>(tokens.size()), "wanted place");
            require(logits.shape(0) == wanted.size() && static_cast<int>(logits.shape(1)) == r.config().vocab,
                    "logits must have one row per wanted place and one column per token of the vocabulary");
            require(routes.shape(0) == tokens.size() && static_cast<int>(routes.shape(1)) == r.num_sparse_layers() &&
                        static_cast<int>(routes.shape(2)) == r.config().top_k,
                    "routes must be (tokens, sparse layers, top_k)");
            nb::gil_scoped_release release;
            r.forward(tokens.data(), std::move(sequences), wanted.data(), static_cast<int>(wanted.size()), logits.data(),
                      routes.data());
          })
      .def("track", [](Runtime& r, Ints rows) {
        check_ids(rows, r.config().num_rows, "row");
        r.track(rows.data(), static_cast<int>(rows.size()));
      })
      .def("commit", [](Runtime& r, Ints kept) {
        require(kept.size() == r.step_sequences(), "commit needs one number per sequence of the last forward");
        nb::gil_scoped_release release;
        r.commit(kept.data());
      })
      .def("draft",
           [](Runtime& r, Ints rows, Ints newest, nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> drafts) {
             check_ids(rows, r.config().num_rows, "row");
             check_ids(newest, r.config().vocab, "token id");
             require(rows.size() == newest.size() && drafts.shape(0) == rows.size() &&
                         static_cast<int>(drafts.shape(1)) == r.config().mtp_heads,
                     "draft needs one newest token per row and room for one draft per row and head");
             nb::gil_scoped_release release;
             r.draft(rows.data(), newest.data(), static_cast<int>(rows.size()), drafts.data());
           })
      .def("copy_row", [](Runtime& r, int source, int target) {
        require(std::min(source, target) >= 0 && std::max(source, target) < r.config().num_rows, "no such row");
        if (source != target) r.copy_row(source, target);
      })
      .def("copy_page", [](Runtime& r, int source, int target) {
        require(std::min(source, target) >= 0 && std::max(source, target) < r.config().num_pages, "no such page");
        if (source != target) r.copy_page(source, target);
      })
      .def("read_row", [](const Runtime& r, int row, Bytes state) {
        require(static_cast<int64_t>(state.size()) == r.row_state_bytes(), "state has the wrong size");
        r.read_row(row, state.data());
      })
      .def("write_row", [](Runtime& r, int row, Bytes state) {
        require(static_cast<int64_t>(state.size()) == r.row_state_bytes(), "state has the wrong size");
        r.write_row(row, state.data());
      });
}
