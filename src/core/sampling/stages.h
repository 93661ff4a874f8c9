// The stages of sampling: each removes tokens from a row, or measures the masses of its tokens.
#pragma once
#include "../ground/rng.h"
#include "selection.h"

namespace headway {
namespace {

// The row's random numbers, a block for each draw. Its first word draws the token; the second word of the first block
// decides whether xtc removes anything.
inline RandomBlock random_block(const Sampling& task, int64_t index, int64_t draw = 0) {
  if (!task.seed.data) return {}; // only the draw is random, and takes its numbers from the caller
  return philox(task.seed[index], task.stream[index], task.position[index], uint64_t(draw));
}
inline uint64_t random_word(const Sampling& task, int64_t index, int64_t draw = 0) {
  if (task.uniform.data) return uint64_t(task.uniform[index * task.draws + draw] * 0x1p+64);
  return random_block(task, index, draw).word[0];
}

struct Row {
  const Sampling& task;
  int64_t index;
  const Workspace& space;
  int64_t floor = 1; // the smallest number of tokens that the stage leaves, if the row has so many
  Scale scale{};
  Tokens tokens{};      // the tokens that are left
  bool pending = false; // whether the tokens whose bit in space.chosen is 0 are still to be removed from them
  // The number that the last stage computed, for traces: the temperature, the standard deviation, the mean of x, the
  // smallest mass that eta_cutoff keeps, or the random number of xtc.
  double found = 0;
};

inline void fill_masses(Tokens& tokens, const Row& row) {
  fill_masses(tokens, row.scale, tokens.id ? row.space.list_mass : row.space.row_mass, row.space.team);
}

// The masses of the tokens of a block: those in memory, or computed now where no stage has needed them yet.
HEADWAY_FLATTEN inline Vec<int64_t> block_masses(const Row& row, int64_t b, Vec<int64_t> (&w)[kBlock / 16]) {
  const Tokens& tokens = row.tokens;
  Vec<int64_t> sum = int64_t(0);
  if (!tokens.mass) {
    sum = block_masses(tokens.block(b), row.scale, w);
    if (!row.pending) return sum;
    sum = int64_t(0);
  }
  for (int64_t v = 0; v < kBlock / 16; ++v) {
    if (tokens.mass) w[v] = Vec<int64_t>::load(tokens.mass + b * kBlock + 16 * v);
    if (row.pending) w[v] = w[v] & convert<int64_t>(lane_mask(row.space.chosen[b] >> 16 * v));
    sum = sum + w[v];
  }
  return sum;
}

// Keeps the chosen tokens of `from`, or all of them where none is chosen. In a long row the other tokens stay in the
// arrays until a stage needs arrays without them (`pending`): the draw, which most often comes next, reads the bits.
inline void keep_chosen(Row& row, const Tokens& from, int64_t count) {
  if (count == 0) return; // every stage leaves some, unless another thread has written to the logits
  row.tokens = from;
  row.pending = !are_few(from, count);
  if (!row.pending) row.tokens = list_chosen(from, row.space);
}
inline void apply_chosen(Row& row) {
  if (row.pending) row.tokens = remove_others(row.tokens, row.space);
  row.pending = false;
}

// Sums over the tokens that are left. Lane i of 16 adds the tokens with id mod 16 = i, in the order of ids. The order
// is the same whichever tokens were removed, because a term of 0 changes no sum.
struct Sums {
  double first, second;
  int64_t count;
};
// term(v, z, first, second) sets the two terms of 16 tokens, from the v-th on; those of a removed token count as 0.
template <class Term> HEADWAY_FLATTEN Sums sums(const Tokens& tokens, Term term) {
  Vec<double> first = 0.0, second = 0.0;
  Vec<int32_t> present = int32_t(0);
  double lane[2][16] = {};
  for (int64_t b = 0; b < tokens.blocks(); ++b)
    for (int64_t v = 0; v < kBlock; v += 16) {
      const Vec<float> z = Vec<float>::load(tokens.block(b) + v);
      const Mask<float> in = z != Vec<float>(-kInfinity);
      present = present - in;
      Vec<double> a, c;
      term(b * kBlock + v, z, a, c);
      const Vec<int64_t> wide = convert<int64_t>(in);
      a = select(wide, a, Vec<double>(0.0)), c = select(wide, c, Vec<double>(0.0));
      if (!tokens.id) {
        first = first + a, second = second + c;
        continue;
      }
      double one[2][16];
      a.store(one[0]), c.store(one[1]);
      for (int64_t i = 0; i < min(16, tokens.n - b * kBlock - v); ++i)
        for (int j = 0; j < 2; ++j) lane[j][tokens.at(b * kBlock + v + i) & 15] += one[j][i];
    }
  if (tokens.id) first = Vec<double>::load(lane[0]), second = Vec<double>::load(lane[1]);
  return {reduce_sum(first), reduce_sum(second), reduce_sum(present)};
}

// The total mass, the mean of x under the masses, and the number of tokens. The mean less the x of a token is the
// surprise of the token less the entropy.
struct Moments {
  int64_t total;
  double mean;
  int64_t count;
};
inline Moments moments(Row& row) {
  if (row.scale.one_hot >= 0) fill_masses(row.tokens, row);
  const Tokens& tokens = row.tokens;
  Vec<int64_t> total = int64_t(0);
  const Sums all = sums(tokens, [&](int64_t v, Vec<float> z, Vec<double>& first, Vec<double>& second) {
    const Vec<float> x = exponents(z, row.scale);
    const Vec<int64_t> w = tokens.mass ? Vec<int64_t>::load(tokens.mass + v) : masses_at(x, row.scale);
    total = total + w;
    // A mass below 2^52 as a double: its bits are the fraction of one in [2^52, 2^53).
    const Vec<double> wide = bits<double>(w + bits<int64_t>(Vec<double>(0x1p+52))) - Vec<double>(0x1p+52);
    first = wide * widen(x);
    second = 0.0;
  });
  const int64_t mass = reduce_sum(total);
  return {mass, all.first / double(mass), all.count};
}

// A short array that holds the best logits: the logits themselves where the tokens are a list, else the maxima of
// blocks. It is padded with -inf to whole blocks.
struct Leaders {
  const float* z;
  int64_t n;
  explicit Leaders(const Row& row)
      : z(row.tokens.id ? row.tokens.z : row.space.block_max), n(row.tokens.id ? row.tokens.n : row.tokens.blocks()) {}
};
inline float best_logit(const Row& row) {
  const Leaders leaders(row);
  Vec<float> top = -kInfinity;
  for (int64_t v = 0; v < leaders.n; v += 16) top = max(Vec<float>::load(leaders.z + v), top);
  return reduce_max(top);
}
// Scale::tiny, by the leaders alone.
inline float tiny_difference(const Row& row) {
  const Scale& scale = row.scale;
  if (!(scale.inverse > 0x1p-100f && scale.inverse < 0x1p60f)) return 0;
  const Leaders leaders(row);
  const float tiny = 0x1p-50f / scale.inverse;
  const Vec<float> top = scale.top, bound = tiny;
  Mask<float> close = int32_t(0);
  for (int64_t v = 0; v < leaders.n; v += 16) {
    const Vec<float> d = top - Vec<float>::load(leaders.z + v);
    close = close | ((d < bound) & (d > Vec<float>(0.0f)));
  }
  return any(close) ? tiny : 0;
}

// The first `n` tokens of the order, or the floor if that is more.
inline void keep_first(Row& row, int64_t n, Ties ties) {
  Tokens& tokens = row.tokens;
  n = max(n, row.floor);
  if (n >= tokens.n) return;
  // n blocks have a maximum of at least the n-th largest maximum, so n tokens do. Fewer blocks have more than that, so
  // few tokens do: either they suffice, or the boundary is that maximum.
  if (!tokens.id && n < tokens.blocks() / 2) {
    const float bound = kth_largest(row.space.block_max, tokens.blocks(), n, row.space);
    const int64_t equal = choose_inside(tokens, row.space, {bound, 0, tokens.n});
    const int64_t over = choose_inside(tokens, row.space, {bound, 0, 0});
    if (over < n) {
      const int64_t need = max(0, ties == Ties::keep ? equal - over : min(n, equal) - over);
      const int64_t skip = ties == Ties::highest_id ? max(0, equal - over - need) : 0;
      const int64_t count = choose_inside(tokens, row.space, {bound, skip, need});
      return keep_chosen(row, tokens, count);
    }
    keep_chosen(row, tokens, over);
    apply_chosen(row);
  }
  const int64_t count = choose_inside(tokens, row.space, select_prefix(tokens, ByCount{}, n, ties, row.space));
  keep_chosen(row, tokens, count);
}

// Keeps the `count` chosen tokens of `few`; or the first tokens of the order, where the floor is higher.
inline void keep(Row& row, const Tokens& few, int64_t count, Ties ties) {
  if (count < row.floor) return keep_first(row, row.floor, ties);
  keep_chosen(row, few, count);
}

// The tokens with logits of at least `bound`, where they make a short list; else all tokens.
inline Tokens reaching(const Row& row, float bound) {
  if (row.tokens.id) return row.tokens;
  const int64_t count = choose_inside(row.tokens, row.space, {bound, 0, row.tokens.n});
  return count > 0 && are_few(row.tokens, count) ? list_chosen(row.tokens, row.space) : row.tokens;
}

// Keeps the tokens of at least this mass; or the first tokens of the order, where the floor is higher. Only the tokens
// whose logits are close to the bound need their masses computed.
inline void keep_from_mass(Row& row, int64_t mass, Ties ties) {
  const Tokens& tokens = row.tokens;
  if (mass > int64_t(1) << row.scale.s) return keep_first(row, row.floor, ties);
  if (row.scale.one_hot >= 0) fill_masses(row.tokens, row);
  const MassBounds bounds = bounds_of_mass(row.scale, mass);
  const int64_t count = choose(tokens, row.space, [&](int64_t b) -> uint64_t {
    if (!tokens.id && row.space.block_max[b] < bounds.low) return 0;
    const Vec<float> low = bounds.low, high = bounds.high;
    const uint64_t sure = block_bits(tokens.block(b), [&](Vec<float> z) { return z >= high; });
    uint64_t unsure = block_bits(tokens.block(b), [&](Vec<float> z) { return z >= low; });
    if (row.scale.one_hot < 0 && sure == unsure) return sure;
    Vec<int64_t> w[kBlock / 16];
    const Vec<int64_t> enough = mass;
    block_masses(row, b, w);
    for (int64_t v = 0; v < kBlock / 16; ++v)
      unsure &= lane_bits(w[v] >= enough) << 16 * v | ~(uint64_t(0xffff) << 16 * v);
    return unsure;
  });
  keep(row, tokens, count, ties);
}

// Follows a stage that may remove the best token. If it did, all masses are computed anew: the best token that is left
// has the mass 2^s.
inline void measure_anew(Row& row) {
  for (int64_t b = 0; row.pending && b < row.tokens.blocks(); ++b) {
    const Vec<float> top = row.scale.top;
    if (row.space.block_max[b] == row.scale.top &&
        block_bits(row.tokens.block(b), [&](Vec<float> z) { return z == top; }) & row.space.chosen[b])
      return; // it is still there
  }
  apply_chosen(row);
  const float best = best_logit(row);
  if (best == row.scale.top) return;
  row.scale.top = best;
  row.tokens.mass = nullptr;
}

// The first token with the best logit.
inline int64_t first_equal(const Row& row, float best) {
  const Tokens& tokens = row.tokens;
  const Vec<float> value = best;
  for (int64_t b = 0; b < tokens.blocks(); ++b) {
    if (!tokens.id && row.space.block_max[b] != best) continue;
    uint64_t found = block_bits(tokens.block(b), [&](Vec<float> z) { return z == value; });
    if (found) return tokens.at(min(b * kBlock + pop_lowest_bit(found), tokens.n - 1));
  }
  return tokens.at(0); // only where another thread has written to the logits
}

// Sets the scale of a temperature: the best token that is left has the mass 2^s.
inline void measure(Row& row, double temperature) {
  Tokens& tokens = row.tokens;
  Scale& scale = row.scale;
  tokens.mass = nullptr;
  scale.top = best_logit(row);
  scale.inverse = inverse_temperature(temperature);
  scale.tiny = tiny_difference(row);
  scale.one_hot = temperature == 0 ? first_equal(row, scale.top) : -1;
}

inline void greedy(Row& row, const Step& step) {
  row.found = step.value[0][row.index];
  if (row.found == 0) measure(row, 0);
}

// With a range, the temperature rises with the entropy at temperature 1, as a share of the largest that so many tokens
// can have.
inline void temperature(Row& row, const Step& step) {
  double t = step.value[0][row.index];
  const double range = step.value[1].data ? step.value[1][row.index] : 0;
  if (range > 0) {
    const double low = t > range ? t - range : 0, largest = 0x1.fffffffffffffp+1023;
    const double high = t + range < largest ? t + range : largest;
    measure(row, 1);
    const Moments at_1 = moments(row);
    double entropy = natural_log(double(at_1.total) * power_of_two(-row.scale.s)) - at_1.mean;
    entropy = at_1.count > 1 ? entropy / natural_log(double(at_1.count)) : 0;
    entropy = entropy > 0 ? entropy < 1 ? entropy : 1 : 0;
    t = low + (high - low) * power(entropy, step.value[2][row.index]);
    t = t < largest ? t : largest;
  }
  row.found = t;
  measure(row, t);
}

inline void top_n_sigma(Row& row, const Step& step) {
  const double n = step.value[0][row.index], top = double(best_logit(row));
  if (n == __builtin_inf()) return;
  const Sums all = sums(row.tokens, [&](int64_t, Vec<float> z, Vec<double>& first, Vec<double>& second) {
    first = widen(z) - Vec<double>(top);
    second = first * first;
  });
  const double mean = all.first / double(all.count), variance = all.second / double(all.count) - mean * mean;
  row.found = variance > 0 ? __builtin_sqrt(variance) : 0;
  const double below = n * row.found;
  const float bound = bisect(float(top), [&](float z) { return double(z) - top >= -below; });
  keep(row, row.tokens, choose_inside(row.tokens, row.space, {bound, 0, row.tokens.n}), step.ties);
}

inline void top_k(Row& row, const Step& step) {
  const double k = step.value[0][row.index];
  if (k < double(row.tokens.n)) keep_first(row, int64_t(k), step.ties);
}

HEADWAY_FLATTEN inline int64_t mass_reaching(const Row& row, float bound) {
  int64_t mass[kMaxParts], all = 0;
  const int64_t parts =
      split(row.space.team, row.tokens.blocks(), 8 * kPart, [&](int64_t part, int64_t b, int64_t last) {
        const Vec<float> value = bound;
        Vec<int64_t> lanes = int64_t(0);
        for (; b < last; ++b)
          for (int64_t v = 0; v < kBlock && row.space.block_max[b] >= bound; v += 16) {
            const Mask<float> in = Vec<float>::load(row.tokens.block(b) + v) >= value;
            lanes = lanes + (convert<int64_t>(in) & Vec<int64_t>::load(row.tokens.mass + b * kBlock + v));
          }
        mass[part] = reduce_sum(lanes);
      });
  for (int64_t i = 0; i < parts; ++i) all += mass[i];
  return all;
}

// The mass of the best token of each block.
HEADWAY_FLATTEN inline int64_t mass_of_maxima(const Row& row) {
  Vec<int64_t> w[kBlock / 16], mass = int64_t(0);
  for (int64_t b = 0; b < row.tokens.blocks(); b += kBlock)
    mass = mass + block_masses(row.space.block_max + b, row.scale, w);
  return reduce_sum(mass);
}

// A short list of the best tokens that holds at least this mass, as on most rows a few tokens do; else all tokens. The
// list has the logits from the k-th largest maximum of a block on, for growing k.
inline Tokens holding(const Row& row, int64_t target) {
  const int64_t blocks = row.tokens.blocks();
  if (row.tokens.id || mass_of_maxima(row) < target - target / 8) return row.tokens;
  const int64_t last = blocks - blocks / 16;
  for (int64_t k = 8; k <= last; k = k < last ? min(8 * k, last) : last + 1) {
    const float bound = kth_largest(row.space.block_max, blocks, k, row.space);
    if (mass_reaching(row, bound) >= target) return reaching(row, bound);
  }
  return row.tokens;
}

inline void top_p(Row& row, const Step& step) {
  const double p = step.value[0][row.index];
  if (p == 1.0) return;
  fill_masses(row.tokens, row);
  const int64_t target = least_mass(p, row.tokens.total, !step.equal);
  // At temperature 0 the first token of the order has all the mass, and no other equals it.
  const Ties ties = row.scale.one_hot < 0 ? step.ties : Ties::lowest_id;
  if (target == 0) return keep_first(row, row.floor, ties);
  const Tokens few = holding(row, target);
  const Boundary end = select_prefix(few, ByMass{few.mass}, target, ties, row.space);
  keep(row, few, choose_inside(few, row.space, end), ties);
}

inline void min_p(Row& row, const Step& step) {
  const double p = step.value[0][row.index];
  if (p == 0.0) return;
  keep_from_mass(row, least_mass(p, int64_t(1) << row.scale.s), step.ties);
}

// The same tokens with another order: their logits are the negative distances of x from the mean, so that the nearest
// tokens are the best.
HEADWAY_FLATTEN inline Tokens by_distance(const Row& row, const Tokens& tokens, float mean) {
  float* distance = row.space.distance;
  const Vec<float> middle = mean, zero = 0.0f;
  for (int64_t b = 0; b < tokens.blocks(); ++b)
    for (int64_t v = 0; v < kBlock; v += 16) {
      const Vec<float> z = Vec<float>::load(tokens.block(b) + v), apart = exponents(z, row.scale) - middle;
      select(z == Vec<float>(-kInfinity), z, select(apart > zero, zero - apart, apart))
          .store(distance + b * kBlock + v);
    }
  Tokens near = tokens;
  near.z = distance;
  near.last = distance + (near.blocks() - 1) * kBlock;
  return near;
}

inline void typical_p(Row& row, const Step& step) {
  const double p = step.value[0][row.index];
  if (p == 1.0) return;
  fill_masses(row.tokens, row);
  row.found = moments(row).mean;
  const float mean = float(row.found);
  const int64_t target = least_mass(p, row.tokens.total, !step.equal), floor = min(row.floor, row.tokens.n);
  const auto choose_near = [&](const Tokens& tokens, Boundary end) {
    return choose(tokens, row.space, Inside{tokens, nullptr, end});
  };
  // A few of the best tokens, which hold the mass, are enough if all other tokens are farther from the mean than those
  // that the stage takes from them.
  if (const Tokens few = floor == 1 && target > 0 ? holding(row, target) : row.tokens; few.id && !row.tokens.id) {
    const Tokens near = by_distance(row, few, mean);
    const Boundary end = select_prefix(near, ByMass{near.mass}, target, step.ties, row.space);
    float lowest = row.scale.top, farthest[16];
    for (int64_t i = 0; i < few.n; ++i) lowest = few.z[i] < lowest ? few.z[i] : lowest;
    (exponents(Vec<float>(lowest), row.scale) - Vec<float>(mean)).store(farthest);
    if (farthest[0] < 0 && farthest[0] < end.value) {
      keep_chosen(row, few, choose_near(near, end));
      return measure_anew(row);
    }
  }
  const Tokens near = by_distance(row, row.tokens, mean);
  int64_t count = 0;
  if (target > 0) count = choose_near(near, select_prefix(near, ByMass{near.mass}, target, step.ties, row.space));
  if (count < floor) count = choose_near(near, select_prefix(near, ByCount{}, floor, Ties::lowest_id, row.space));
  keep_chosen(row, row.tokens, count);
  measure_anew(row);
}

inline void epsilon_cutoff(Row& row, const Step& step) {
  const double epsilon = step.value[0][row.index];
  if (epsilon > 0) keep_from_mass(row, least_mass(epsilon, moments(row).total), step.ties);
}

// exp(-entropy) of the total is the mass that a token at the mean of x would have.
inline void eta_cutoff(Row& row, const Step& step) {
  const double epsilon = step.value[0][row.index];
  if (epsilon == 0.0) return;
  const Moments all = moments(row);
  int64_t middle[16];
  masses_at(Vec<float>(float(all.mean)), row.scale).store(middle);
  const int64_t mass = min(least_mass(epsilon, all.total), least_mass(__builtin_sqrt(epsilon), middle[0]));
  row.found = double(mass); // exact: a share of one token's mass is below 2^53
  keep_from_mass(row, mass, step.ties);
}

// Removes the tokens that reach the threshold, but for the last of them in the order, for its equals with Ties::keep,
// and for the spared tokens.
inline void xtc(Row& row, const Step& step) {
  row.found = double(random_block(row.task, row.index).word[1] >> 11) * 0x1p-53;
  if (row.found >= step.value[0][row.index]) return;
  fill_masses(row.tokens, row);
  const Tokens& tokens = row.tokens;
  const int64_t mass = max(1, least_mass(step.value[1][row.index], tokens.total, step.equal));
  const Vec<int64_t> least = mass;
  const int64_t top = choose(tokens, row.space, [&](int64_t b) {
    return block_bits(tokens.mass + b * kBlock, [&](Vec<int64_t> w) { return w >= least; });
  });
  if (top < 2) return;
  int64_t last = 0;
  float last_z = __builtin_inff();
  for (int64_t b = 0; b < tokens.blocks(); ++b)
    for (uint64_t found = row.space.chosen[b]; found;) {
      const int64_t i = pop_lowest_bit(found);
      if (tokens.block(b)[i] <= last_z) last = b * kBlock + i, last_z = tokens.block(b)[i];
    }
  for (int64_t i = 0; i < row.task.spared_count; ++i) {
    const int64_t place = place_of(tokens, row.task.spared[i]);
    if (holds(tokens, place, row.task.spared[i])) row.space.chosen[place / kBlock] &= ~(uint64_t(1) << place % kBlock);
  }
  const int64_t count = choose(tokens, row.space, [&](int64_t b) {
    const float* z = tokens.block(b);
    const Vec<float> value = last_z;
    uint64_t stays = ~row.space.chosen[b];
    if (step.ties == Ties::keep) stays |= block_bits(z, [&](Vec<float> x) { return x == value; });
    if (b == last / kBlock) stays |= uint64_t(1) << last % kBlock;
    return stays & ~block_bits(z, [](Vec<float> x) { return x == Vec<float>(-kInfinity); });
  });
  if (count < row.floor) return;
  keep_chosen(row, tokens, count);
  measure_anew(row);
}

// The only list of the stages. Python finds the place of a stage by its name here, and Step::stage is that place.
struct StageKernel {
  const char* name; // the option that asks for it
  void (*run)(Row&, const Step&);
};
constexpr StageKernel kStages[] = {
    {"greedy", greedy},
    {"temperature", temperature},
    {"top_n_sigma", top_n_sigma},
    {"top_k", top_k},
    {"top_p", top_p},
    {"min_p", min_p},
    {"typical_p", typical_p},
    {"epsilon_cutoff", epsilon_cutoff},
    {"eta_cutoff", eta_cutoff},
    {"xtc_probability", xtc},
};
inline const char* stage_name(int64_t stage) {
  return stage >= 0 && stage < int64_t(sizeof kStages / sizeof *kStages) ? kStages[stage].name : nullptr;
}

} // namespace
} // namespace headway
