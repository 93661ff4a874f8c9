// Speculative sampling, exactly: drafted tokens are accepted or replaced so that what comes out is distributed as the
// target alone would draw it (Leviathan et al., 2023; Chen et al., 2023). With masses p of P in all and q of Q, a token
// is accepted with probability min(1, (p / P) / (q / Q)), and else replaced by one drawn from the masses
// max(0, p Q - q P): products of two whole numbers, below 2^124 in all.
#pragma once
#include "logprobs.h"
#include "sampling.h"

namespace headway {
namespace {

// floor(word * total / 2^64), for a total below 2^127.
inline Wide share_of(uint64_t word, Wide total) {
  return Wide(word) * uint64_t(total >> 64) + ((Wide(word) * uint64_t(total)) >> 64);
}

inline int64_t mass_of(const Tokens& tokens, int64_t id) {
  const int64_t place = place_of(tokens, id);
  return holds(tokens, place, id) ? tokens.mass[place] : 0;
}

// Calls visit(id, max(0, p Q - q P)) for each token of the target, in id order, until it returns false.
template <class Visit> void each_residual(const Tokens& target, const Tokens& draft, Visit visit) {
  for (int64_t i = 0, j = 0; i < target.n; ++i) {
    const int64_t id = target.at(i);
    while (j < draft.n && draft.at(j) < id) ++j;
    const int64_t q = j < draft.n && draft.at(j) == id ? draft.mass[j] : 0;
    const Wide has = Wide(target.mass[i]) * uint64_t(draft.total), had = Wide(q) * uint64_t(target.total);
    if (has > had && !visit(id, has - had)) return;
  }
}

inline Plan plan_verification(const Verification& task, int64_t) {
  Plan plan{task.rows, 0, saturating_product(task.rows, task.places, task.target.V, 16)};
  plan.team = plan.units == 1;
  Workspace(Arena{nullptr}, task.target.V, &plan.workspace);
  plan.workspace *= 2;
  return plan;
}

inline void run_verification(const Verification& task, const Plan& plan, int64_t index, const Memory& memory) {
  char* own = static_cast<char*>(memory.own);
  const Workspace space(Arena{own}, task.target.V, nullptr, memory.team);
  const Workspace draft_space(Arena{own + plan.workspace / 2}, task.target.V, nullptr, memory.team);
  task.accepted[index] = 0, task.next[index] = -1;
  if (task.lengths[index] < 0) return;
  for (int64_t i = 0; !memory.stop->after(16 * task.target.V); ++i) {
    task.accepted[index] = i;
    if (i == task.places) return;
    const int64_t at = index * task.places + i, draft_at = index * task.n + i;
    Row row{task.target, at, space};
    if (!begin(row)) return;
    filter(row);
    fill_masses(row.tokens, row);
    const Tokens& target = row.tokens;
    const RandomBlock random = random_block(task.target, at);
    if (i == task.lengths[index]) {
      task.next[index] = draw(row, random.word[0]);
      return;
    }
    const int64_t token = task.tokens[draft_at];
    const int32_t only = int32_t(token);
    int64_t whole = 1;
    Row drafted{task.draft, draft_at, draft_space};
    Tokens& draft = drafted.tokens;
    if (task.draft.logits.data) {
      if (!begin(drafted)) return;
      filter(drafted);
      fill_masses(draft, drafted);
    } else {
      draft.n = draft.total = whole;
      draft.z = &row.scale.top; // any that is no ban
      draft.id = &only;
      draft.mass = &whole;
    }
    const int64_t q = mass_of(draft, token);
    if (!q) {
      task.draft.status[draft_at] = fault_of(token, SamplingFault::undrawn);
      return;
    }
    const Wide has = Wide(mass_of(target, token)) * uint64_t(draft.total), had = Wide(q) * uint64_t(target.total);
    if (has >= had || share_of(random.word[2], had) < has) continue;
    // Words of their own: the draft may have been drawn with the first of this very block.
    Wide total = 0;
    each_residual(target, draft, [&](int64_t, Wide mass) {
      total += mass;
      return true;
    });
    Wide left = share_of(random.word[3], total);
    task.next[index] = token; // stays only where another thread has written to the logits
    each_residual(target, draft, [&](int64_t id, Wide mass) {
      task.next[index] = id;
      const bool passed = left >= mass;
      left -= mass;
      return passed;
    });
    return;
  }
}

} // namespace
} // namespace headway
