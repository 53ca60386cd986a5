// Data that kernels, operations and bindings share. No torch, no Python.
//
// Shapes legend: N tokens, D hidden, H heads, G KV heads, Dh head dim, E experts, K experts per token,
// M = N*K routed rows, F expert width; R rows (outputs) and C columns (inputs) of a matrix.
#pragma once

#include <cstddef>
#include <cstdint>

#include "traits.h"

#if !defined(__GNUC__) && !defined(__clang__)
#error \
    "The kernels need the vector types of GCC and Clang, which this compiler lacks; olmoe runs on torch without them."
#endif

namespace olmoe {

// One block of an activation row, quantized to int8: x = d * q. `correction` is -zero * sum(q), where `zero` is
// what the weight's unsigned codes are offset by, so that an unsigned dot product that starts there is the signed one.
struct ActivationBlock {
  float d;
  int32_t correction;
  int8_t q[kBlock];
};
static_assert(sizeof(ActivationBlock) == 40);

// A matrix (R, C), or a stack of them `stride` bytes apart. Packed ones are laid out as olmoe/quant/blocks.py says:
// groups of 16 rows, each first the codes of its C / 32 blocks, then their fp16 scales. Others are row-major.
struct Matrix {
  const uint8_t* data = nullptr;
  Type type = Type::kF32;
  int rows = 0, columns = 0;
  size_t stride = 0;
  bool bf16_inputs = false;  // a bf16 matrix whose activations may be rounded to bf16, because that is what they were

