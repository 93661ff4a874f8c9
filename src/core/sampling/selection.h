// Which tokens of a row stay. Nothing is sorted: top_k and top_p keep a prefix of the order "logit descending, id
// ascending", so that a radix selection finds its end, by counts or by masses, in time linear in V on any input, equal
// logits included. Before it, a sample tells in a long row between which logits that end must lie. The maxima of blocks
// of 64 logits, a by-product of finding the row's maximum, let most rows skip most blocks.
//
// A row may lie in memory of the caller's, where another thread can write to it, so that two looks at a logit differ.
// Any token may come of that, but it is one of the row: no place is a count that another look was to confirm.
#pragma once
#include "weights.h"

namespace headway {
namespace {

// Tokens stay that lie above `value`, and `ties` of those equal to it, after the first `skip` of them.
struct Boundary {
  float value;
  int64_t skip, ties;
};

// Floats to unsigned integers in the same order. Adding 0 makes -0 a +0.
inline Vec<uint32_t> keys(Vec<float> z) {
  const Vec<int32_t> u = bits<int32_t>(z + Vec<float>(0.0f));
  return bits<uint32_t>(u ^ ((u >> 31) | Vec<int32_t>(INT32_MIN)));
}
inline uint32_t key_of(float z) {
  z += 0.0f;
  uint32_t u;
  memcpy(&u, &z, 4);
  return u ^ (uint32_t(int32_t(u) >> 31) | 0x80000000); // without a branch: signs can be anything
}
inline float value_of(uint32_t key) {
  const uint32_t u = key & 0x80000000 ? key ^ 0x80000000 : ~key;
  float z;
  memcpy(&z, &u, 4);
  return z;
}

// The smallest number up to `top` for which `holds` is true, by bisection: it is true for every larger number as well.
template <class Holds> float bisect(float top, Holds holds) {
  uint32_t below = key_of(kNever), enough = key_of(top);
  while (enough - below > 1) {
    const uint32_t middle = below + (enough - below) / 2;
    (holds(value_of(middle)) ? enough : below) = middle;
  }
  return value_of(enough);
}

// Bounds below which no logit has this weight, and from which on every one has it. exp rounds by less than 1e-7, so it
// may be out of order with its argument by that much; 2^-20 of slack is plenty. The weight is at most that of the best.
struct WeightBounds {
  float low, high;
};
HEADWAY_FLATTEN inline WeightBounds bounds_of_weight(const Scale& scale, int64_t weight) {
  const auto reaches = [&](int64_t enough) {
    return bisect(scale.top, [&](float z) {
      int64_t w[16];
      weights(Vec<float>(z), scale).store(w);
      return w[0] >= enough;
    });
  };
  const int64_t slack = (weight >> 20) + 2;
  return {reaches(weight - slack), reaches(weight + slack)};
}

// What a token adds to the sum that is to reach `target`: 1, or its weight.
struct ByCount {
  int64_t operator()(int64_t) const { return 1; }
  Vec<int64_t> lanes(int64_t) const { return int64_t(1); }
  int64_t total(const Tokens& tokens) const { return tokens.n; }
};
struct ByMass {
  const int64_t* weight;
  int64_t operator()(int64_t i) const { return weight[i]; }
  Vec<int64_t> lanes(int64_t i) const { return Vec<int64_t>::load(weight + i); }
  int64_t total(const Tokens& tokens) const { return tokens.total; }
};

template <class Mass>
Boundary select_prefix(const Tokens& tokens, Mass mass, int64_t target, Ties rule, const Workspace& space);

struct Bracket {
  float low, high;
};
// Between which logits the prefix is likely to end, by 16 tokens out of every so many. Nothing but speed depends on it.
template <class Mass>
HEADWAY_NOINLINE Bracket guess_end(const Tokens& tokens, Mass mass, int64_t target, const Workspace& space) {
  Tokens sample;
  Vec<int64_t> total = int64_t(0);
  for (; sample.n < kSample; sample.n += 16) {
    const int64_t i = tokens.n / 16 * sample.n / kSample * 16;
    const Vec<int64_t> m = mass.lanes(i);
    Vec<float>::load(tokens.block(i / kBlock) + i % kBlock).store(space.sample_z + sample.n);
    m.store(space.sample_mass + sample.n);
    total = total + m;
  }
  sample.z = space.sample_z;
  sample.last = sample.z + kSample - kBlock;
  const double all = double(reduce_sum(total)), share = double(target) / double(mass.total(tokens));
  const double spread =
      4 * __builtin_sqrt(share * (1 - share) / kSample); // four standard deviations of a count's share
  const auto end_of = [&](double part) {
    return select_prefix(sample, ByMass{space.sample_mass}, max(1, int64_t(part * all)), Ties::keep, space).value;
  };
  return {share + spread < 1 && all > 0 ? end_of(share + spread) : kNever,
          share > spread && all > 0 ? end_of(share - spread) : -kNever};
}

// Tokens as keys and masses, in space.key and space.mass, in id order.
struct Listed {
  int64_t n, above, inside; // above: the mass of what comes before all of them
};
template <class Mass> HEADWAY_FLATTEN int64_t list_all(const Tokens& tokens, Mass mass, const Workspace& space) {
  for (int64_t b = 0; b < tokens.blocks(); ++b)
    for (int64_t v = b * kBlock; v < (b + 1) * kBlock; v += 16) {
      keys(Vec<float>::load(tokens.block(b) + v % kBlock)).store(space.key + v);
      mass.lanes(v).store(space.mass + v);
    }
  return tokens.n;
}
template <class Mass>
HEADWAY_NOINLINE HEADWAY_FLATTEN Listed list_between(const Tokens& tokens, Mass mass, Bracket bracket,
                                                     const Workspace& space) {
  Listed found[kMaxParts];
  int64_t start[kMaxParts];
  const int64_t parts = split(space.team, tokens.blocks(), kPart, [&](int64_t part, int64_t first, int64_t last) {
    const Vec<float> low = bracket.low, high = bracket.high;
    Vec<int64_t> above = int64_t(0);
    int64_t n = start[part] = first * kBlock, inside = 0;
    for (int64_t b = first; b < last; ++b) {
      const float* z = tokens.block(b);
      uint64_t in = 0;
      for (int64_t v = 0; v < kBlock; v += 16) {
        const Vec<float> x = Vec<float>::load(z + v);
        above = above + (convert<int64_t>(x > high) & mass.lanes(b * kBlock + v));
        in |= lane_bits((x >= low) & (x <= high)) << v;
      }
      if (const int64_t filled = tokens.n - b * kBlock; filled < kBlock) in &= (uint64_t(1) << filled) - 1;
      while (in) {
        const int64_t i = pop_lowest_bit(in);
        space.key[n] = key_of(z[i]);
        inside += space.mass[n++] = mass(b * kBlock + i);
      }
    }
    found[part] = {n - first * kBlock, reduce_sum(above), inside};
  });
  Listed all{0, 0, 0};
  for (int64_t p = 0; p < parts; ++p) {
    memmove(space.key + all.n, space.key + start[p], size_t(found[p].n) * sizeof *space.key);
    memmove(space.mass + all.n, space.mass + start[p], size_t(found[p].n) * sizeof *space.mass);
    all = {all.n + found[p].n, all.above + found[p].above, all.inside + found[p].inside};
  }
  return all;
}

// The end of the shortest prefix, best first, whose sum reaches the target (1 <= target <= the sum of all, of one token
// or more): a radix selection. Each round takes as digit what its keys differ in first, so that keys close together
// take one round.
template <class Mass>
HEADWAY_NOINLINE HEADWAY_FLATTEN Boundary select_prefix(const Tokens& tokens, Mass mass, int64_t target, Ties rule,
                                                        const Workspace& space) {
  int64_t left = 0; // those listed share all digits so far with the one where the sum crosses
  if (tokens.n >= 4 * kSample) {
    const Listed some = list_between(tokens, mass, guess_end(tokens, mass, target, space), space);
    if (some.above < target && target <= some.above + some.inside) left = some.n, target -= some.above;
  }
  if (!left) left = list_all(tokens, mass, space); // a short row, or a wrong guess
  for (;;) {
    uint32_t lowest = ~uint32_t(0), highest = 0;
    for (int64_t i = 0; i < left; ++i) {
      lowest = space.key[i] < lowest ? space.key[i] : lowest;
      highest = space.key[i] > highest ? space.key[i] : highest;
    }
    if (lowest == highest) break;
    const int differ = 32 - __builtin_clz(highest - lowest), bits = left < 2048 ? 8 : 11;
    const int shift = differ > bits ? differ - bits : 0, copies = left < 2048 ? 1 : int(kCopies);
    const auto digit_of = [&](int64_t i) { return (space.key[i] - lowest) >> shift; };
    for (int c = 0; c < copies; ++c)
      for (int64_t i = 0; i < int64_t(1) << bits; ++i) space.histogram[c * kCopySize + i] = 0;
    for (int64_t i = 0; i < left; ++i) space.histogram[(i & (copies - 1)) * kCopySize + digit_of(i)] += space.mass[i];
    uint32_t crossing = (uint32_t(1) << bits) - 1;
    for (;; --crossing) {
      int64_t here = 0;
      for (int c = 0; c < copies; ++c) here += space.histogram[c * kCopySize + crossing];
      if (here >= target || crossing == 0) break; // the lowest has the digit 0, so that some are left either way
      target -= here;
    }
    int64_t taken = 0;
    for (int64_t b = 0; b < left; b += kBlock) {
      const Vec<uint32_t> from = lowest, here = crossing;
      uint64_t found = block_bits(space.key + b, [&](Vec<uint32_t> k) { return (k - from) >> shift == here; });
      if (left - b < kBlock) found &= (uint64_t(1) << (left - b)) - 1;
      for (; found; ++taken) {
        const int64_t i = b + pop_lowest_bit(found);
        space.key[taken] = space.key[i];
        space.mass[taken] = space.mass[i];
      }
    }
    left = taken;
  }
  int64_t ties = 0;
  while (ties < left && target > 0) target -= space.mass[ties++];
  if (rule == Ties::keep) ties = left;
  return {value_of(space.key[0]), rule == Ties::highest_id ? left - ties : 0, ties};
}

inline float kth_largest(const float* z, int64_t n, int64_t k, const Workspace& space) { // z: padded to whole blocks
  Tokens numbers;
  numbers.n = n;
  numbers.z = z;
  numbers.last = z + (numbers.blocks() - 1) * kBlock;
  return select_prefix(numbers, ByCount{}, k, Ties::keep, space).value;
}

// Marking and listing the tokens that stay ------------------------------------------------------------------------

// The tokens above a boundary, a block after another. block_max, where there is one, tells which blocks have none.
struct Inside {
  const Tokens& tokens;
  const float* block_max;
  Boundary end;
  uint64_t operator()(int64_t b) {
    if (block_max && (block_max[b] < end.value || block_max[b] == kNever)) return 0;
    const Vec<float> value = end.value;
    const float* z = tokens.block(b);
    const uint64_t over = block_bits(z, [&](Vec<float> x) { return x > value; });
    if (end.value == kNever) return over; // what is banned is never kept, nor what fills the last block
    uint64_t ties = block_bits(z, [&](Vec<float> x) { return x == value; });
    const int64_t here = __builtin_popcountll(ties), skip = min(end.skip, here), take = min(end.ties, here - skip);
    end.skip -= skip, end.ties -= take;
    if (take == 0) return over;
    for (int64_t i = 0; i < skip; ++i) ties &= ties - 1;
    for (int64_t i = skip + take; i < here; ++i) ties ^= uint64_t(1) << (63 - __builtin_clzll(ties));
    return over | ties;
  }
};

// Marks the tokens that `find(b)` has a bit for in block b, and counts them.
template <class Find> HEADWAY_FLATTEN int64_t choose(const Tokens& tokens, const Workspace& space, Find find) {
  int64_t n = 0;
  for (int64_t b = 0; b < tokens.blocks(); ++b) n += __builtin_popcountll(space.chosen[b] = find(b));
  return n;
}
inline int64_t choose_inside(const Tokens& tokens, const Workspace& space, Boundary end) {
  return choose(tokens, space, Inside{tokens, tokens.id ? nullptr : space.block_max, end});
}

// The list of the chosen tokens; in place where the tokens are a list already.
HEADWAY_FLATTEN inline Tokens list_chosen(const Tokens& tokens, const Workspace& space) {
  Tokens kept;
  for (int64_t b = 0; b < tokens.blocks(); ++b) {
    const float* z = tokens.block(b);
    for (uint64_t found = space.chosen[b]; found; ++kept.n) {
      const int64_t i = pop_lowest_bit(found);
      space.list_z[kept.n] = z[i];
      space.list_id[kept.n] = int32_t(tokens.at(b * kBlock + i));
      if (tokens.weight) kept.total += space.list_weight[kept.n] = tokens.weight[b * kBlock + i];
    }
  }
  kept.z = space.list_z;
  kept.id = space.list_id;
  kept.last = space.list_z + (kept.blocks() - 1) * kBlock;
  if (tokens.weight) kept.weight = space.list_weight;
  for (int64_t i = kept.n; i < kept.blocks() * kBlock; ++i) {
    space.list_z[i] = kNever;
    if (tokens.weight) space.list_weight[i] = 0;
  }
  return kept;
}

// A copy of the whole row, with -inf for all tokens but the chosen.
HEADWAY_FLATTEN inline Tokens remove_others(const Tokens& tokens, const Workspace& space) {
  Tokens kept = tokens;
  kept.z = space.z;
  kept.last = space.z + (kept.blocks() - 1) * kBlock;
  Vec<int64_t> removed = int64_t(0);
  for (int64_t b = 0; b < tokens.blocks(); ++b) {
    const uint64_t chosen = space.chosen[b];
    const float* z = tokens.block(b);
    if (chosen == ~uint64_t(0)) {
      memmove(space.z + b * kBlock, z, kBlock * sizeof(float));
      continue;
    }
    Vec<float> best = kNever;
    for (int64_t v = 0; v < kBlock; v += 16) {
      const Mask<float> in = lane_mask(chosen >> v);
      const Vec<float> x = select(in, Vec<float>::load(z + v), Vec<float>(kNever));
      x.store(space.z + b * kBlock + v);
      best = max(x, best);
      if (!tokens.weight) continue;
      int64_t* weight = tokens.weight + b * kBlock + v;
      const Vec<int64_t> w = Vec<int64_t>::load(weight), stays = select(convert<int64_t>(in), w, Vec<int64_t>(0));
      removed = removed + (w - stays);
      stays.store(weight);
    }
    space.block_max[b] = reduce_max(best);
  }
  kept.total -= reduce_sum(removed);
  return kept;
}

// Few tokens are walked as a list, many as a row with gaps.
inline bool are_few(const Tokens& tokens, int64_t count) { return tokens.id || count < tokens.n / 8; }

} // namespace
} // namespace headway
