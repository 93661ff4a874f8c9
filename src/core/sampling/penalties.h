// Penalties: a token that occurred before gets a lower logit. The tokens of a row's history are counted once, in time
// linear in its length, whatever the vocabulary; after that each new token is added to the counts, and a token that
// leaves a window is taken from the counts of that window.
#pragma once
#include "../ground/rows.h"

namespace headway {
namespace {

// One history, and the window of each kind of penalty: the number of its last tokens that the kind looks at, 0 where
// the kind is off.
struct History {
  int64_t length, prompt, window[kPenaltyKinds];
  const int64_t* token;  // the oldest first
  const uint8_t* breaks; // whether no repetition goes across this token
  int64_t &counted, &distinct, *id;
  int64_t (*times)[kPenaltyKinds];
  int64_t* same;

  History(const Histories& all, int64_t slot)
      : length(all.length[slot]), prompt(all.prompt[slot]), window{}, token(all.tokens + all.first[slot]),
        breaks(all.breakers + all.first[slot]), counted(all.counted[slot]), distinct(all.distinct[slot]),
        id(all.id + all.first[slot]), times(reinterpret_cast<int64_t (*)[kPenaltyKinds]>(all.times) + all.first[slot]),
        same(all.same + all.first[slot]) {}

  // The first place in the window of a kind, when the history has n tokens.
  int64_t start(int kind, int64_t n) const { return max(n - window[kind], kind == kFrequency ? prompt : 0); }

  int64_t add(int64_t t) { // a token to the list of different tokens; returns its place there
    id[distinct] = t;
    for (int64_t& count : times[distinct]) count = 0;
    return distinct++;
  }
  // Counts all tokens anew. `slot` is the sparse set of Briggs and Torczon (1993): nobody clears it, because an entry
  // is valid only if the list points back to it.
  void count_all(uint32_t* slot) {
    int64_t from[kPenaltyKinds], i = length;
    for (int kind = 0; kind < kPenaltyKinds; ++kind) from[kind] = start(kind, length), i = min(i, from[kind]);
    counted = length, distinct = 0;
    for (; i < length; ++i) {
      int64_t k = slot[token[i]];
      if (k >= distinct || id[k] != token[i]) slot[token[i]] = uint32_t(k = add(token[i]));
      for (int kind = 0; kind < kPenaltyKinds; ++kind) times[k][kind] += i >= from[kind];
    }
  }

  // The place of a token in the list of different tokens. A search is fast enough: the kernel visits the logits of all
  // these tokens anyway.
  int64_t find(int64_t t) const {
    int64_t k = 0;
    while (k < distinct && id[k] != t) ++k;
    return k;
  }
  void count_next() {
    int64_t k = find(token[counted]);
    if (k == distinct) add(token[counted]);
    ++counted;
    for (int kind = 0; kind < kPenaltyKinds; ++kind) times[k][kind] += start(kind, counted) < counted;
    for (int kind = 0; kind < kPenaltyKinds; ++kind) {
      const int64_t left = start(kind, counted) - 1;
      if (window[kind] == 0 || left < start(kind, counted - 1)) continue;
      k = find(token[left]);
      --times[k][kind];
      if (times[k][kRepetition] || times[k][kFrequency] || times[k][kDry]) continue;
      id[k] = id[--distinct];
      memcpy(times[k], times[distinct], sizeof *times);
    }
  }

  // The number of tokens in the window of DRY.
  int64_t size() const { return min(counted, window[kDry]); }
  // same[j]: the length of the longest common suffix of the history and of the history without its last j tokens, up to
  // a breaker. The token that follows the shorter one would prolong a repetition of that length. compare_all computes
  // same[j] for all j: it is the Z function of the reversed history (Gusfield, 1997).
  void compare_all() {
    const int64_t n = size(), *end = token + counted - 1;
    int64_t tail = 0;
    while (tail < n && !breaks[counted - 1 - tail]) ++tail;
    for (int64_t j = 1, left = 0, right = 0; j < n; ++j) {
      int64_t m = j < right ? min(same[j - left], right - j) : 0;
      while (j + m < n && end[-m] == end[-j - m]) ++m;
      if (j + m > right) left = j, right = j + m;
      same[j] = m;
    }
    for (int64_t j = 1; j < n; ++j) same[j] = min(same[j], tail);
  }
  // compare_next updates same[j] after one more token. A suffix may reach out of the window: `repeated` cuts it off.
  void compare_next() {
    const int64_t n = size(), *end = token + counted - 1;
    if (n > 1 && n == counted) same[n - 1] = 0; // a new place
    const int64_t goes_on = breaks[counted - 1] ? 0 : -1;
    for (int64_t j = 1; j < n; ++j) same[j] = end[-j] == *end ? (same[j] + 1) & goes_on : 0;
  }
  int64_t repeated(int64_t j) const { return min(same[j], size() - j); }
};

// Memory of one thread.
struct PenaltySpace {
  uint32_t* slot;   // (V): the place of each token in the list of different tokens
  int64_t* longest; // (tokens): the length of the longest repetition that each token of the list would prolong
  double* power;    // (tokens): the penalty of DRY for a length beyond the allowed one

