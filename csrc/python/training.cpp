#include "training.h"

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
  // Gradients are those of x, weights, gate_up and down, then comes memory: see ExpertGradients.
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
  m.def("cross_entropy", [](Products in, Address x, Address weight, Address labels, int64_t ignored, int n, int d,
                            int words, Address logits, Address grad_x, Address grad_weight) {
    Running running;
    return cross_entropy(in, at<float>(x), at<float>(weight), at<int64_t>(labels), ignored, n, d, words,
                         at<float>(logits), at<float>(grad_x), at<float>(grad_weight));
  });
}
