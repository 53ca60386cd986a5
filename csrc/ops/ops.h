// The operations that make up a forward pass: over raw pointers, multithreaded, with the kernels of one instruction
// set. All activations are fp32. Results do not depend on the number of threads: each output value is computed by one
// thread, in a fixed order.
//
// Shapes legend: see ../types.h.
#pragma once

#include <initializer_list>
#include <vector>

#include "../core/cache.h"
#include "../core/memory.h"
#include "../core/threads.h"
#include "../core/types.h"

namespace olmoe {

// The chosen kernels (see dispatch.cpp).
const Kernels& kernels();
bool set_isa(const char* name);   // false: this machine or build lacks it
std::vector<const char*> isas();  // what this machine can run, best first

// Rows of activations as a matrix wants them (see ActivationRow). Keeps its memory between calls.
class Activations {
 public:
  // x (N, C), `ld` floats from row to row, for products with `m`.
  void set(const Matrix& m, const float* x, int tokens, int ld, ThreadPool& pool);
  // Room for `tokens` rows that the caller fills with `put`.
  void reserve(const Matrix& m, int tokens);
  // Convert columns [column, column + count) of one row; a multiple of 32 where `m` is packed.
  void put(int row, int column, const float* x, int count);
  const ActivationRow* rows() const { return rows_.data(); }
  ActivationRow row(int i) const { return rows_[i]; }
  int tokens() const { return int(rows_.size()); }

 private:
  bool packed_ = false, bf16_ = false, split_ = false;
  int columns_ = 0, zero_ = 0;
  Aligned<uint8_t> bytes_;
  std::vector<ActivationRow> rows_;
};

void rms_norm(const float* x, const float* weight, float eps, int tokens, int d, float* out);
void rope(float* x, const float* cos, const float* sin, int tokens, int heads, int head_dim);

// out[t * ld + r] = m[row + r] . x[t] for some rows, the first of them at a group's border, on the calling thread,
// which reads the group `next` of `m` after these, if that is known.
void multiply(const Matrix& m, int expert, int row, int rows, const ActivationRow* x, int tokens, float* out, int ld,
              const uint8_t* next = nullptr);

// How many tokens to multiply at a time, so that their rows stay in the cache while weights stream past, or vice versa.
int token_block(const Matrix& m);

// y[t * ld + r] = m[r] . x[t], plus bias[r] and add[t * ld + r] where these are not null.
struct Product {
  const Matrix* m;
  const float* bias;
  const float* add;
  float* y;
  int ld;
};
// Products with the same inputs, of matrices of one type and as many columns, in one parallel step.
void linear(std::initializer_list<Product> products, const Activations& x);
void linear(const Matrix& m, const Activations& x, const float* bias, const float* add, float* y, int ld);

// Changes to what routers choose, for some or all tokens of a call (olmoe/runner/policy.py: RouterPolicy).
struct Policies {
  const float* bias = nullptr;     // (policies, L, E), added to the logits; -infinity for an expert that is not chosen
  const int32_t* top_k = nullptr;  // (policies), experts that a token chooses
  const uint8_t* norm = nullptr;   // (policies), whether the chosen probabilities are divided by their sum
  const int32_t* of_token = nullptr;   // (N), the policy of each token, or -1; null: the first is that of all tokens
  const uint8_t* pinned = nullptr;     // (policies, L, E), experts that every token chooses; null: none
  const float* temperature = nullptr;  // (policies, L), what logits are divided by for the weights; null: 1
  int layers = 0, largest = 0;         // L, and the largest of `top_k` and the model's own
};

// Softmax over all experts, the K largest by falling probability (ties: the lower expert first, as a stable sort
// has it). logits (N, E) -> weights (N, K), ids (N, K). With `policies`, of which those for `layer` count, K is the
// largest of theirs, and a token that chooses fewer has ids of -1 and weights of 0 behind them. Pinned experts are
// among the chosen, in their turn by probability. A temperature changes the weights and never the choice.
void route(const float* logits, int tokens, int experts, int k, bool norm_topk_prob, float* weights, int64_t* ids,
           const Policies* policies = nullptr, int layer = 0);

struct Experts {
  Matrix gate_up;  // (E) x (2F, D), gate rows first
  Matrix down;     // (E) x (D, F)
  int count = 0, width = 0;
};
// y (N, D) = add + sum over k of weights[n, k] * expert ids[n, k] of x[n], where -1 is no expert; `add` may be null or
// y.
void moe(const Experts& experts, const float* x, const float* weights, const int64_t* ids, int tokens, int k,
         const float* add, float* y);

// Attention of the new tokens of each sequence over layer `index` of a cache, to which their keys and values are
// written first. q (N, H, Dh), k and v (N, G, Dh) -> out (N, H, Dh).
void attention(const float* q, const float* k, const float* v, const Sequences& sequences, int heads,
               const CacheView& cache, int index, float* out);

// Rows of an embedding matrix: ids (N) -> out (N, D). `ids` must be below m.rows.
void embed(const Matrix& m, const int64_t* ids, int tokens, float* out);

// A row-major matrix (R, C), R a multiple of 16, stored as kQ4 or kQ5 with chosen codes: by `search`, or, with an
// upper triangular factor (C, C), by `compensate`, for which R is a multiple of 32. See olmoe/quant/search.py.
bool compensates();  // the chosen kernels can
void encode(const Matrix& weight, const float* factor, Type type, uint8_t* out);

// Blocks of kBookBlock values from and to 4-bit indices into a code book; see Kernels.
void decode_book(const uint8_t* codes, const float* scales, int blocks, const float* entries, Type type, void* out);
void encode_book(const void* x, Type type, int blocks, const float* bounds, const uint8_t* numbers, uint8_t* codes,
                 float* scales);

}  // namespace olmoe