  PenaltySpace(Arena arena, int64_t V, int64_t tokens, int64_t* bytes = nullptr) {
    slot = arena.take<uint32_t>(V);
    longest = arena.take<int64_t>(tokens);
    power = arena.take<double>(tokens);
    if (bytes) *bytes = arena.used;
  }
};

inline Plan plan_penalties(const Penalties& task, int64_t) {
  const Histories& all = task.histories;
  int64_t tokens = 0, longest = 0; // to count, or to visit
  for (int64_t i = 0; i < task.batch.size(); ++i) {
    const int64_t slot = all.slot[i];
    tokens += all.length[slot] - all.counted[slot] + all.distinct[slot];
    longest = max(longest, all.length[slot]);
  }
  Plan plan{task.batch.size(), 0, saturating_product(tokens, 16)};
  PenaltySpace(Arena{nullptr}, task.V, longest, &plan.workspace);
  return plan;
}

inline void run_penalties(const Penalties& task, const Plan&, int64_t index, const Memory& memory) {
  const Histories& all = task.histories;
  const double repetition = task.repetition[index], frequency = task.frequency[index], presence = task.presence[index],
               multiplier = task.dry_multiplier[index];
  if (repetition == 1 && frequency == 0 && presence == 0 && multiplier == 0) return; // it stays uncounted
  const int64_t slot = all.slot[index];
  PenaltySpace space(Arena{static_cast<char*>(memory.own)}, task.V, all.length[slot]);
  History history(all, slot);
  const bool on[kPenaltyKinds] = {repetition != 1, frequency != 0 || presence != 0, multiplier > 0}, dry = on[kDry];
  for (int kind = 0; kind < kPenaltyKinds; ++kind) history.window[kind] = on[kind] ? task.window[kind][index] : 0;
  if (history.counted == 0) {
    history.count_all(space.slot);
    if (dry) history.compare_all();
  }
  while (history.counted < history.length) {
    history.count_next();
    if (dry) history.compare_next();
  }

  const int64_t distinct = history.distinct, n = history.size(), allowed_length = task.dry_allowed_length[index];
  int64_t most_repeated = 0;
  for (int64_t j = 1; dry && j < n; ++j) {
    const int64_t length = history.repeated(j), next = history.length - j;
    if (length < allowed_length || history.breaks[next]) continue;
    if (!most_repeated)
      for (int64_t k = 0; k < distinct; ++k) space.slot[history.id[k]] = uint32_t(k), space.longest[k] = 0;
    int64_t& longest = space.longest[space.slot[history.token[next]]];
    longest = max(longest, length);
    most_repeated = max(most_repeated, length);
  }
  double power = multiplier;
  for (int64_t i = 0; i <= most_repeated - allowed_length; ++i, power *= task.dry_base[index])
    space.power[i] = power < __builtin_inf() ? power : 0x1.fffffffffffffp+1023;
  const int64_t offset = batch_offset(task.batch, task.logits, index);
  double* logit = all.logit + all.first[slot];
  for (int64_t k = 0; k < distinct; ++k) {
    if (k + 32 < distinct) __builtin_prefetch(address(task.logits, offset, history.id[k + 32]));
    read_row(address(task.logits, offset, history.id[k]), task.logits.dtype, 1, 1, logit + k);
  }
  constexpr double of_float = 0x1.fffffep+127, of_double = 0x1.fffffffffffffp+1023; // logits count as float32
  for (int64_t k = 0; k < distinct; ++k) {
    const int64_t (&times)[kPenaltyKinds] = history.times[k];
    double z = logit[k];
    const double largest = __builtin_fabs(z) <= of_float ? of_float : of_double;
    const bool finite = z - z == 0;
    if (times[kRepetition]) z = z > 0 ? z / repetition : z * repetition;
    if (times[kFrequency]) z = z - double(times[kFrequency]) * frequency - presence;
    if (most_repeated && space.longest[k] > 0) z = z - space.power[space.longest[k] - allowed_length];
    if (finite) z = z > largest ? largest : z < -largest ? -largest : z;
    logit[k] = canonical(task.logits.dtype == DType::f64 ? z : double(float(z)));
  }
}

} // namespace
} // namespace headway
