// Sampling without a sort: the cut of top-k and of top-p is found in a histogram of the scores, then in one of the bin
// where it falls.
#include "sampling.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>

namespace olmoe {
namespace {

constexpr int kBins = kDigits, kTables = 4;
constexpr int kFewCandidates = 4096;   // up to this many, selecting by comparisons is faster than by digits
constexpr int kAloneScores = 1 << 15;  // fewer scores in all are not worth another thread
constexpr uint32_t kSeen = 1u << 31;   // a token of prompt or text; the bits below count it in the text

// Memory of one thread, kept between calls.
struct Scratch {
  std::vector<float> scores, shares, few;
  std::vector<int> ids, ties;
  int equals = 0;  // of `ties`
  std::vector<uint16_t> digits;
  std::vector<uint32_t> keys;
  std::vector<double> sums;
  std::vector<uint32_t> counts;  // all zero between rows
  std::vector<int64_t> unique;
  // Four of each, so that neighbours of one bin do not wait for each other.
  uint32_t numbers[kTables][kBins];
  double masses[kTables][kBins];

  void reserve(int n) {
    if (int(scores.size()) >= n) return;
    for (auto* floats : {&scores, &shares, &few}) floats->resize(n);
    for (auto* indices : {&ids, &ties}) indices->resize(n + kSlack);
    sums.resize(n / kSumBlock + 1);
    counts.resize(n);
    digits.resize(n);
    keys.resize(n);
  }
};

// A number in [0, 1) for each seed and position: Philox 4x32-10 (Salmon et al. 2011).
double uniform(uint64_t seed, uint64_t position) {
  uint32_t counter[4] = {uint32_t(position), uint32_t(position >> 32), 0, 0};
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(0xD2511F53) * counter[0], b = uint64_t(0xCD9E8D57) * counter[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ counter[1] ^ key[0], uint32_t(b),
                              uint32_t(a >> 32) ^ counter[3] ^ key[1], uint32_t(a)};
    std::memcpy(counter, next, sizeof next);
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  return double((uint64_t(counter[0]) << 32 | counter[1]) >> 11) * 0x1p-53;
}

// A number that falls as x rises, as a radix sort wants it; both zeros have the same.
uint32_t key_of(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x + 0.0f);
  return bits & 0x80000000 ? bits : bits ^ 0x7fffffff;
}

// Where values in falling order, equal ones by rising index, are cut: those above `value` stay, and of those equal to
// it the first `ties`.
struct Cut {
  float value;
  int ties;
};

// Shares by bin, in several tables, of which neighbours in a row take different ones.
template <typename T>
struct Histogram {
  T (*tables)[kBins];