  bool packed() const { return is_packed(type); }
  int zero() const { return zero_of(type); }
  int blocks() const { return columns / kBlock; }
  int groups() const { return (rows + kGroup - 1) / kGroup; }
  // Bytes of 16 rows.
  size_t group_bytes() const {
    return packed() ? packed_group_bytes(type, blocks()) : size_t(columns) * sizeof_type(type) * kGroup;
  }
  const uint8_t* group(int expert, int g) const { return data + expert * stride + g * group_bytes(); }
};

// What a matrix is multiplied with: a row of int8 blocks for packed matrices, of bf16 where `Kernels::bf16_rows`
// multiply, else of fp32. Among many, an fp32 row also has its values by column modulo the kernels' `lanes` (see
// isa/common/float_tiles.h); else `lanes` is null.
struct ActivationRow {
  union {
    const ActivationBlock* blocks;
    const float* f32;
    const uint16_t* bf16;
  };
  const float* lanes;
};

// Where kKeyBlock positions of a KV head lie in a cache: keys and values (kKeyBlock, Dh), and in one of kI8 the scales
// (kKeyBlock) that these are to be multiplied with.
struct KeyBlock {
  const void *keys = nullptr, *values = nullptr;
  const float *key_scales = nullptr, *value_scales = nullptr;
};

// One factor of a matrix product in training. Row r starts `ld` * rows[r] floats after `data`, or `ld` * r without
// `rows`. With `turned`, the factor is the transpose of the matrix with these rows.
struct Factor {
  const float* data;
  size_t ld;
  const int32_t* rows = nullptr;
  bool turned = false;
};

// One query head of a sequence in training and the KV head that it looks at: `tokens` rows of `head_dim` floats each,
// `*_ld` floats apart. Scores are multiplied with `scale`.
struct CausalHead {
  const float *q, *k, *v;
  size_t q_ld, k_ld, v_ld;
  int tokens, head_dim;
  float scale;
};

// What is known of such a head's output, and where gradients go: those of k and v are added to what is there with
// `add`, else written. `sums` are what Kernels::causal_attention has left.
struct CausalGradients {
  const float *out, *grad, *sums;
  size_t out_ld, grad_ld;
  float *q, *k, *v;
  size_t q_ld, k_ld, v_ld;
  bool add;
};

// The kernels of one instruction set. Each runs on the calling thread and touches no shared state.
struct Kernels {
  const char* name;
  // out = w * x / sqrt(mean(x^2) + eps)
  void (*rms_norm)(const float* x, const float* weight, float eps, int d, float* out);
  // Blocks of 32 values to int8 with a scale of max|x| / 127.
  void (*quantize)(const float* x, int columns, int zero, ActivationBlock* out);
  // out[t * ld + r] = <row r, x[t]> for any number of rows, of groups that follow each other, and of tokens. `next` is
  // the group of such a matrix that the thread reads after these, to be fetched meanwhile, or null.
  void (*rows)(Type type, const uint8_t* group, int rows, int columns, const ActivationRow* x, int tokens, float* out,
               int ld, const uint8_t* next);
  // The same for bf16 matrices with `bf16_inputs`, and x in bf16; null where the CPU has no instruction for it.
  void (*bf16_rows)(const uint8_t* group, int rows, int columns, const ActivationRow* x, int tokens, float* out,
                    int ld);
  // Lanes of a sum of `rows`, and the number of tokens from which `tiles` are faster, by the type of a plain matrix.
  int lanes, many[3];
  // The same for plain matrices and rows that have `lanes`, with the same bits and faster for many tokens. `scratch`
  // holds tiles_scratch floats and lies at a multiple of 64 bytes. `next` as above.
  void (*tiles)(Type type, const uint8_t* group, int rows, int columns, const ActivationRow* x, int tokens, float* out,
                int ld, float* scratch, const uint8_t* next);
  // Columns [column, column + count) of a row to its `lanes`. `column` is a multiple of kBlock.
  void (*split_lanes)(const float* x, int column, int count, int columns, float* lanes);
  // out = silu(gate) * up
  void (*swiglu)(const float* gate, const float* up, int n, float* out);
  // Rotate-half on one head, in place. cos, sin (Dh/2).
  void (*rope)(float* x, const float* cos, const float* sin, int head_dim);
  // Softmax over n values in place.
  void (*softmax)(float* x, int n);
  // y += a * x
  void (*axpy)(float a, const float* x, int n, float* y);
  // Attention of `queries` consecutive tokens of one query head over the keys and values of its KV head; query t sees
  // the first `first + t`. q and out have a stride of `ld` floats a token. `scratch` holds attention_scratch floats.
  // `next` is where another head's begin, at which the thread looks after these, to be fetched meanwhile, or null.
  void (*attention)(const float* q, int queries, int ld, const KeyBlock* blocks, Type cache, int first, int head_dim,
                    float scale, float* out, float* scratch, const KeyBlock* next);
  // Read n bytes, a multiple of 4 kB, and return something that depends on all of them.
  uint64_t (*read)(const uint8_t* data, size_t n);
  // A row of n values to signed bytes, to the nearest and halves to even, and their scale of max|x| / 127.
  void (*quantize_row)(const float* x, int n, int8_t* codes, float* scale);
  // fp32 values to and from another plain type.
  void (*store)(const float* x, int n, Type type, void* out);
  void (*load)(const void* x, int n, Type type, float* out);
  // Codes and scales of least error (olmoe/quant/search.py) of at most kPanel rows, a multiple of kGroup, of a
  // row-major matrix of a plain type, as groups of kQ4 or kQ5 that follow each other.
  void (*search)(const uint8_t* weight, Type stored, int rows, int columns, Type type, uint8_t* out);
  // The same, but each column makes up for what those before it changed. `factor` is as pack_factor leaves it,
  // `scratch` has kPanel floats a column. Null where the CPU does not multiply and add at once.
  void (*compensate)(const uint8_t* weight, Type stored, int rows, int columns, const float* factor, Type type,
                     uint8_t* out, float* scratch);
  // Blocks of kBookBlock values, stored as 4-bit indices into a code book with a scale, to a plain type, rounded once.
  void (*decode_book)(const uint8_t* codes, const float* scales, int blocks, const float* entries, Type type,
                      void* out);
  // The reverse: the code of a value, divided by the block's largest magnitude, is numbers[i], where i is how many of
  // the ascending `bounds` it exceeds.
  void (*encode_book)(const void* x, Type type, int blocks, const float* bounds, const uint8_t* numbers, uint8_t* codes,
                      float* scales);
  // Copy n scores; the largest of them, or NaN if any is not finite.
  float (*copy_finite)(const float* x, int n, float* out);
  float (*largest)(const float* x, int n);
  // The smallest value that is not -inf; `otherwise`, which none exceeds, if all are.
  float (*smallest_finite)(const float* x, int n, float otherwise);
  // Scores whose bit (i % 32 of word i / 32) is not set become -inf.
  void (*mask_scores)(float* x, int n, const uint32_t* allowed);
  // x = (x - top) / temperature
  void (*scale_scores)(float* x, int n, float top, float temperature);
  // out = e^(x - shift)
  void (*exponentials)(const float* x, int n, float shift, float* out);
  // shares = 0 where x < least.
  void (*drop_below)(const float* x, int n, float least, float* shares);
  // The sum of each kSumBlock values that follow each other.
  void (*block_sums)(const float* x, int n, double* sums);
  // The largest of each kMaxBlock values that follow each other.
  void (*block_maxima)(const float* x, int n, float* maxima);
  // The number of values of at least `least`; their indices, rising, are written to `ids`, which has room for
  // n + kSlack.
  int (*at_least)(const float* x, int n, float least, int* ids);
  // Numbers below kDigits that rise as x falls, from 0 for `top`, which none exceeds: the upper bits of
  // 1 + (top - x) * scale. With a scale of 1 they tell apart what is 1/32 apart, or less, down to 15 below the top.
  void (*digits_below)(const float* x, int n, float top, float scale, uint16_t* digits);
  // As at_least, of the indices where `digits` has this one.
  int (*with_digit)(const uint16_t* digits, int n, int digit, int* ids);
  // Rotate-half, or with `back` the other way, on the heads of one token. cos, sin (Dh/2).
  void (*rotate)(const float* x, const float* cos, const float* sin, int heads, int head_dim, bool back, float* y);
  // y (tokens, n) = the sum of each token's k rows, which `positions` names, in their order, each times its weight if
  // there are any; a position below 0 names none. positions and weights (tokens, k).
  void (*combine)(const float* rows, const int32_t* positions, const float* weights, int tokens, int k, int n,
                  float* y);
  // Gradients of swiglu for one row that is then multiplied by `weight`; `grad` is the gradient of the product. Writes
  // the product to `out`, and returns <grad, row>, the gradient of `weight`.
  float (*swiglu_backward)(const float* gate, const float* up, const float* grad, float weight, int n, float* out,
                           float* grad_gate, float* grad_up);
  // Gradients of rms_norm for one row: grad_x is written (null: not wanted), grad_weight is added to.
  void (*rms_norm_backward)(const float* x, const float* weight, const float* grad, float eps, int d, float* grad_x,
                            float* grad_weight);
  // -log softmax(logits)[label]. Overwrites the logits, with `gradient` by their gradient.
  float (*cross_entropy)(float* logits, int n, int label, bool gradient);
  // C (m, n) = A (m, depth) B (depth, n), or with `add` C += A B, rows of C `ld` floats apart. `scratch` holds
  // kProductScratch floats and lies at a multiple of 64 bytes.
  void (*product)(const Factor& a, int m, int depth, const Factor& b, int n, float* c, size_t ld, bool add,
                  float* scratch);
  // The same of factors rounded to bf16, summed in fp32; null where the CPU has no instruction for it.
  void (*bf16_product)(const Factor& a, int m, int depth, const Factor& b, int n, float* c, size_t ld, bool add,
                       float* scratch);
  // Attention of the queries from `first` on, a multiple of kQueryChunk, and at most that many, each over the keys of
  // its own token and of those before; out and the base-2 logarithms of the sums of exponentials are those of all
  // queries. `scratch` holds causal_scratch floats and lies at a multiple of 64 bytes.
  void (*causal_attention)(const CausalHead& head, int first, float* out, size_t ld, float* sums, float* scratch);
  // Its gradients, for all queries.
  void (*causal_backward)(const CausalHead& head, const CausalGradients& gradients, float* scratch);
  // The same with products of factors rounded to bf16; null where the CPU has no instruction for it.
  void (*bf16_causal_attention)(const CausalHead& head, int first, float* out, size_t ld, float* sums, float* scratch);
  void (*bf16_causal_backward)(const CausalHead& head, const CausalGradients& gradients, float* scratch);
};

// Queries that one call of Kernels::causal_attention takes, the largest head, and the scratch that it and
// causal_backward need.
constexpr int kQueryChunk = 256, kCausalDim = 256;
inline size_t causal_scratch(int head_dim) {
  const size_t wide = size_t(head_dim) + 32;
  return 64 * (wide * (5 * kQueryChunk / 64 + 4) + 5 * 64);
}

// What Kernels::product adds up before it adds to C (bf16_product twice as many), and the rows and columns of C that it
// goes through at a time.
constexpr int kDepth = 128, kProductRows = 256, kProductColumns = 256;
constexpr size_t kProductScratch = size_t(kDepth) * (kProductColumns + kProductRows);
// Values that share a scale, and entries of a code book, in the formats of Kernels::decode_book.
constexpr int kBookBlock = 64, kBookEntries = 16;

// Rows that are encoded together: in fp32 they stay in the second cache.
constexpr int kPanel = 64;
// Columns that make up together for what a block changed.
constexpr int kColumns = 4;

// What Kernels::block_sums and block_maxima take together, and the room beyond the end that Kernels::at_least needs.
constexpr int kSumBlock = 512, kMaxBlock = 64, kSlack = 16;
// Of Kernels::digits_below: the bits of a float below those taken, and as many numbers as there are.
constexpr int kDigitShift = 15, kDigitBits = 11, kDigits = 1 << kDigitBits;

// Query rows that one call of Kernels::attention may take, and the scratch it needs.
constexpr int kQueryBlock = 64;
constexpr int kKeyBlock = 64;
inline size_t attention_scratch(int head_dim) {
  return size_t(kKeyBlock) * (head_dim + kQueryBlock) + size_t(kQueryBlock) * (head_dim + 4) + 64;
}

// Rows that Kernels::tiles widens at a time, and the scratch that it needs for that many tokens.
constexpr int kPanelRows = 32;
inline size_t tiles_scratch(int columns, int tokens) {
  return size_t(kPanelRows) * (columns + 5 * size_t(tokens)) + 16 * kPanelRows;
}

}  // namespace olmoe
