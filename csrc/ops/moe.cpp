// The routed experts: rows sorted by expert, gate and up with SwiGLU between, down, and the weighted sum.
#include <algorithm>
#include <cstring>

#include "ops.h"

namespace olmoe {
namespace {

// A task of a thread: some hidden columns (or bands of rows) of one expert.
struct Task {
  int expert, begin, end;
};

// Tasks that cover [0, units) of every expert that has rows, `grain` units each.
std::vector<Task> cut(const std::vector<int>& offsets, int units, int grain) {
  std::vector<Task> tasks;
  for (int e = 0; e + 1 < int(offsets.size()); e++) {
    if (offsets[e] == offsets[e + 1]) continue;
    for (int u = 0; u < units; u += grain) tasks.push_back({e, u, std::min(u + grain, units)});
  }
  return tasks;
}

// The weights that the thread reads after unit `u` of `task`, or null; its next task is tasks[next].
// `locate(expert, unit)` is where a unit begins.
template <typename Locate>
const uint8_t* following(const std::vector<Task>& tasks, const Task& task, int u, int next, const Locate& locate) {
  if (u + 1 < task.end) return locate(task.expert, u + 1);
  return next < 0 ? nullptr : locate(tasks[next].expert, tasks[next].begin);
}

}  // namespace

void moe(const Experts& experts, const float* x, const float* weights, const int64_t* ids, int tokens, int k,
         const float* add, float* y) {
  const Kernels& kernel = kernels();
  ThreadPool& threads = pool();
  const int d = experts.down.rows, width = experts.width;

  // Sort the N*K rows by expert, ties by token: a counting sort. Buffers are kept between calls.
  static thread_local std::vector<int> offsets, position;
  static thread_local std::vector<ActivationRow> inputs;
  static thread_local Aligned<float> outputs;
  static thread_local Activations prepared, hidden;
  offsets.assign(experts.count + 1, 0);
  for (int i = 0; i < tokens * k; i++)
    if (ids[i] >= 0) offsets[ids[i] + 1]++;
  for (int e = 0; e < experts.count; e++) offsets[e + 1] += offsets[e];
  const int routed = offsets.back();
  position.resize(tokens * k);
  inputs.resize(routed);
  prepared.set(experts.gate_up, x, tokens, experts.gate_up.columns, threads);
  {
    std::vector<int> next(offsets.begin(), offsets.end() - 1);
    for (int i = 0; i < tokens * k; i++) {
      if (ids[i] < 0) continue;
      position[i] = next[ids[i]]++;
      inputs[position[i]] = prepared.row(i / k);
    }
  }

  // gate, up and SwiGLU, in units of 64 or 32 hidden columns, so that a unit makes whole blocks of the next input.
  hidden.reserve(experts.down, routed);
  // Where the gate rows do not end at a block, one expert at a time.
  const int per_unit = width % kBand == 0 ? kBand : width % kBlock == 0 ? kBlock : width;
  const int units = width / per_unit;
  const bool aligned = per_unit % kGroup == 0 && width % kGroup == 0;
  const int grain_up = std::max(1, int((1 << 15) / (experts.gate_up.group_bytes() * 4)));
  // References, because a thread_local named inside the lambda would be that of the helper thread.
  auto& offsets_ = offsets;
  auto& inputs_ = inputs;
  auto& outputs_ = outputs;
  auto& hidden_ = hidden;
  auto& position_ = position;
  // Where the weights of a unit begin.
  auto gate = [&](int e, int u) { return experts.gate_up.group(e, u * per_unit / kGroup); };
  auto up = [&](int e, int u) { return experts.gate_up.group(e, (width + u * per_unit) / kGroup); };
  const auto up_tasks = cut(offsets, units, grain_up);
  threads.run(int(up_tasks.size()), 1, [&](int begin, int end, int next) {
    const int block = experts.gate_up.packed() ? 64 : token_block(experts.gate_up);  // gate and up stay in the cache
    static thread_local Aligned<float> products, gated;
    products.resize(size_t(block) * 2 * per_unit);
    gated.resize(per_unit);
    for (int p = begin; p < end; p++) {
      const Task& task = up_tasks[p];
      for (int u = task.begin; u < task.end; u++) {
        const uint8_t* after = following(up_tasks, task, u, p + 1 < end ? p + 1 : next, gate);
        for (int first = offsets_[task.expert]; first < offsets_[task.expert + 1]; first += block) {
          const int count = std::min(block, offsets_[task.expert + 1] - first);
          const int ld = 2 * per_unit;
          if (aligned) {
            for (int half = 0; half < 2; half++)
              multiply(experts.gate_up, task.expert, half * width + u * per_unit, per_unit, inputs_.data() + first,
                       count, products.data() + half * per_unit, ld, half == 0 ? up(task.expert, u) : after);
          } else {
            multiply(experts.gate_up, task.expert, 0, 2 * width, inputs_.data() + first, count, products.data(), ld);
          }
          for (int t = 0; t < count; t++) {
            const float* gate = products.data() + size_t(t) * ld;
            kernel.swiglu(gate, gate + per_unit, per_unit, gated.data());
            hidden_.put(first + t, u * per_unit, gated.data(), per_unit);
          }
        }
      }
    }
  });

  // down: every routed row by itself, so that the sum below has a fixed order.
  outputs.resize(size_t(routed) * d);
  const int grain_down = std::max(1, int((1 << 15) / experts.down.group_bytes()));
  auto down = [&](int e, int band) { return experts.down.group(e, band * (kBand / kGroup)); };
  const auto down_tasks = cut(offsets, (d + kBand - 1) / kBand, grain_down);
  threads.run(int(down_tasks.size()), 1, [&](int begin, int end, int next) {
    for (int p = begin; p < end; p++) {
      const Task& task = down_tasks[p];
      const int first = offsets_[task.expert], count = offsets_[task.expert + 1] - first;
      for (int band = task.begin; band < task.end; band++) {
        const int r = band * kBand;
        const uint8_t* after = following(down_tasks, task, band, p + 1 < end ? p + 1 : next, down);
        multiply(experts.down, task.expert, r, std::min(kBand, d - r), hidden_.rows() + first, count,
                 outputs_.data() + size_t(first) * d + r, d, after);
      }
    }
  });

  threads.run(tokens, 8, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) {
      float* sum = y + size_t(t) * d;
      if (!add)
        std::memset(sum, 0, size_t(d) * sizeof(float));
      else if (add != y)
        std::memcpy(sum, add + size_t(t) * d, size_t(d) * sizeof(float));
      for (int i = t * k; i < (t + 1) * k; i++)
        if (ids[i] >= 0) kernel.axpy(weights[i], outputs_.data() + size_t(position_[i]) * d, d, sum);
    }
  });
}

}  // namespace olmoe
