#include "training.h"

#include <nanobind/stl/vector.h>

#include <utility>

#include "../core/meeting.h"
#include "../core/team.h"
#include "../ops/training.h"
#include "running.h"

namespace nb = nanobind;
using namespace olmoe;

void bind_training(nb::module_& m) {
  // The address of GOMP_parallel, or 0.
  m.def("set_parallel", [](Address parallel) { set_parallel(reinterpret_cast<Parallel>(parallel)); });
  m.attr("loss_tokens") = kLossTokens;

  m.attr("counter_bytes") = kCounterBytes;
  m.def("has_left", &has_left);
  m.def("meet", [](Address counters, int file, int processes, int rank, int64_t turn, double seconds) {
    nb::gil_scoped_release release;
    return meet(at<void>(counters), file, processes, rank, turn, seconds);
  });

  nb::enum_<Products>(m, "Products").value("FP32", Products::kFP32).value("BF16", Products::kBF16);
  m.def("has_bf16_products", [] { return kernels().bf16_product != nullptr; });

  // Holds addresses: of offsets, order, token ids and positions.
  nb::class_<RoutedRows>(m, "RoutedRows")
      .def("__init__",
           [](RoutedRows* self, int tokens, int k, int experts, Address offsets, Address order, Address token_ids,
              Address positions) {
             new (self) RoutedRows{tokens,
                                   k,
                                   experts,
                                   at<int32_t>(offsets),
                                   at<int32_t>(order),
                                   at<int32_t>(token_ids),
                                   at<int32_t>(positions)};
           })
      .def("sort", [](const RoutedRows& self, Address ids, int64_t first) {
        Running running;
        sort_rows(at<int64_t>(ids), first, self);
        return self.rows();
      });
  nb::class_<ExpertWeights>(m, "ExpertWeights")
      .def("__init__", [](ExpertWeights* self, Address gate_up, Address down, int hidden, int width) {
        new (self) ExpertWeights{at<float>(gate_up), at<float>(down), hidden, width};
      });
  m.def("experts_forward", [](Products in, Address x, Address weights, const RoutedRows& rows,
                              const ExpertWeights& experts, Address units, Address results, Address out) {
    Running running;
    experts_forward(in, at<float>(x), at<float>(weights), rows, experts, at<float>(units), at<float>(results),
                    at<float>(out));
  });
  // First the gradients of x, weights, gate_up and down, then scratch memory: see ExpertGradients.
  m.def("experts_backward",
        [](Products in, Address x, Address weights, const RoutedRows& rows, const ExpertWeights& experts, Address units,
           Address grad, Address grad_x, Address grad_weights, Address grad_gate_up, Address grad_down, Address hidden,
           Address grad_units, Address grad_rows) {
          Running running;
          experts_backward(in, at<float>(x), at<float>(weights), rows, experts, at<float>(units), at<float>(grad),
                           {at<float>(grad_x), at<float>(grad_weights), at<float>(grad_gate_up), at<float>(grad_down),
                            at<float>(hidden), at<float>(grad_units), at<float>(grad_rows)});
        });
  m.def("linear_forward",
        [](Products in, Address x, Address weight, Address bias, int n, int rows, int columns, Address y) {
          Running running;
          linear_forward(in, at<float>(x), at<float>(weight), at<float>(bias), n, rows, columns, at<float>(y));
        });
  m.def("linear_backward", [](Products in, Address x, Address weight, Address grad, int n, int rows, int columns,
                              Address grad_x, Address grad_weight) {
    Running running;
    linear_backward(in, at<float>(x), at<float>(weight), at<float>(grad), n, rows, columns, at<float>(grad_x),
                    at<float>(grad_weight));
  });
  m.def("norm_forward", [](Address x, Address weight, float eps, int n, int d, Address y) {
    Running running;
    norm_forward(at<float>(x), at<float>(weight), eps, n, d, at<float>(y));
  });
  m.def("norm_backward",
        [](Address x, Address weight, Address grad, float eps, int n, int d, Address grad_x, Address grad_weight) {
          Running running;
          norm_backward(at<float>(x), at<float>(weight), at<float>(grad), eps, n, d, at<float>(grad_x),
                        at<float>(grad_weight));
        });
  m.def("rotate", [](Address x, Address cos, Address sin, int n, int heads, int head_dim, bool back, Address y) {
    Running running;
    rotate(at<float>(x), at<float>(cos), at<float>(sin), n, heads, head_dim, back, at<float>(y));
  });
  m.def("route_forward",
        [](Address logits, int tokens, int experts, int k, Address probabilities, Address weights, Address ids) {
          Running running;
          route_forward(at<float>(logits), tokens, experts, k, at<float>(probabilities), at<float>(weights),
                        at<int64_t>(ids));
        });
  m.def("route_backward",
        [](Address probabilities, Address ids, Address grad, int tokens, int experts, int k, Address grad_logits) {
          Running running;
          route_backward(at<float>(probabilities), at<int64_t>(ids), at<float>(grad), tokens, experts, k,
                         at<float>(grad_logits));
        });
  // Tensors (B, H, T, Dh): an address, and the floats from one example, head and token to the next.
  nb::class_<HeadRows>(m, "HeadRows")
      .def("__init__", [](HeadRows* self, Address data, int64_t batch, int64_t head, int64_t token) {
        new (self) HeadRows{at<float>(data), batch, head, token};
      });
  nb::class_<AttentionShape>(m, "AttentionShape")
      .def("__init__", [](AttentionShape* self, int batch, int heads, int kv_heads, int tokens, int head_dim,
                          std::vector<int> lengths) {
        new (self) AttentionShape{batch, heads, kv_heads, tokens, head_dim, std::move(lengths)};
      });
  m.attr("largest_head") = kCausalDim;
  m.def("causal_forward", [](Products in, const AttentionShape& shape, const HeadRows& q, const HeadRows& k,
                             const HeadRows& v, const HeadRows& out, Address sums) {
    Running running;
    causal_forward(in, shape, q, k, v, out, at<float>(sums));
  });
  m.def("causal_backward", [](Products in, const AttentionShape& shape, const HeadRows& q, const HeadRows& k,
                              const HeadRows& v, const HeadRows& out, Address sums, const HeadRows& grad,
                              const HeadRows& grad_q, const HeadRows& grad_k, const HeadRows& grad_v) {
    Running running;
    causal_backward(in, shape, q, k, v, out, at<float>(sums), grad, {grad_q, grad_k, grad_v});
  });
  m.def("cross_entropy", [](Products in, Address x, Address weight, Address labels, int64_t ignored, int n, int d,
                            int words, Address logits, Address grad_x, Address grad_weight) {
    Running running;
    return cross_entropy(in, at<float>(x), at<float>(weight), at<int64_t>(labels), ignored, n, d, words,
                         at<float>(logits), at<float>(grad_x), at<float>(grad_weight));
  });
}
