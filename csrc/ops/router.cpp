// The router's choice: softmax over all experts, then the K largest.
#include <algorithm>
#include <numeric>

#include "ops.h"

namespace olmoe {

void route(const float* logits, int tokens, int experts, int k, bool norm_topk_prob, float* weights, int64_t* ids,
           const Policies* policies, int layer) {
  const Kernels& kernel = kernels();
  const int width = policies ? policies->largest : k;
  pool().run(tokens, 32, [&](int begin, int end, int) {
    std::vector<float> p(experts);
    std::vector<int> order(experts);
    for (int t = begin; t < end; t++) {
      std::copy_n(logits + size_t(t) * experts, experts, p.begin());
      int chosen = k;
      bool norm = norm_topk_prob;
      if (const int policy = policies ? policies->of_token[t] : -1; policy >= 0) {
        const float* bias = policies->bias + (size_t(policy) * policies->layers + layer) * experts;
        for (int e = 0; e < experts; e++) p[e] += bias[e];
        chosen = policies->top_k[policy];
        norm = policies->norm[policy];
      }
      kernel.softmax(p.data(), experts);
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + chosen, order.end(),
                        [&](int a, int b) { return p[a] > p[b] || (p[a] == p[b] && a < b); });
      float total = 0;
      for (int i = 0; i < chosen; i++) total += p[order[i]];
      for (int i = 0; i < width; i++) {
        weights[size_t(t) * width + i] = i >= chosen ? 0 : norm ? p[order[i]] / total : p[order[i]];
        ids[size_t(t) * width + i] = i >= chosen ? -1 : order[i];
      }
    }
  });
}

}  // namespace olmoe
