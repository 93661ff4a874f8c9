// Penalties: what occurred before gets a lower logit. One row in time linear in its history, whatever the vocabulary.
#pragma once
#include "rows.h"

namespace headway {
namespace {

struct History {
  int64_t n;
  const int64_t* token;   // the oldest first
  const uint8_t* breaker; // or nullptr
  int64_t distinct = 0;
  int64_t* id;              // the distinct tokens, by first occurrence
  uint32_t* slot;           // (V): where a token is in that list
  int64_t *count, *repeats; // of each of the list: how often; the longest end of the history that it once followed
  int64_t* same;            // (n)
  double* power;            // (n)

  History(Arena arena, int64_t V, int64_t capacity, int64_t* bytes = nullptr) {
    slot = arena.take<uint32_t>(V);
    count = arena.take<int64_t>(capacity);
    repeats = arena.take<int64_t>(capacity);
    same = arena.take<int64_t>(capacity);
    power = arena.take<double>(capacity);
    if (bytes) *bytes = arena.used;
  }

  // The set of Briggs and Torczon (1993): slot is never cleared, for it counts only where the list points back.
  void count_tokens() {
    for (int64_t i = 0; i < n; ++i) {
      int64_t k = slot[token[i]];
      if (k >= distinct || id[k] != token[i]) {
        k = distinct++;
        slot[token[i]] = uint32_t(k);
        id[k] = token[i];
        count[k] = repeats[k] = 0;
      }
      ++count[k];
    }
  }

  // same[j]: how many tokens the history, read backwards, has in common with itself from its j-th last on (the Z
  // function; Gusfield, 1997). The token after that place would repeat so many; breakers bound them.
  void count_repeats(int64_t allowed_length) {
    const int64_t* end = token + n - 1;
    int64_t tail = 0;
    while (tail < n && !(breaker && breaker[n - 1 - tail])) ++tail;
    for (int64_t j = 1, left = 0, right = 0; j < n; ++j) {
      int64_t m = j < right ? least(same[j - left], right - j) : 0;
      while (j + m < n && end[-m] == end[-j - m]) ++m;
      if (j + m > right) left = j, right = j + m;
      same[j] = m;
      const int64_t length = least(m, tail), next = n - j;
      if (length < allowed_length || (breaker && breaker[next])) continue;
      int64_t& longest = repeats[slot[token[next]]];
      longest = most(longest, length);
    }
  }
};

inline double largest_of(DType t) {
  switch (t) {
  case DType::f64: return 0x1.fffffffffffffp+1023;
  case DType::f16: return 65504;
  case DType::bf16: return 0x1.fep+127;
  default: return 0x1.fffffep+127;
  }
}

// A number as the type holds it; what is finite stays so.
inline double rounded(double x, DType dtype) {
  const double largest = largest_of(dtype);
  x = x > largest ? largest : x < -largest ? -largest : x;
  char narrow[8];
  write_row(&x, 1, narrow, dtype);
  read_row(narrow, dtype, 1, 1, &x);
  return x;
}

inline Plan plan_penalties(const Penalties& task, int64_t) {
  Plan plan{task.batch.size(), 0, rough_product(task.batch.size(), task.edits.capacity, 16)};
  History(Arena{nullptr}, task.V, task.edits.capacity, &plan.workspace);
  return plan;
}

inline void run_penalties(const Penalties& task, const Plan&, int64_t index, Memory memory) {
  const int64_t capacity = task.edits.capacity, length = task.length[index];
  History history(Arena{static_cast<char*>(memory.own)}, task.V, capacity);
  history.n = least(length, task.window[index]);
  const int64_t first = index * capacity + length - history.n;
  history.token = task.tokens + first;
  history.breaker = task.breakers ? task.breakers + first : nullptr;
  history.id = task.edits.id + index * capacity;
  history.count_tokens();
  task.edits.count[index] = history.distinct;

  const int64_t allowed_length = task.dry_allowed_length[index];
  const double multiplier = task.dry_multiplier[index], infinite = __builtin_inf();
  if (multiplier > 0) {
    history.count_repeats(allowed_length);
    double power = multiplier;
    for (int64_t i = 0; i < history.n; ++i, power *= task.dry_base[index])
      history.power[i] = power < infinite ? power : largest_of(DType::f64);
  }
  const double repetition = task.repetition[index], frequency = task.frequency[index], presence = task.presence[index];
  const int64_t offset = batch_offset(task.batch, task.logits, index);
  for (int64_t k = 0; k < history.distinct; ++k) {
    double z;
    read_row(address(task.logits, offset, history.id[k]), task.logits.dtype, 1, 1, &z);
    const bool finite = z - z == 0;
    z = z > 0 ? z / repetition : z * repetition;
    z = z - double(history.count[k]) * frequency - presence;
    if (multiplier > 0 && history.repeats[k] > 0) z = z - history.power[history.repeats[k] - allowed_length];
    task.edits.logit[index * capacity + k] = finite ? rounded(z, task.logits.dtype) : z;
  }
}

} // namespace
} // namespace headway
