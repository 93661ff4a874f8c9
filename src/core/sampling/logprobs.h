// Log-probabilities: those of given tokens and their ranks in the order, and those of the best tokens.
#pragma once
#include "sampling.h"

namespace headway {
namespace {

inline int64_t count_above(const float* z, int64_t n, float bound) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) found += z[i] > bound;
  return found;
}
inline int64_t count_from(const float* z, int64_t n, float bound) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) found += z[i] >= bound;
  return found;
}

// The natural logarithm of a token's probability: ln(mass / total) where it is processed; else (z - best) - ln(sum of
// exp(z - best)), the log-softmax. The sum of the masses is 2^s times that sum.
struct Logarithms {
  bool processed;
  double total, best, sum;
  Logarithms(const Row& row, bool of_shares)
      : processed(of_shares), total(double(row.tokens.total)), best(row.scale.top),
        sum(natural_log(total / double(int64_t(1) << row.scale.s))) {}
  double operator()(float z, int64_t mass) const {
    if (z == -kInfinity || (processed && mass == 0)) return double(-kInfinity);
    return processed ? natural_log(double(mass) / total) : (double(z) - best) - sum;
  }
};

inline Plan plan_ranking(const Ranking& task, int64_t threads) {
  Plan plan = plan_sampling(task.rows, threads);
  plan.work += saturating_product(plan.units, task.rows.V, task.given);
  return plan;
}

HEADWAY_FLATTEN inline void run_ranking(const Ranking& task, const Plan&, int64_t index, const Memory& memory) {
  const Workspace space(Arena{static_cast<char*>(memory.own)}, task.rows.V, nullptr, memory.team);
  Row row{task.rows, index, space};
  if (!begin(row)) return;
  filter(row);
  fill_masses(row.tokens, row);
  const Logarithms logarithm(row, task.processed);
  for (int64_t g = index * task.given; g < (index + 1) * task.given; ++g) {
    if (memory.stop->after(row.tokens.n)) return;
    const Tokens& tokens = row.tokens;
    const int64_t id = task.tokens[g], place = place_of(tokens, id);
    const bool left = holds(tokens, place, id);
    const float z = left ? tokens.z[place] : -kInfinity;
    task.given_logprob[g] = logarithm(z, left ? tokens.mass[place] : 0);
    // What was removed comes after all that is left, by id.
    task.rank[g] =
        1 + (left ? count_from(tokens.z, place, z) : id) + count_above(tokens.z + place, tokens.n - place, z);
  }
  if (!task.top) return;
  row.floor = 1;
  keep_first(row, task.top, Ties::lowest_id);
  apply_chosen(row);
  int64_t to = index * task.top;
  const int64_t end = to + task.top; // more are left only where another thread has written to the logits
  for (int64_t i = 0; i < row.tokens.n && to < end; ++i) {
    if (row.tokens.z[i] == -kInfinity) continue;
    const float z = row.tokens.z[i];
    task.top_id[to] = row.tokens.at(i);
    task.top_key[to] = key_of(z);
    task.top_logprob[to++] = logarithm(z, row.tokens.mass[i]);
  }
  for (; to < end; ++to) {
    task.top_id[to] = -1;
    task.top_key[to] = 0;
    task.top_logprob[to] = double(-kInfinity);
  }
}

} // namespace
} // namespace headway
