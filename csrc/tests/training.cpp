// The operations of training by themselves, to be run under the thread sanitizer (scripts/sanitize.py): no two threads
// touch what one of them writes, on threads that another library lends as on our own, and results are the same bits.
#include "../ops/training.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "../core/team.h"

using namespace olmoe;

namespace {

using Floats = std::vector<float>;

void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// What GOMP_parallel does, with threads whose order the sanitizer knows.
void lend_threads(void (*work)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; i++) others.emplace_back(work, data);
  work(data);
  for (std::thread& other : others) other.join();
}

// OpenMP may give fewer threads than it is asked for.
void lend_fewer_threads(void (*work)(void*), void* data, unsigned threads, unsigned flags) {
  lend_threads(work, data, (threads + 1) / 2, flags);
}

Floats numbers(size_t count, uint32_t seed) {
  Floats values(count);
  for (float& v : values) {
    seed = seed * 1664525 + 1013904223;
    v = float(seed >> 8) / float(1 << 23) - 1.0f;
  }
  return values;
}

// What an operation writes, end to end. NaN at first, so that what it does not write shows.
class Results {
 public:
  float* add(size_t count) {
    parts_.emplace_back(count, __builtin_nanf(""));
    return parts_.back().data();
  }
  Floats all() const {
    Floats all;
    for (const Floats& part : parts_) all.insert(all.end(), part.begin(), part.end());
    return all;
  }

 private:
  std::vector<Floats> parts_;
};

void linear_both_ways(Results& results) {
  const int n = 130, rows = 300, columns = 70;
  const Floats x = numbers(n * columns, 1), weight = numbers(rows * columns, 2), bias = numbers(rows, 3);
  const Floats grad = numbers(n * rows, 4);
  linear_forward(Products::kFP32, x.data(), weight.data(), bias.data(), n, rows, columns, results.add(n * rows));
  linear_backward(Products::kFP32, x.data(), weight.data(), grad.data(), n, rows, columns, results.add(n * columns),
                  results.add(rows * columns));
}

void norm_both_ways(Results& results) {
  const int n = 300, d = 19;
  const Floats x = numbers(n * d, 1), weight = numbers(d, 2), grad = numbers(n * d, 3);
  norm_forward(x.data(), weight.data(), 1e-5f, n, d, results.add(n * d));
  norm_backward(x.data(), weight.data(), grad.data(), 1e-5f, n, d, results.add(n * d), results.add(d));
}

void rotate_both_ways(Results& results) {
  const int n = 130, heads = 3, head_dim = 10;
  const Floats x = numbers(n * heads * head_dim, 1), cos = numbers(n * head_dim / 2, 2);
  const Floats sin = numbers(n * head_dim / 2, 3);
  for (bool back : {false, true})
    rotate(x.data(), cos.data(), sin.data(), n, heads, head_dim, back, results.add(x.size()));
}

void loss(Results& results) {
  const int n = 600, d = 12, words = 70;
  const Floats x = numbers(n * d, 1), weight = numbers(words * d, 2);
  std::vector<int64_t> labels(n);
  for (int i = 0; i < n; i++) labels[i] = i % 5 ? i % words : -100;
  Floats logits(kLossTokens * words);
  float *grad_x = results.add(n * d), *grad_weight = results.add(words * d);
  *results.add(1) = float(cross_entropy(Products::kFP32, x.data(), weight.data(), labels.data(), -100, n, d, words,
                                        logits.data(), grad_x, grad_weight));
}

// With an expert that no token chooses.
void mixture_both_ways(Results& results) {
  const int n = 90, k = 2, experts = 5, d = 20, f = 9, m = n * k;
  const Floats x = numbers(n * d, 1), weights = numbers(m, 2), grad = numbers(n * d, 3);
  const Floats gate_up = numbers(experts * 2 * f * d, 4), down = numbers(experts * d * f, 5);
  std::vector<int64_t> ids(m);
  for (int i = 0; i < m; i++) ids[i] = i % 2 ? 4 : i % 3;
  std::vector<int32_t> offsets(experts + 1), order(m), token_ids(m), positions(m);
  const RoutedRows rows{n, k, experts, offsets.data(), order.data(), token_ids.data(), positions.data()};
  sort_rows(ids.data(), 0, rows);
  check(rows.rows() == m, "ids are those of experts");
  const ExpertWeights stack{gate_up.data(), down.data(), d, f};
  float* units = results.add(m * 2 * f);
  experts_forward(Products::kFP32, x.data(), weights.data(), rows, stack, units, results.add(m * d),
                  results.add(n * d));
  ExpertGradients gradients{
      results.add(n * d), results.add(m),         results.add(gate_up.size()),       results.add(down.size()),
      results.add(m * f), results.add(m * 2 * f), results.add(size_t(m) * size_t(d))};
  experts_backward(Products::kFP32, x.data(), weights.data(), rows, stack, units, grad.data(), gradients);
}

void attention_of(Results& results, const AttentionShape& shape) {
  const int64_t d = shape.head_dim, t = shape.tokens;
  const auto rows = [&](float* data, int heads) { return HeadRows{data, heads * t * d, t * d, d}; };
  const size_t wide = size_t(shape.batch) * shape.heads * t * d, narrow = size_t(shape.batch) * shape.kv_heads * t * d;
  Floats q = numbers(wide, 1), k = numbers(narrow, 2), v = numbers(narrow, 3), grad = numbers(wide, 4);
  const HeadRows queries = rows(q.data(), shape.heads), keys = rows(k.data(), shape.kv_heads);
  const HeadRows values = rows(v.data(), shape.kv_heads), out = rows(results.add(wide), shape.heads);
  float* sums = results.add(size_t(shape.batch) * shape.heads * t);
  causal_forward(Products::kFP32, shape, queries, keys, values, out, sums);
  causal_backward(Products::kFP32, shape, queries, keys, values, out, sums, rows(grad.data(), shape.heads),
                  {rows(results.add(wide), shape.heads), rows(results.add(narrow), shape.kv_heads),
                   rows(results.add(narrow), shape.kv_heads)});
}

// Grouped heads, more tokens than are computed at a time.
void attention_both_ways(Results& results) { attention_of(results, {2, 4, 2, 300, 12, {}}); }

void attention_of_texts(Results& results) { attention_of(results, {1, 4, 2, 407, 12, {1, 70, 300, 1, 35}}); }

Floats results_of(const std::function<void(Results&)>& operation) {
  Results results;
  std::lock_guard lock(one_at_a_time());
  operation(results);
  return results.all();
}

}  // namespace

int main() {
  const struct {
    const char* name;
    std::function<void(Results&)> run;
  } operations[] = {
      {"linear", linear_both_ways},   {"norm", norm_both_ways},           {"rotate", rotate_both_ways}, {"loss", loss},
      {"mixture", mixture_both_ways}, {"attention", attention_both_ways}, {"texts", attention_of_texts}};
  for (const auto& [name, run] : operations) {
    set_threads(1);
    const Floats expected = results_of(run);
    for (float v : expected) check(v == v, name);
    for (const Parallel parallel : {Parallel(nullptr), Parallel(lend_threads), Parallel(lend_fewer_threads)})
      for (int threads : {2, 3, 8}) {
        set_parallel(parallel);
        set_threads(threads);
        const Floats found = results_of(run);
        check(std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)) == 0, name);
      }
    set_parallel(nullptr);
  }
  std::puts("training: ok");
}
