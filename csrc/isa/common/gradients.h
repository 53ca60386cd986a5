// Gradients of the functions in elementwise.h, for training: kernels over one row of fp32 values.
#pragma once

#include "elementwise.h"

namespace olmoe {
namespace {

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
