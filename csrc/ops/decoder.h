// The whole network in one call: from new tokens of any sequences to logits and routing of the requested rows.
#pragma once

#include "layer.h"

namespace olmoe {

struct DecoderWeights {
  std::vector<LayerWeights> layers;  // alike in all widths
  Matrix embedding, head;
  const float* norm = nullptr;  // of the final norm
  float eps = 1e-5f;

  int hidden() const { return layers.front().hidden; }
  int top_k() const { return layers.front().top_k; }
};

// Ids (N) of the new tokens, and for each the row of tables of cosines and sines (rows, Dh/2) that is its position's.
struct Tokens {
  const int64_t *ids, *angles;
  const float *cos, *sin;
};

// Rows of tokens whose logits (rows, V) or routing (traced, L, K) are wanted.
struct Wanted {
  const int64_t* rows = nullptr;
  int count = 0;
  float* logits = nullptr;
  const int64_t* traced = nullptr;
  int traced_count = 0;
  int16_t* ids = nullptr;
  float* weights = nullptr;
};

// Every row's results are the same to the bit whatever else is in the call, and for any split of a sequence into calls.
void forward(const DecoderWeights& w, const Tokens& tokens, const Sequences& sequences, const CacheView& cache,
             const Policies* policies, const Wanted& wanted);

}  // namespace olmoe
