// The router's choice: softmax over all experts, then the K largest.
#include <algorithm>
#include <numeric>

#include "ops.h"

namespace olmoe {

namespace {

int policy_of(const Policies* policies, int token) {
  if (!policies) return -1;
  return policies->of_token ? policies->of_token[token] : 0;
}

}  // namespace

void route(const float* logits, int tokens, int experts, int k, bool norm_topk_prob, float* weights, int64_t* ids,
           const Policies* policies, int layer) {
  const Kernels& kernel = kernels();
  const int width = policies ? policies->largest : k;
  pool().run(tokens, 32, [&](int begin, int end, int) {
    std::vector<float> p(experts), tempered;
    std::vector<int> order(experts);
    for (int t = begin; t < end; t++) {
      std::copy_n(logits + size_t(t) * experts, experts, p.begin());
      int chosen = k;
      bool norm = norm_topk_prob;
      const uint8_t* pinned = nullptr;
      const float* weight = p.data();  // of each expert, if it is chosen
      if (const int policy = policy_of(policies, t); policy >= 0) {
        const size_t row = size_t(policy) * policies->layers + layer;
        const float* bias = policies->bias + row * experts;
        for (int e = 0; e < experts; e++) p[e] += bias[e];
        chosen = policies->top_k[policy];
        norm = policies->norm[policy];
        if (policies->pinned) pinned = policies->pinned + row * experts;
        if (const float temperature = policies->temperature ? policies->temperature[row] : 1; temperature != 1) {
          tempered.resize(experts);
          for (int e = 0; e < experts; e++) tempered[e] = p[e] / temperature;
          kernel.softmax(tempered.data(), experts);
          weight = tempered.data();
        }
      }
      kernel.softmax(p.data(), experts);
      std::iota(order.begin(), order.end(), 0);
      const auto falling = [&](int a, int b) { return p[a] > p[b] || (p[a] == p[b] && a < b); };
      if (pinned) {
        std::partial_sort(order.begin(), order.begin() + chosen, order.end(), [&](int a, int b) {
          return bool(pinned[a]) == bool(pinned[b]) ? falling(a, b) : bool(pinned[a]);
        });
        std::sort(order.begin(), order.begin() + chosen, falling);
      } else {
        std::partial_sort(order.begin(), order.begin() + chosen, order.end(), falling);
      }
      float total = 0;
      for (int i = 0; i < chosen; i++) total += weight[order[i]];
      norm = norm && total != 0;  // a low temperature can leave nothing for pinned experts
      for (int i = 0; i < width; i++) {
        weights[size_t(t) * width + i] = i >= chosen ? 0 : norm ? weight[order[i]] / total : weight[order[i]];
        ids[size_t(t) * width + i] = i >= chosen ? -1 : order[i];
      }
    }
  });
}

}  // namespace olmoe