  // Start again with the shares of n values.
  template <typename Bin, typename Share>
  void fill(int n, Bin bin, Share share) {
    std::memset(tables, 0, sizeof(T) * kTables * kBins);
    int i = 0;
    for (; i + kTables <= n; i += kTables)
      for (int t = 0; t < kTables; t++) tables[t][bin(i + t)] += share(i + t);
    for (; i < n; i++) tables[0][bin(i)] += share(i);
    for (int t = 1; t < kTables; t++)
      for (int b = 0; b < kBins; b++) tables[0][b] += tables[t][b];
  }
  // The bin with which the sum from `before` on reaches `target`; `before` becomes the sum of those before it. Sums of
  // the same shares in another order may miss the target by a rounding: then it is the last bin.
  uint32_t reach(T target, T& before) const {
    uint32_t bin = 0;
    T sum = before;
    for (uint32_t b = 0; b < kBins; b++) {
      if (tables[0][b] == 0) continue;
      bin = b, before = sum, sum += tables[0][b];
      if (sum >= target) break;
    }
    return bin;
  }
};

// The cut after the first value with which the shares of all up to it reach `target`, or after the last; `top` is the
// largest. What `share(i)` gives is added in T. Leaves the indices of values equal to the cut's in `s.ties`, rising,
// and their number in `s.equals`.
template <typename T, typename Share>
Cut cut(const float* x, int n, float top, Histogram<T> histogram, Share share, T target, Scratch& s,
        const Kernels& kernel) {
  int* const indices = s.ties.data();
  uint32_t* const keys = s.keys.data();
  uint16_t* const digits = s.digits.data();
  T before = 0;
  const float lowest = kernel.smallest_finite(x, n, top), spread = top - lowest;
  int count = spread == 0 ? kernel.at_least(x, n, top, indices) : 0;
  if (count < n) {  // not all the same
    // A power of two that spreads what lies close together over the digits.
    const bool close = spread > 0 && spread < 32;
    const float scale = close ? std::exp2(std::min(100.0f, std::floor(std::log2(64 / spread)))) : 1.0f;
    kernel.digits_below(x, n, top, scale, digits);
    histogram.fill(n, [=](int i) { return digits[i]; }, share);
    count = kernel.with_digit(digits, n, histogram.reach(target, before), indices);
  }
  for (int c = 0; c < count; c++) keys[c] = key_of(x[indices[c]]);
  while (true) {
    // Bins for the range of the values left.
    uint32_t low = ~0u, high = 0;
    for (int c = 0; c < count; c++) low = std::min(low, keys[c]), high = std::max(high, keys[c]);
    if (low == high) break;
    const int shift = std::max(0, int(std::bit_width(high - low)) - kDigitBits);
    histogram.fill(count, [=](int c) { return (keys[c] - low) >> shift; }, [=](int c) { return share(indices[c]); });
    const uint32_t bin = histogram.reach(target, before);
    int kept = 0;
    for (int c = 0; c < count; c++) {
      indices[kept] = indices[c], keys[kept] = keys[c];
      kept += (keys[c] - low) >> shift == bin;
    }
    count = kept;
  }
  s.equals = count;
  const T each = share(indices[0]);
  int ties = int(std::clamp(double(target - before) / double(each), 1.0, double(count)));
  while (ties < count && before + T(ties) * each < target) ties++;
  return Cut{x[indices[0]], ties};
}

// The cut after the k largest of n > k values; `top` is the largest.
Cut cut_after(const float* x, int n, float top, int64_t k, Scratch& s, const Kernels& kernel) {
  const int64_t blocks = (n + kMaxBlock - 1) / kMaxBlock;
  if (k <= blocks) {
    // k blocks have a value of at least `bound`, so the k largest are not below it.
    kernel.block_maxima(x, n, s.few.data());
    std::nth_element(s.few.begin(), s.few.begin() + (k - 1), s.few.begin() + blocks, std::greater<float>());
    const float bound = s.few[k - 1];
    const int above = kernel.at_least(x, n, std::nextafter(bound, INFINITY), s.ties.data());
    if (above < k) return Cut{bound, int(k) - above};
    if (above <= kFewCandidates) {
      for (int i = 0; i < above; i++) s.few[i] = x[s.ties[i]];
      std::nth_element(s.few.begin(), s.few.begin() + (k - 1), s.few.begin() + above, std::greater<float>());
      const float value = s.few[k - 1];
      const auto higher = std::count_if(s.few.begin(), s.few.begin() + above, [=](float v) { return v > value; });
      return Cut{value, int(k - higher)};
    }
  }
  return cut(x, n, top, Histogram<uint32_t>{s.numbers}, [](int) { return 1u; }, uint32_t(k), s, kernel);
}

float finite(double x) { return float(std::clamp(x, -double(FLT_MAX), double(FLT_MAX))); }

// Penalties for tokens that have occurred, and the caller's logit biases.
void adjust(const SamplingRow& row, int allowed, Scratch& s) {
  if (row.repetition != 1.0 || row.presence != 0.0 || row.frequency != 0.0) {
    s.unique.clear();
    for (int64_t i = 0; i < row.length; i++) {
      const int64_t id = row.ids[i];
      if (id < 0 || id >= allowed) continue;
      if (s.counts[id] == 0) s.unique.push_back(id);
      s.counts[id] = (s.counts[id] + (i >= row.prompt)) | kSeen;
    }
    for (const int64_t id : s.unique) {
      const double old = s.scores[id], count = s.counts[id] & ~kSeen;
      double score = finite(old > 0 ? old / row.repetition : old * row.repetition);
      if (count > 0) score = finite(score - (row.presence + row.frequency * count));
      s.scores[id] = float(score);
      s.counts[id] = 0;
    }
  }
  for (int64_t i = 0; i < row.bias_count; i++) {
    const int64_t id = row.bias_ids[i];
    if (id < 0 || id >= allowed) continue;
    s.scores[id] = row.biases[i] == -INFINITY ? -INFINITY : finite(s.scores[id] + row.biases[i]);
  }
}

// The sum of n shares, and of their blocks in `s.sums`.
double total_of(const float* shares, int n, Scratch& s, const Kernels& kernel) {
  kernel.block_sums(shares, n, s.sums.data());
  double total = 0;
  for (int b = 0; b * kSumBlock < n; b++) total += s.sums[b];
  return total;
}

// The first token at which the shares up to it, in the order of ids, exceed u times their sum.
int draw(const float* shares, int n, double u, Scratch& s, const Kernels& kernel) {
  const double target = u * total_of(shares, n, s, kernel);
  const int blocks = (n + kSumBlock - 1) / kSumBlock;
  double before = 0, through = 0;
  int block = 0, last = 0;
  for (int b = 0; b < blocks; b++) {
    if (s.sums[b] == 0) continue;
    block = b, before = through, through += s.sums[b];
    if (through > target) break;
  }
  // Where rounding lets none exceed the target, it is the last one.
  for (int i = block * kSumBlock; i < std::min(n, (block + 1) * kSumBlock); i++) {
    if (shares[i] == 0) continue;
    last = i;
    before += double(shares[i]);
    if (before > target) break;
  }
  return last;
}

// Keep of n scores, and of their shares unless these are null, those of at least `least`, and their ids in `s.ids`,
// which holds those of the n unless they are all. Not worth the work, and not done, where more than `worth` would stay.
int narrow(float least, float* shares, int n, int all, int worth, Scratch& s, const Kernels& kernel) {
  const int kept = kernel.at_least(s.scores.data(), n, least, s.ties.data());
  if (kept > worth) return n;
  for (int i = 0; i < kept; i++) {
    const int index = s.ties[i];
    s.scores[i] = s.scores[index];
    if (shares) shares[i] = shares[index];
    s.ids[i] = n == all ? index : s.ids[index];
  }
  return kept;
}

// Temperature, top-k, top-p, min-p and the draw. s.scores holds `all` scores of which `top` is the largest.
int64_t choose(const SamplingRow& row, int all, float top, Scratch& s, const Kernels& kernel) {
  const float temperature = float(std::clamp(row.temperature, double(FLT_MIN), double(FLT_MAX)));
  float* z = s.scores.data();
  float* shares = s.shares.data();
  int n = all;
  kernel.scale_scores(z, n, top, temperature);
  if (row.top_k > 0 && row.top_k < n) {
    const Cut k = cut_after(z, n, 0.0f, row.top_k, s, kernel);
    n = narrow(k.value, nullptr, n, all, n, s, kernel);
  }
  kernel.exponentials(z, n, 0.0f, shares);
  float least = row.min_p > 0 ? float(std::log(row.min_p)) : -INFINITY;
  if (row.top_p < 1.0) {
    const double total = total_of(shares, n, s, kernel), target = row.top_p * total;
    // All with a share below (1 - p) * total / n together have less than what top-p leaves out, so each is out, as are
    // those that min-p leaves out, which come last. Half of it, because sums are rounded.
    const float bound = float(std::log((total - target) / n / 2));
    n = narrow(std::max(bound, least), shares, n, all, n / 2, s, kernel);
    const Cut p =
        cut(z, n, 0.0f, Histogram<double>{s.masses}, [shares](int i) { return double(shares[i]); }, target, s, kernel);
    least = std::max(least, p.value);
    for (int i = p.ties; i < s.equals; i++) shares[s.ties[i]] = 0;
  }
  if (least > -INFINITY) kernel.drop_below(z, n, least, shares);
  const int chosen = draw(shares, n, uniform(row.seed, row.position), s, kernel);
  return n < all ? s.ids[chosen] : chosen;
}

// Log-probabilities of the unmodified logits, of which `top` is the largest: the chosen one's, and the likeliest.
void report(const float* logits, int n, float top, int count, int64_t chosen, float* logprob, int64_t* top_ids,
            float* top_logprobs, Scratch& s, const Kernels& kernel) {
  kernel.exponentials(logits, n, top, s.shares.data());
  const double log_total = double(top) + std::log(total_of(s.shares.data(), n, s, kernel));
  *logprob = float(double(logits[chosen]) - log_total);
  if (count == 0) return;
  const Cut c = count < n ? cut_after(logits, n, top, count, s, kernel) : Cut{-FLT_MAX, n};
  const int found = kernel.at_least(logits, n, c.value, s.ids.data());
  int kept = 0, ties = c.ties;
  for (int i = 0; i < found; i++) {
    const int id = s.ids[i];
    if (logits[id] > c.value || ties-- > 0) s.ids[kept++] = id;
  }
  std::sort(s.ids.begin(), s.ids.begin() + kept,
            [&](int a, int b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); });
  for (int i = 0; i < kept; i++) {
    top_ids[i] = s.ids[i];
    top_logprobs[i] = float(double(logits[s.ids[i]]) - log_total);
  }
}

}  // namespace

