// Thin bindings that take addresses: Python checks shapes and dtypes (olmoe/ops/cpu). The GIL is released while an
// operation runs; only one operation at a time uses the thread pool.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "../ops/decoder.h"
#include "../ops/sampling.h"
#include "running.h"
#include "snapshot.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace olmoe;

namespace {

using Counts = std::vector<int64_t>;
using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // (B, blocks of a sequence)

Sequences sequences(const Counts& counts, const Counts& lengths, const Table& table) {
  return Sequences{int(counts.size()), counts.data(), lengths.data(), table.data(), int64_t(table.shape(1))};
}

}  // namespace

NB_MODULE(_kernels, m) {
  // What Python must know of the packed formats: by name, the type's number and the bytes of a block of one row; and
  // the rows and columns of a block.
  nb::dict formats;
  for (Type type : kPackedTypes)
    with_packed(type, [&]<typename Format>() {
      formats[Format::kName] = nb::make_tuple(int(Format::kType), Format::kBlockBytes);
    });
  m.attr("packed_formats") = formats;
  m.attr("block_shape") = nb::make_tuple(kGroup, kBlock);

  m.def("unchanged", &unchanged);
  m.def("layout", &layout);
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const char* name : isas()) names.emplace_back(name);
    return names;
  });
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("set_isa", [](const std::string& name) { return set_isa(name.c_str()); });
  m.def("set_threads", &set_threads);
  m.def("get_threads", &get_threads);

  nb::class_<Matrix>(m, "Matrix")
      .def("__init__",
           [](Matrix* self, Address data, int type, int rows, int columns, size_t stride, bool bf16_inputs) {
             new (self) Matrix{at<const uint8_t>(data), Type(type), rows, columns, stride, bf16_inputs};
           })
      .def_ro("rows", &Matrix::rows)
      .def_ro("columns", &Matrix::columns);

  m.def("rms_norm", [](Address x, Address weight, float eps, int tokens, int d, Address out) {
    Running running;
    rms_norm(at<float>(x), at<float>(weight), eps, tokens, d, at<float>(out));
  });
  m.def("rope", [](Address x, Address cos, Address sin, int tokens, int heads, int head_dim) {
    Running running;
    rope(at<float>(x), at<float>(cos), at<float>(sin), tokens, heads, head_dim);
  });
  m.def("linear", [](const Matrix& w, Address x, int tokens, Address bias, Address y) {
    Running running;
    static thread_local Activations inputs;
    inputs.set(w, at<float>(x), tokens, w.columns, pool());
    linear(w, inputs, at<float>(bias), nullptr, at<float>(y), w.rows);
  });
  m.def("route", [](Address logits, int tokens, int experts, int k, bool norm, Address weights, Address ids) {
    Running running;
    route(at<float>(logits), tokens, experts, k, norm, at<float>(weights), at<int64_t>(ids));
  });
  m.def("moe", [](const Matrix& gate_up, const Matrix& down, int count, int width, Address x, Address weights,
                  Address ids, int tokens, int k, Address y) {
    Running running;
    moe(Experts{gate_up, down, count, width}, at<float>(x), at<float>(weights), at<int64_t>(ids), tokens, k, nullptr,
        at<float>(y));
  });
  // Read all of [data, data + bytes), to measure the bandwidth of memory in benchmarks.
  m.def("read", [](Address data, size_t bytes) {
    Running running;
    ThreadPool& threads = pool();
    std::atomic<uint64_t> total = 0;
    constexpr size_t kTaskBytes = 1 << 20;
    threads.run(int(bytes / kTaskBytes), 4, [&](int begin, int end, int) {
      total ^= kernels().read(at<const uint8_t>(data) + size_t(begin) * kTaskBytes, size_t(end - begin) * kTaskBytes);
    });
    return total.load();
  });
  m.def("embed", [](const Matrix& w, Address ids, int tokens, Address out) {
    Running running;
    embed(w, at<int64_t>(ids), tokens, at<float>(out));
  });
  m.def("compensates", &compensates);
  m.def("encode", [](const Matrix& weight, Address factor, int type, Address out) {
    Running running;
    encode(weight, at<float>(factor), Type(type), at<uint8_t>(out));
  });
  m.def("decode_book", [](Address codes, Address scales, int blocks, Address entries, int type, Address out) {
    Running running;
    decode_book(at<uint8_t>(codes), at<float>(scales), blocks, at<float>(entries), Type(type), at<void>(out));
  });
  m.def("encode_book",
        [](Address x, int type, int blocks, Address bounds, Address numbers, Address codes, Address scales) {
          Running running;
          encode_book(at<void>(x), Type(type), blocks, at<float>(bounds), at<uint8_t>(numbers), at<uint8_t>(codes),
                      at<float>(scales));
        });
  // Keys and values: the addresses of each layer's, and their strides in bytes.
  nb::class_<CacheView>(m, "CacheView")
      .def("__init__",
           [](CacheView* self, const std::vector<Address>& keys, const std::vector<Address>& values, int type,
              int kv_heads, int head_dim, int64_t block_size, size_t block_bytes, size_t head_bytes, size_t scales_at) {
             new (self) CacheView{{}, Type(type), kv_heads, head_dim, block_size, block_bytes, head_bytes, scales_at};
             for (size_t i = 0; i < keys.size(); i++)
               self->layers.push_back({at<uint8_t>(keys[i]), at<uint8_t>(values.at(i))});
           });

  m.def("attention", [](Address q, Address k, Address v, const Counts& counts, const Counts& lengths,
                        const Table& table, int heads, const CacheView& cache, int layer, Address out) {
    Running running;
    attention(at<float>(q), at<float>(k), at<float>(v), sequences(counts, lengths, table), heads, cache, layer,
              at<float>(out));
  });

  nb::class_<SamplingRow>(m, "SamplingRow")
      .def("__init__",
           [](SamplingRow* self, double temperature, int64_t top_k, double top_p, double min_p, double repetition,
              double presence, double frequency, uint64_t seed, uint64_t position, int logprobs, Address ids,
              int64_t prompt, int64_t length, Address bias_ids, Address biases, int64_t bias_count, Address mask) {
             new (self) SamplingRow{temperature,
                                    top_p,
                                    min_p,
                                    repetition,
                                    presence,
                                    frequency,
                                    top_k,
                                    seed,
                                    position,
                                    logprobs,
                                    at<int64_t>(ids),
                                    prompt,
                                    length,
                                    at<int64_t>(bias_ids),
                                    at<double>(biases),
                                    bias_count,
                                    at<uint32_t>(mask)};
           });
  m.def("sample", [](Address logits, int64_t stride, int allowed, const std::vector<const SamplingRow*>& rows,
                     Address ids, Address status, Address logprobs, Address top_ids, Address top_logprobs, int most) {
    Running running;
    sample(at<float>(logits), stride, allowed, rows,
           Samples{at<int64_t>(ids), at<int32_t>(status), at<float>(logprobs), at<int64_t>(top_ids),
                   at<float>(top_logprobs), most});
  });

  // Changes of what routers choose. Addresses of biases, numbers of experts, whether to renormalise, each token's
  // policy (0: the first is for all tokens), pinned experts (0: none) and temperatures (0: 1), for so many layers.
  nb::class_<Policies>(m, "Policies")
      .def("__init__", [](Policies* self, Address bias, Address top_k, Address norm, Address of_token, Address pinned,
                          Address temperature, int layers, int largest) {
        new (self) Policies{at<float>(bias),
                            at<int32_t>(top_k),
                            at<uint8_t>(norm),
                            at<int32_t>(of_token),
                            at<uint8_t>(pinned),
                            at<float>(temperature),
                            layers,
                            largest};
      });

  nb::class_<LayerWeights>(m, "Layer")
      .def("__init__",
           [](LayerWeights* self, int hidden, int heads, int kv_heads, int head_dim, int top_k, float eps,
              float clip_qkv, bool norm_topk_prob, const std::vector<const Matrix*>& projections,
              const std::vector<Address>& biases, const std::vector<Address>& norms, const Matrix& router,
              const Matrix& gate_up, const Matrix& down, int experts, int width) {
             new (self) LayerWeights();
             self->hidden = hidden, self->heads = heads, self->kv_heads = kv_heads, self->head_dim = head_dim;
             self->top_k = top_k, self->eps = eps, self->clip_qkv = clip_qkv, self->norm_topk_prob = norm_topk_prob;
             self->q = *projections.at(0), self->k = *projections.at(1);
             self->v = *projections.at(2), self->o = *projections.at(3);
             self->q_bias = at<float>(biases.at(0)), self->k_bias = at<float>(biases.at(1));
             self->v_bias = at<float>(biases.at(2)), self->o_bias = at<float>(biases.at(3));
             self->input_norm = at<float>(norms.at(0)), self->post_norm = at<float>(norms.at(1));
             self->q_norm = at<float>(norms.at(2)), self->k_norm = at<float>(norms.at(3));
             self->router = router;
             self->experts = Experts{gate_up, down, experts, width};
           })
      .def("attention_inputs",
           [](const LayerWeights& self, Address x, Address cos, Address sin, int tokens, Address q, Address k,
              Address v) {
             Running running;
             attention_inputs(self, at<float>(x), at<float>(cos), at<float>(sin), tokens, at<float>(q), at<float>(k),
                              at<float>(v));
           })
      // Over layer `index` of a cache.
      .def("forward",
           [](const LayerWeights& self, Address x, Address cos, Address sin, const Counts& counts,
              const Counts& lengths, const Table& table, const CacheView& cache, int index, Address y, Address logits,
              Address weights, Address ids) {
             Running running;
             layer(self, at<float>(x), at<float>(cos), at<float>(sin), sequences(counts, lengths, table), cache, index,
                   at<float>(y), {at<float>(logits), at<float>(weights), at<int64_t>(ids)});
           })
      .def("attention_output",
           [](const LayerWeights& self, Address x, Address attended, int tokens, Address y, Address logits,
              Address weights, Address ids, const std::optional<Policies>& policies, int index) {
             Running running;
             attention_output(self, at<float>(x), at<float>(attended), tokens, at<float>(y),
                              {at<float>(logits), at<float>(weights), at<int64_t>(ids)},
                              policies ? &*policies : nullptr, index);
           })
      // Layers one after the other, layer i over layer i of the cache; x is overwritten. Of what the routers decide,
      // each has its own part: logits (L, N, E), weights and ids (L, N, K).
      .def_static("forward_all", [](const std::vector<const LayerWeights*>& stack, Address x, Address cos, Address sin,
                                    const Counts& counts, const Counts& lengths, const Table& table,
                                    const CacheView& cache, Address y, Address logits, Address weights, Address ids,
                                    const std::optional<Policies>& policies) {
        Running running;
        const Sequences all = sequences(counts, lengths, table);
        const size_t tokens = all.tokens();
        float *from = at<float>(x), *to = at<float>(y);
        for (size_t i = 0; i < stack.size(); i++) {
          const LayerWeights& w = *stack[i];
          const size_t k = i * tokens * (policies ? policies->largest : w.top_k);
          layer(w, from, at<float>(cos), at<float>(sin), all, cache, int(i), to,
                {at<float>(logits) + i * tokens * w.experts.count, at<float>(weights) + k, at<int64_t>(ids) + k},
                policies ? &*policies : nullptr);
          std::swap(from, to);
        }
        if (from != at<float>(y)) std::copy_n(from, tokens * stack.front()->hidden, at<float>(y));
      });

  nb::class_<DecoderWeights>(m, "Decoder")
      .def("__init__",
           [](DecoderWeights* self, const std::vector<const LayerWeights*>& layers, const Matrix& embedding,
              Address norm, float eps, const Matrix& head) {
             new (self) DecoderWeights{{}, embedding, head, at<float>(norm), eps};
             for (const LayerWeights* layer : layers) self->layers.push_back(*layer);
           })
      // `rows` and `traced` say which tokens' logits and routing are written.
      .def("forward", [](const DecoderWeights& self, const Counts& ids, const Counts& angles, Address cos, Address sin,
                         const Counts& counts, const Counts& lengths, const Table& table, const CacheView& cache,
                         const std::optional<Policies>& policies, const Counts& rows, Address logits,
                         const Counts& traced, Address trace_ids, Address trace_weights) {
        Running running;
        const Wanted wanted{rows.data(),        int(rows.size()),       at<float>(logits),       traced.data(),
                            int(traced.size()), at<int16_t>(trace_ids), at<float>(trace_weights)};
        forward(self, {ids.data(), angles.data(), at<float>(cos), at<float>(sin)}, sequences(counts, lengths, table),
                cache, policies ? &*policies : nullptr, wanted);
      });

  bind_training(m);
}
