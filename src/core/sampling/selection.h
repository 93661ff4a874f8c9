// The tokens of a row that a stage keeps. top_k and top_p keep a prefix of the order "logit descending, id ascending".
// Nothing is sorted: a radix selection finds the end of the prefix, by counts or by masses, in time linear in V on any
// input, equal logits included. In a long row a sample first says between which two logits the end lies. The row's
// maximum is found by way of the maxima of blocks of 64 logits, and later loops skip the blocks whose maximum is too
// low.
//
// A row may lie in the caller's memory, where another thread can write to it, so that two reads of a logit differ. Any
// token may be drawn then, but a token of the row: no read relies on a count that an earlier read has made.
#pragma once
#include "masses.h"

namespace headway {
namespace {

// The end of a prefix: it has the tokens above `value`, and of those equal to it, in the order of ids, `ties` after the
// first `skip`.
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

// The smallest number up to `top` for which `holds` is true, by bisection. `holds` must be true for all larger numbers.
template <class Holds> float bisect(float top, Holds holds) {
  uint32_t below = key_of(-kInfinity), enough = key_of(top);
  while (enough - below > 1) {
    const uint32_t middle = below + (enough - below) / 2;
    (holds(value_of(middle)) ? enough : below) = middle;
  }
  return value_of(enough);
}

// Two bounds: no logit below `low` has this mass, and every logit from `high` on has it. The computed exp is off by
// less than 1e-7 and may fall where its argument rises, by that much; a slack of 2^-20 is enough. The mass is at most
// that of the best token.
struct MassBounds {
  float low, high;
};
HEADWAY_FLATTEN inline MassBounds bounds_of_mass(const Scale& scale, int64_t mass) {
  const auto reaches = [&](int64_t enough) {
    return bisect(scale.top, [&](float z) {
      int64_t w[16];
      masses(Vec<float>(z), scale).store(w);
      return w[0] >= enough;
    });
  };
  const int64_t slack = (mass >> 20) + 2;
  return {reaches(mass - slack), reaches(mass + slack)};
}

// The number that a token adds to the sum that the prefix must reach: 1, or its mass.
struct ByCount {
  int64_t operator()(int64_t) const { return 1; }
  Vec<int64_t> lanes(int64_t) const { return int64_t(1); }
  int64_t total(const Tokens& tokens) const { return tokens.n; }
};
struct ByMass {
  const int64_t* mass;
  int64_t operator()(int64_t i) const { return mass[i]; }
  Vec<int64_t> lanes(int64_t i) const { return Vec<int64_t>::load(mass + i); }
  int64_t total(const Tokens& tokens) const { return tokens.total; }
};

template <class Mass>
Boundary select_prefix(const Tokens& tokens, Mass mass, int64_t target, Ties rule, const Workspace& space);

struct Bracket {
  float low, high;
};
// Guesses two logits between which the prefix ends, from a sample: 16 neighbours at regular distances. A wrong guess
// costs time and changes no result.
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
  return {share + spread < 1 && all > 0 ? end_of(share + spread) : -kInfinity,
          share > spread && all > 0 ? end_of(share - spread) : kInfinity};
}

// Tokens as keys and masses, in space.key and space.key_mass, in the order of ids.
struct Listed {
  int64_t n, above, inside; // the number of tokens; the mass of the tokens above all of them; their own mass
};
template <class Mass> HEADWAY_FLATTEN int64_t list_all(const Tokens& tokens, Mass mass, const Workspace& space) {
  for (int64_t b = 0; b < tokens.blocks(); ++b)
    for (int64_t v = b * kBlock; v < (b + 1) * kBlock; v += 16) {
      keys(Vec<float>::load(tokens.block(b) + v % kBlock)).store(space.key + v);
      mass.lanes(v).store(space.key_mass + v);
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
        inside += space.key_mass[n++] = mass(b * kBlock + i);
      }
    }
    found[part] = {n - first * kBlock, reduce_sum(above), inside};
  });
  Listed all{0, 0, 0};
  for (int64_t p = 0; p < parts; ++p) {
    memmove(space.key + all.n, space.key + start[p], size_t(found[p].n) * sizeof *space.key);
    memmove(space.key_mass + all.n, space.key_mass + start[p], size_t(found[p].n) * sizeof *space.key_mass);
    all = {all.n + found[p].n, all.above + found[p].above, all.inside + found[p].inside};
  }
  return all;
}

// The end of the shortest prefix whose sum reaches the target, from 1 to the sum of all tokens; there is at least one
// token. A radix selection: the digit of a round begins at the highest bit in which its keys differ, so that keys that
// are close together take one round.
template <class Mass>
HEADWAY_NOINLINE HEADWAY_FLATTEN Boundary select_prefix(const Tokens& tokens, Mass mass, int64_t target, Ties rule,
                                                        const Workspace& space) {
  int64_t left = 0; // the number of listed keys: they have all digits so far in common with the last of the prefix
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
    for (int64_t i = 0; i < left; ++i)
      space.histogram[(i & (copies - 1)) * kCopySize + digit_of(i)] += space.key_mass[i];
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
        space.key_mass[taken] = space.key_mass[i];
      }
    }
    left = taken;
  }
  int64_t ties = 0;
  while (ties < left && target > 0) target -= space.key_mass[ties++];
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

// Returns for one block after another the bits of the tokens of a prefix. With block_max it skips blocks that have
// none.
struct Inside {
  const Tokens& tokens;
  const float* block_max;
  Boundary end;
  uint64_t operator()(int64_t b) {
    if (block_max && (block_max[b] < end.value || block_max[b] == -kInfinity)) return 0;
    const Vec<float> value = end.value;
    const float* z = tokens.block(b);
    const uint64_t over = block_bits(z, [&](Vec<float> x) { return x > value; });
    if (end.value == -kInfinity) return over; // what is banned is never kept, nor what fills the last block
    uint64_t ties = block_bits(z, [&](Vec<float> x) { return x == value; });
    const int64_t here = __builtin_popcountll(ties), skip = min(end.skip, here), take = min(end.ties, here - skip);
    end.skip -= skip, end.ties -= take;
    if (take == 0) return over;
    for (int64_t i = 0; i < skip; ++i) ties &= ties - 1;
    for (int64_t i = skip + take; i < here; ++i) ties ^= uint64_t(1) << (63 - __builtin_clzll(ties));
    return over | ties;
  }
};

// Marks the tokens whose bits find(b) returns for block b, and returns their number.
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
      if (tokens.mass) kept.total += space.list_mass[kept.n] = tokens.mass[b * kBlock + i];
    }
  }
  kept.z = space.list_z;
  kept.id = space.list_id;
  kept.last = space.list_z + (kept.blocks() - 1) * kBlock;
  if (tokens.mass) kept.mass = space.list_mass;
  for (int64_t i = kept.n; i < kept.blocks() * kBlock; ++i) {
    space.list_z[i] = -kInfinity;
    if (tokens.mass) space.list_mass[i] = 0;
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
    Vec<float> best = -kInfinity;
    for (int64_t v = 0; v < kBlock; v += 16) {
      const Mask<float> in = lane_mask(chosen >> v);
      const Vec<float> x = select(in, Vec<float>::load(z + v), Vec<float>(-kInfinity));
      x.store(space.z + b * kBlock + v);
      best = max(x, best);
      if (!tokens.mass) continue;
      int64_t* mass = tokens.mass + b * kBlock + v;
      const Vec<int64_t> w = Vec<int64_t>::load(mass), stays = select(convert<int64_t>(in), w, Vec<int64_t>(0));
      removed = removed + (w - stays);
      stays.store(mass);
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
