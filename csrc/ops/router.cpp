// The router's choice: softmax over all experts, then the K largest.
#include <algorithm>
#include <numeric>

#include "ops.h"

namespace olmoe {

void route(const float* logits, int tokens, int experts, int k, bool norm_topk_prob, float* weights, int64_t* ids) {
  const Kernels& kernel = kernels();
  pool().run(tokens, 32, [&](int begin, int end, int) {
    std::vector<float> p(experts);
    std::vector<int> order(experts);
    for (int t = begin; t < end; t++) {
      std::copy_n(logits + size_t(t) * experts, experts, p.begin());
      kernel.softmax(p.data(), experts);
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + k, order.end(),
                        [&](int a, int b) { return p[a] > p[b] || (p[a] == p[b] && a < b); });
      float total = 0;
      for (int i = 0; i < k; i++) total += p[order[i]];
      for (int i = 0; i < k; i++) {
        weights[size_t(t) * k + i] = norm_topk_prob ? p[order[i]] / total : p[order[i]];
        ids[size_t(t) * k + i] = order[i];
      }
    }
  });
}

}  // namespace olmoe
