// Choosing the next token of several texts from their logits.
#pragma once

#include "ops.h"

namespace olmoe {

// How one text's token is chosen. See olmoe/ops/sampling.py, which defines every step.
struct SamplingRow {
  double temperature, top_p, min_p, repetition, presence, frequency;
  int64_t top_k;
  uint64_t seed, position;
  int logprobs;        // how many of the likeliest tokens to report, or -1: no log-probabilities at all
  const int64_t* ids;  // prompt, then text
  int64_t prompt, length;
  const int64_t* bias_ids;
  const double* biases;
  int64_t bias_count;
  const uint32_t* mask;  // allowed tokens, bit i % 32 of word i / 32; null: all
};

enum class SamplingStatus : int32_t { kChosen = 0, kNotFinite = 1, kNothingAllowed = 2 };

// Where the results of R rows go: id, status and log-probability of each, and the `most` likeliest, (R, most). All
// of it is written: -1 and NaN for what a row does not have.
struct Samples {
  int64_t* ids;
  int32_t* status;
  float* logprobs;
  int64_t* top_ids;
  float* top_logprobs;
  int most;
};

// logits: rows `stride` floats apart, of which the first `allowed` may be chosen. `rows[i]->logprobs` is at most `most`
// and `allowed`.
void sample(const float* logits, int64_t stride, int allowed, const std::vector<const SamplingRow*>& rows,
            const Samples& out);

}  // namespace olmoe