void sample(const float* logits, int64_t stride, int allowed, const std::vector<const SamplingRow*>& rows,
            const Samples& out) {
  const Kernels& kernel = kernels();
  const int grain = std::max(1, kAloneScores / allowed);
  pool().run(int(rows.size()), grain, [&](int begin, int end, int) {
    static thread_local Scratch s;
    s.reserve(allowed);
    for (int r = begin; r < end; r++) {
      const SamplingRow& row = *rows[r];
      const size_t first_top = size_t(r) * out.most;
      out.ids[r] = -1, out.logprobs[r] = NAN;
      std::fill_n(out.top_ids + first_top, out.most, -1);
      std::fill_n(out.top_logprobs + first_top, out.most, NAN);
      const float* x = logits + r * stride;
      const float raw_top = kernel.copy_finite(x, allowed, s.scores.data());
      if (std::isnan(raw_top)) {
        out.status[r] = int32_t(SamplingStatus::kNotFinite);
        continue;
      }
      adjust(row, allowed, s);
      if (row.mask) kernel.mask_scores(s.scores.data(), allowed, row.mask);
      const float top = kernel.largest(s.scores.data(), allowed);
      if (top == -INFINITY) {
        out.status[r] = int32_t(SamplingStatus::kNothingAllowed);
        continue;
      }
      if (row.temperature == 0.0) {
        kernel.at_least(s.scores.data(), allowed, top, s.ids.data());
        out.ids[r] = s.ids[0];
      } else {
        out.ids[r] = choose(row, allowed, top, s, kernel);
      }
      out.status[r] = int32_t(SamplingStatus::kChosen);
      if (row.logprobs >= 0)
        report(x, allowed, raw_top, row.logprobs, out.ids[r], out.logprobs + r, out.top_ids + first_top,
               out.top_logprobs + first_top, s, kernel);
    }
  });
}

}  // namespace olmoe
