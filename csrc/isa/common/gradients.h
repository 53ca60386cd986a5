// What training has besides products and elementwise.h: gradients of what that computes, and a token's heads or rows at
// once.
#pragma once

#include "elementwise.h"

namespace olmoe {
namespace {

inline void rotate(const float* x, const float* cos, const float* sin, int heads, int head_dim, bool back, float* y) {
  const int half = head_dim / 2;
  int i = 0;
  for (; i + W <= half; i += W) {
    const vf c = load(cos + i), s = back ? -load(sin + i) : load(sin + i);
    for (int h = 0; h < heads; h++) {
      const float* head = x + size_t(h) * head_dim + i;
      const vf a = load(head), b = load(head + half);
      store(y + size_t(h) * head_dim + i, a * c - b * s);
      store(y + size_t(h) * head_dim + half + i, b * c + a * s);
    }
  }
  for (; i < half; i++) {
    const float c = cos[i], s = back ? -sin[i] : sin[i];
    for (int h = 0; h < heads; h++) {
      const float a = x[size_t(h) * head_dim + i], b = x[size_t(h) * head_dim + half + i];
      y[size_t(h) * head_dim + i] = a * c - b * s;
      y[size_t(h) * head_dim + half + i] = b * c + a * s;
    }
  }
}

inline void combine(const float* rows, const int32_t* positions, const float* weights, int tokens, int k, int n,
                    float* y) {
  constexpr int kVectors = 8;  // of sums at a time
  for (int t = 0; t < tokens; t++, positions += k, y += n) {
    if (t + 1 < tokens)
      for (int i = k; i < 2 * k; i++)
        if (positions[i] >= 0) fetch_ahead(rows + size_t(positions[i]) * n, size_t(n) * sizeof(float));
    int c = 0;
    for (; c + kVectors * W <= n; c += kVectors * W) {
      vf total[kVectors] = {};
      for (int i = 0; i < k; i++) {
        if (positions[i] < 0) continue;
        const float* row = rows + size_t(positions[i]) * n + c;
        const vf weight = splat(weights ? weights[i] : 1.0f);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; v++) total[v] += load(row + v * W) * weight;
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) store(y + c + v * W, total[v]);
    }
    for (; c < n; c++) {
      float total = 0;
      for (int i = 0; i < k; i++)
        if (positions[i] >= 0) total += (weights ? weights[i] : 1.0f) * rows[size_t(positions[i]) * n + c];
      y[c] = total;
    }
    if (weights) weights += k;
  }
}

struct UnitGradient {
  vf out, gate, up;
};

OLMOE_INLINE UnitGradient unit_gradient(vf g, vf u, vf grad) {
  const vf lowest = splat(-88.0f);  // as in swiglu
  const vf clamped = vmax(lowest, g);
  // Zero below that: what is left of a sigmoid there matters again where it is multiplied with a large weight.
  const vf share = g < lowest ? vf{} : 1.0f / (vexp(-clamped) + 1.0f);
  g = clamped;
  const vf activated = g * share;
  return {activated * u, grad * u * share * (1.0f + g * (1.0f - share)), grad * activated};
}

inline float swiglu_backward(const float* gate, const float* up, const float* grad, float weight, int n, float* out,
                             float* grad_gate, float* grad_up) {
  vf totals = {};
  int i = 0;
  for (; i + W <= n; i += W) {
    const vf g = load(grad + i);
    const UnitGradient unit = unit_gradient(load(gate + i), load(up + i), g);
    totals += unit.out * g;
    store(out + i, unit.out * weight);
    store(grad_gate + i, unit.gate * weight);
    store(grad_up + i, unit.up * weight);
  }
  float total = sum(totals);
  for (; i < n; i++) {
    const UnitGradient unit = unit_gradient(splat(gate[i]), splat(up[i]), splat(grad[i]));
    total += unit.out[0] * grad[i];
    out[i] = unit.out[0] * weight, grad_gate[i] = unit.gate[0] * weight, grad_up[i] = unit.up[0] * weight;
  }
  return total;
}

// With y = w x / r, r the root mean square: dx = (w dy - x mean(w dy x) / r^2) / r, and dw += dy x / r.
inline void rms_norm_backward(const float* x, const float* weight, const float* grad, float eps, int d, float* grad_x,
                              float* grad_weight) {
  vf squares = {}, products = {};
  int i = 0;
  for (; i + W <= d; i += W) {
    const vf v = load(x + i);
    squares += v * v;
    products += v * load(weight + i) * load(grad + i);
  }
  float square = sum(squares), product = sum(products);
  for (; i < d; i++) square += x[i] * x[i], product += x[i] * weight[i] * grad[i];
  const float scale = 1.0f / std::sqrt(square / float(d) + eps), back = product / float(d) * scale * scale;
  for (i = 0; i + W <= d; i += W) {
    const vf v = load(x + i), g = load(grad + i);
    if (grad_x) store(grad_x + i, (load(weight + i) * g - v * back) * scale);
    store(grad_weight + i, load(grad_weight + i) + g * v * scale);
  }
  for (; i < d; i++) {
    if (grad_x) grad_x[i] = (weight[i] * grad[i] - x[i] * back) * scale;
    grad_weight[i] += grad[i] * x[i] * scale;
  }
}

inline float cross_entropy(float* logits, int n, int label, bool gradient) {
  vf tops = splat(logits[0]);
  int i = 0;
  for (; i + W <= n; i += W) tops = vmax(load(logits + i), tops);
  float top = max_of(tops);
  for (; i < n; i++) top = logits[i] > top ? logits[i] : top;
  const float chosen = logits[label] - top;
  vf totals = {};
  for (i = 0; i + W <= n; i += W) {
    const vf e = vexp(load(logits + i) - top);
    totals += e;
    store(logits + i, e);
  }
  float total = sum(totals);
  for (; i < n; i++) total += logits[i] = exp_one(logits[i] - top);
  if (gradient) {
    const float scale = 1.0f / total;
    for (i = 0; i + W <= n; i += W) store(logits + i, load(logits + i) * scale);
    for (; i < n; i++) logits[i] *= scale;
    logits[label] -= 1.0f;
  }
  return std::log(total) - chosen;
}

}  // namespace
}  // namespace olmoe
