// Sampling: one row of logits to a token, to a distribution, to filtered logits. masses.h turns logits into
// whole-numbered masses, selection.h finds the tokens of a prefix of the order, stages.h removes the others.
#pragma once
#include "stages.h"

namespace headway {
namespace {

// Writes -inf for the tokens that are not allowed, in a row that is padded to whole blocks.
HEADWAY_FLATTEN inline void apply_allowed(const Sampling& task, int64_t index, float* z) {
  const int64_t stride = task.allowed.stride[0];
  const uint8_t* allowed =
      static_cast<const uint8_t*>(task.allowed.data) + batch_offset(task.batch, task.allowed, index);
  if (task.packed) {
    const Vec<int32_t> bit = lane_powers();
    for (int64_t v = 0; v < task.V; v += 16) { // two bytes: a mask has whole words of four
      const Vec<int32_t> bytes = int32_t(allowed[v / 8 * stride] | allowed[(v / 8 + 1) * stride] << 8);
      select((bytes & bit) != Vec<int32_t>(0), Vec<float>::load(z + v), Vec<float>(-kInfinity)).store(z + v);
    }
  } else if (stride == 1) { // apart from the general loop, for the compiler to make vectors of
    for (int64_t i = 0; i < task.V; ++i) z[i] = allowed[i] ? z[i] : -kInfinity;
  } else {
    for (int64_t i = 0; i < task.V; ++i) z[i] = allowed[i * stride] ? z[i] : -kInfinity;
  }
}

// A finite number that is too low for float32 becomes its lowest number, never -inf, which would forbid the token.
constexpr float kLowest = -0x1.fffffep+127f;
// n float64 numbers as float32, in memory that is padded to whole blocks.
HEADWAY_FLATTEN inline void narrow_row(const double* from, int64_t stride, int64_t n, float* to) {
  const Vec<double> lowest = double(kLowest), banned = double(-kInfinity);
  const auto narrowed = [&](Vec<double> x) { return convert<float>(select((x < lowest) & (x > banned), lowest, x)); };
  int64_t i = 0;
  for (; stride == 1 && i + 16 <= n; i += 16) narrowed(Vec<double>::load(from + i)).store(to + i);
  for (; i < n; i += 16) {
    double few[16] = {};
    for (int64_t j = 0; j < min(n - i, 16); ++j) few[j] = from[(i + j) * stride];
    narrowed(Vec<double>::load(few)).store(to + i);
  }
}
inline float biased(float z, float bias) {
  const float sum = z + bias;
  return (sum == -kInfinity) & (z > -kInfinity) & (bias > -kInfinity) ? kLowest : sum;
}

// The row as float32, with penalties and bias applied and -inf for the tokens that are not allowed: in the caller's
// memory where that holds just these numbers.
inline const float* scores(const Sampling& task, int64_t index, const Workspace& space) {
  const char* logits = address(task.logits, batch_offset(task.batch, task.logits, index));
  const Histories& histories = task.histories;
  const int64_t slot = histories.slot ? histories.slot[index] : 0,
                penalized = histories.slot ? histories.distinct[slot] : 0;
  const bool changed = task.bias.data || task.allowed.data || penalized;
  if (task.logits.dtype == DType::f32 && task.logits.stride[0] == 1 && !changed)
    return reinterpret_cast<const float*>(logits);
  split(space.team, (task.V + kBlock - 1) / kBlock, kPart, [&](int64_t, int64_t first, int64_t last) {
    const int64_t from = first * kBlock, n = min(task.V, last * kBlock) - from;
    const char* at = logits + from * task.logits.stride[0] * item_size(task.logits.dtype);
    if (task.logits.dtype == DType::f64)
      narrow_row(reinterpret_cast<const double*>(at), task.logits.stride[0], n, space.z + from);
    else
      read_row(at, task.logits.dtype, task.logits.stride[0], n, space.z + from);
  });
  const int64_t first = penalized ? histories.first[slot] : 0;
  for (int64_t i = first; i < first + penalized; ++i) {
    const double z = histories.logit[i];
    space.z[histories.id[i]] = z < double(kLowest) && z > double(-kInfinity) ? kLowest : float(z);
  }
  if (task.bias.data) {
    const float* bias = reinterpret_cast<const float*>(address(task.bias, batch_offset(task.batch, task.bias, index)));
    const int64_t stride = task.bias.stride[0];
    for (int64_t i = 0; i < task.V; ++i) space.z[i] = biased(space.z[i], bias[i * stride]);
  }
  if (task.allowed.data) apply_allowed(task, index, space.z);
  return space.z;
}

// The maxima of all blocks, and the row's; NaN where a logit is NaN.
HEADWAY_FLATTEN inline float find_maxima(const Tokens& tokens, const Workspace& space) {
  float top[kMaxParts];
  const int64_t parts = split(space.team, tokens.blocks(), kPart, [&](int64_t part, int64_t first, int64_t last) {
    Mask<float> nan = int32_t(0);
    float best = -kInfinity;
    for (int64_t b = first; b < last; ++b) {
      const float* z = tokens.block(b);
      Vec<float> block_best = Vec<float>::load(z);
      nan = nan | (block_best != block_best);
      for (int64_t v = 16; v < kBlock; v += 16) {
        const Vec<float> x = Vec<float>::load(z + v);
        nan = nan | (x != x);
        block_best = max(x, block_best);
      }
      space.block_max[b] = reduce_max(block_best);
      if (space.block_max[b] > best) best = space.block_max[b];
    }
    top[part] = any(nan) ? __builtin_nanf("") : best;
  });
  for (int64_t b = tokens.blocks(); b % kBlock; ++b) space.block_max[b] = -kInfinity;
  for (int64_t i = 1; i < parts; ++i)
    if (top[i] > top[0] || top[i] != top[i]) top[0] = top[i]; // nothing is above NaN
  return top[0];
}

// The fault of a row whose maximum is NaN or infinite, and the first token that has it.
inline int64_t diagnose(const Sampling& task, int64_t index, const float* z) {
  const int64_t offset = batch_offset(task.batch, task.logits, index);
  for (int64_t i = 0; i < task.V; ++i) {
    if (z[i] < kInfinity) continue;
    double logit = 0; // as given: it may overflow only in float32, or only with the bias
    read_row(address(task.logits, offset, i), task.logits.dtype, 1, 1, &logit);
    const SamplingFault fault = logit != logit       ? SamplingFault::nan
                                : logit == kInfinity ? SamplingFault::infinite
                                                     : SamplingFault::overflow;
    return fault_of(i, fault);
  }
  return fault_of(0, SamplingFault::empty);
}

constexpr int64_t kStretch = 16; // blocks that share a total

// The first token, in id order, at which the running sum exceeds the word's share of the whole: totals of stretches,
// then one stretch once more.
inline int64_t draw(const Row& row, uint64_t word) {
  const Tokens& tokens = row.tokens;
  const int64_t blocks = tokens.blocks();
  int64_t *totals = row.space.key_mass, total = 0;
  const int64_t stretches = (blocks + kStretch - 1) / kStretch;
  split(row.space.team, stretches, kPart / kStretch, [&](int64_t, int64_t t, int64_t last) {
    Vec<int64_t> w[kBlock / 16];
    for (; t < last; ++t) {
      Vec<int64_t> lanes = int64_t(0);
      for (int64_t b = t * kStretch; b < min(blocks, (t + 1) * kStretch); ++b) lanes = lanes + block_masses(row, b, w);
      totals[t] = reduce_sum(lanes);
    }
  });
  for (int64_t t = 0; t < stretches; ++t) total += totals[t];
  int64_t target = int64_t(multiply_high(word, uint64_t(total))), t = 0;
  while (t + 1 < stretches && totals[t] <= target) target -= totals[t++];
  for (int64_t b = t * kStretch; b < blocks; ++b) {
    Vec<int64_t> w[kBlock / 16];
    const int64_t here = reduce_sum(block_masses(row, b, w));
    if (here <= target) {
      target -= here;
      continue;
    }
    int64_t one[kBlock], i = 0;
    memcpy(one, w, sizeof w);
    while (i + 1 < kBlock && one[i] <= target) target -= one[i++];
    return tokens.at(min(b * kBlock + i, tokens.n - 1));
  }
  return tokens.at(tokens.n - 1); // only where another thread has written to the logits since they were added up
}

// Several draws: from the blocks' masses, so that none looks at the whole vocabulary.
inline void draw_several(Row& row, Stop* stop) {
  const Sampling& task = row.task;
  int64_t* mass = row.tokens.mass;
  int64_t *block_mass = row.space.key_mass, total = row.tokens.total, drawable = 0;
  for (int64_t b = 0; b < row.tokens.blocks(); ++b) {
    block_mass[b] = 0;
    for (int64_t i = b * kBlock; i < (b + 1) * kBlock; ++i) {
      block_mass[b] += mass[i];
      drawable += mass[i] > 0;
    }
  }
  if (!task.replacement && drawable < task.draws) {
    task.status[row.index] = fault_of(drawable, SamplingFault::few);
    return;
  }
  for (int64_t draw = 0; draw < task.draws && !stop->after(row.tokens.blocks()); ++draw) {
    int64_t target = int64_t(multiply_high(random_word(task, row.index, draw), uint64_t(total))), b = 0;
    // Both ends are reached only where another thread has written to the logits since they were measured.
    while (b + 1 < row.tokens.blocks() && block_mass[b] <= target) target -= block_mass[b++];
    int64_t i = b * kBlock;
    while (i + 1 < row.tokens.n && mass[i] <= target) target -= mass[i++];
    task.tokens[row.index * task.draws + draw] = row.tokens.at(i);
    if (task.replacement) continue;
    total -= mass[i];
    block_mass[b] -= mass[i];
    mass[i] = 0;
  }
}

template <class T> void write_probabilities(const Tokens& tokens, int64_t V, T* out) {
  const double total = double(tokens.total);
  if (tokens.id)
    for (int64_t i = 0; i < V; ++i) out[i] = 0;
  for (int64_t i = 0; i < tokens.n; ++i) out[tokens.at(i)] = T(double(tokens.mass[i]) / total);
}

// Writes number(token, z) for each token that is left, and `removed` for all others. The number is the logit as it came
// or, with a bias, z.
template <class T, class Number> void write_filtered(const Row& row, T removed, Number number) {
  T* out = static_cast<T*>(row.task.filtered) + row.index * row.task.V;
  for (int64_t i = 0; i < row.task.V; ++i) out[i] = removed;
  for (int64_t i = 0; i < row.tokens.n; ++i) {
    const float z = row.tokens.z[i];
    if (z != -kInfinity) out[row.tokens.at(i)] = number(row.tokens.at(i), z);
  }
}
template <class T> void write_filtered(const Row& row, T removed) {
  const View& logits = row.task.logits;
  const int64_t offset = batch_offset(row.task.batch, logits, row.index);
  write_filtered(row, removed,
                 [&](int64_t token, float) { return *reinterpret_cast<const T*>(address(logits, offset, token)); });
}
inline void write_filtered(const Row& row) {
  const DType dtype = row.task.logits.dtype;
  const auto with_bias = [](int64_t, float z) { return z + 0.0f; }; // + 0 makes -0 a 0
  if (row.task.bias.data)
    return dtype == DType::f64 ? write_filtered<double>(row, -kInfinity, with_bias)
                               : write_filtered<float>(row, -kInfinity, with_bias);
  switch (dtype) {
  case DType::f64: return write_filtered<double>(row, -kInfinity);
  case DType::f32: return write_filtered<float>(row, -kInfinity);
  default: return write_filtered<uint16_t>(row, dtype == DType::f16 ? 0xfc00 : 0xff80);
  }
}

inline Plan plan_sampling(const Sampling& task, int64_t) {
  Plan plan{task.batch.size(), 0, saturating_product(task.batch.size(), task.V, 8)};
  plan.team = plan.units == 1;
  Workspace(Arena{nullptr}, task.V, &plan.workspace);
  return plan;
}

// The row's scores, with masses at temperature 1. False where the row has a fault, which is in its status then.
inline bool begin(Row& row) {
  const Sampling& task = row.task;
  const Workspace& space = row.space;
  Tokens& tokens = row.tokens;
  tokens.n = task.V;
  tokens.z = scores(task, row.index, space);
  const int64_t whole = (tokens.blocks() - 1) * kBlock;
  for (int64_t i = 0; i < kBlock; ++i) space.last[i] = whole + i < task.V ? tokens.z[whole + i] : -kInfinity;
  tokens.last = space.last;

  Scale& scale = row.scale;
  scale.top = find_maxima(tokens, space);
  if (!(scale.top > -kInfinity && scale.top < kInfinity)) {
    task.status[row.index] = diagnose(task, row.index, tokens.z);
    return false;
  }
  task.status[row.index] = 0;
  scale.s = scale_bits(task.V);
  measure(row, 1);
  return true;
}

inline void run_stage(Row& row, const Step& step) {
  row.floor = step.floor ? row.task.min_tokens[row.index] : 1;
  apply_chosen(row);
  kStages[step.stage].run(row, step);
}

// All stages; where the token is all that is asked for, those up to the one that leaves no choice.
inline void filter(Row& row, bool token_only = false) {
  for (int64_t i = 0; i < row.task.step_count; ++i) {
    run_stage(row, row.task.steps[i]);
    if (token_only && row.scale.one_hot >= 0) return; // it outlives every stage that follows
  }
  if (!token_only) apply_chosen(row);
}

HEADWAY_FLATTEN inline void write_trace(Row& row, int64_t stage) {
  if (row.scale.one_hot >= 0) fill_masses(row.tokens, row);
  const Trace& to = row.task.trace;
  const Tokens& tokens = row.tokens;
  const int64_t first = stage * row.task.V;
  int64_t n = first;
  for (int64_t b = 0; b < tokens.blocks(); ++b) {
    const float* z = tokens.block(b);
    uint64_t in = block_bits(z, [](Vec<float> x) { return x != Vec<float>(-kInfinity); });
    if (!to.id) {
      n += __builtin_popcountll(in);
      continue;
    }
    Vec<int64_t> w[kBlock / 16];
    int64_t mass[kBlock];
    block_masses(row, b, w);
    memcpy(mass, w, sizeof w);
    for (; in; ++n) {
      const int64_t i = pop_lowest_bit(in);
      to.id[n] = tokens.at(b * kBlock + i);
      to.z[n] = z[i] + 0.0f; // which makes -0 a 0
      to.mass[n] = mass[i];
    }
  }
  to.count[stage] = n - first;
  to.found[stage] = row.found;
}
inline void trace(Row& row) {
  write_trace(row, 0);
  for (int64_t i = 0; i < row.task.step_count; ++i) {
    run_stage(row, row.task.steps[i]);
    apply_chosen(row);
    write_trace(row, i + 1);
  }
}

inline void run_sampling(const Sampling& task, const Plan&, int64_t index, const Memory& memory) {
  const Workspace space(Arena{static_cast<char*>(memory.own)}, task.V, nullptr, memory.team);
  Row row{task, index, space};
  if (!begin(row)) return;
  if (task.trace.count) return trace(row);
  const Tokens& tokens = row.tokens;
  const bool token_only = !task.probabilities && !task.filtered && task.draws == 1;
  filter(row, token_only);

  if (token_only) {
    task.tokens[index] = row.scale.one_hot >= 0 ? row.scale.one_hot : draw(row, random_word(task, index));
    return;
  }
  if (task.filtered) write_filtered(row);
  if (task.tokens || task.probabilities) fill_masses(row.tokens, row);
  if (task.tokens) draw_several(row, memory.stop);
  if (task.probabilities) {
    if (task.logits.dtype == DType::f64)
      write_probabilities(tokens, task.V, static_cast<double*>(task.probabilities) + index * task.V);
    else
      write_probabilities(tokens, task.V, static_cast<float*>(task.probabilities) + index * task.V);
  }
}

} // namespace
} // namespace headway
