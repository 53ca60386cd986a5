// The operations of training, forward and backward, in fp32 and on torch's threads (core/team.h). As in inference,
// every value is computed by one thread in a fixed order, so that results do not depend on the number of threads. A
// null pointer for a gradient means that it is not wanted.
//
// Shapes legend: see ../core/types.h, and V words.
#pragma once

#include <vector>

#include "ops.h"

namespace olmoe {

// The routed rows of N tokens, sorted by expert, ties by token: one for each of their N K choices of these experts.
// Each array is filled by `sort_rows`.
struct RoutedRows {
  int tokens, k, experts;
  int32_t* offsets;    // (E + 1): rows of expert e are offsets[e] to offsets[e + 1]
  int32_t* order;      // (M): which of the N K choices a row is
  int32_t* token_ids;  // (M): the token of a row
  int32_t* positions;  // (N, K): the row of a choice, -1 if it is one of another expert

  int choices() const { return tokens * k; }
  int rows() const { return offsets[experts]; }
};

// The precision of the factors of products: fp32, or rounded to bf16, which needs kernels with `bf16_product`. Sums and
// results are fp32 either way.
enum class Products { kFP32, kBF16 };

// The experts of `rows` have the ids from `first` on; choices of others have no row. ids (N, K).
void sort_rows(const int64_t* ids, int64_t first, const RoutedRows& rows);

// The experts of a layer: gate_up (E, 2 F, D), down (E, D, F).
struct ExpertWeights {
  const float *gate_up, *down;
  int hidden, width;
};

// x (N, D) -> out (N, D), the sum of each token's rows times their weights of (N, K). Kept for `experts_backward` are
// the products with gate_up, units (M, 2 F); results (M, D) is memory that is needed meanwhile.
void experts_forward(Products in, const float* x, const float* weights, const RoutedRows& rows,
                     const ExpertWeights& experts, float* units, float* results, float* out);

// Where gradients are written, and scratch memory: hidden (M, F), grad_units (M, 2 F) and, if the gradient of x is
// wanted, grad_rows (M, D).
struct ExpertGradients {
  float *x, *weights, *gate_up, *down;
  float *hidden, *grad_units, *grad_rows;
};
void experts_backward(Products in, const float* x, const float* weights, const RoutedRows& rows,
                      const ExpertWeights& experts, const float* units, const float* grad,
                      const ExpertGradients& gradients);

// x (N, C) times weight (R, C) transposed, plus bias -> y (N, R).
void linear_forward(Products in, const float* x, const float* weight, const float* bias, int n, int rows, int columns,
                    float* y);
void linear_backward(Products in, const float* x, const float* weight, const float* grad, int n, int rows, int columns,
                     float* grad_x, float* grad_weight);

void norm_backward(const float* x, const float* weight, const float* grad, float eps, int n, int d, float* grad_x,
                   float* grad_weight);

void norm_forward(const float* x, const float* weight, float eps, int n, int d, float* y);

// Rotate-half of x (N, H, Dh), or with `back` the other way, which is its gradient.
void rotate(const float* x, const float* cos, const float* sin, int n, int heads, int head_dim, bool back, float* y);

// The softmax of logits (N, E) and its k largest by falling probability, the lower expert first among equals: weights
// and ids (N, K). The gradient is that of logits for `grad`, that of weights.
void route_forward(const float* logits, int tokens, int experts, int k, float* probabilities, float* weights,
                   int64_t* ids);
void route_backward(const float* probabilities, const int64_t* ids, const float* grad, int tokens, int experts, int k,
                    float* grad_logits);

// Rows of heads in a tensor (B, H, T, Dh): the floats from one example, head and token to the next. Those of one row
// follow each other.
struct HeadRows {
  float* data;
  int64_t batch, head, token;
  float* at(int b, int h) const { return data + b * batch + h * head; }
};
// With `lengths`, which add up to T, there is one example (B = 1) of texts of these lengths, and each sees itself
// alone.
struct AttentionShape {
  int batch, heads, kv_heads, tokens, head_dim;
  std::vector<int> lengths;
};
// Causal attention of q (B, H, T, Dh) over k and v (B, G, T, Dh) -> out; `sums` (B, H, T) are kept for backward.
void causal_forward(Products in, const AttentionShape& shape, const HeadRows& q, const HeadRows& k, const HeadRows& v,
                    const HeadRows& out, float* sums);
// Gradients of q, k and v for `grad`, that of out.
struct AttentionGradients {
  HeadRows q, k, v;
};
void causal_backward(Products in, const AttentionShape& shape, const HeadRows& q, const HeadRows& k, const HeadRows& v,
                     const HeadRows& out, const float* sums, const HeadRows& grad, const AttentionGradients& gradients);

// The sum of -log softmax(x weight^T)[label] over the tokens whose label is not `ignored`, and its gradients.
// x (N, D), weight (V, D). `logits` holds kLossTokens * V floats.
constexpr int kLossTokens = 512;
double cross_entropy(Products in, const float* x, const float* weight, const int64_t* labels, int64_t ignored, int n,
                     int d, int words, float* logits, float* grad_x, float* grad_weight);

}  // namespace olmoe
