// Sampling: one row of logits to a token, to a distribution, to filtered logits.
//
// A row becomes whole numbers, weights = round(2^s exp((z - max z) / T)), by float32 operations that are each rounded
// on their own (no fused ones: NumPy must be able to follow); everything after is exact integer arithmetic, so lanes
// and the order of a sum cannot matter. reference/sampling.py says the same thing in one page.
//
// Nothing is sorted. What top_k and top_p keep is a prefix of the order "logit descending, id ascending", so that a
// radix selection finds its end, by counts or by masses, in time linear in V on any input, equal logits included. The
// maxima of blocks of 64 logits, a by-product of finding the row's maximum, let most rows skip most blocks.
#pragma once
#include "rng.h"
#include "rows.h"

namespace headway {
namespace {

// The functions with the loops over the vocabulary: GCC 12 would call, not inline, their single steps.
#define HEADWAY_FLATTEN __attribute__((flatten))

constexpr int64_t kBlock = 64;   // tokens that share a maximum
constexpr int64_t kStretch = 16; // blocks that share a total
constexpr float kNever = -__builtin_inff();

// The lanes of a mask as bits, lane 0 lowest.
template <class T> uint64_t lane_bits(Vec<T> mask) {
  if constexpr (sizeof(T) == 8) return lane_bits(convert<int32_t>(mask));
#if defined(__AVX512F__)
  return uint64_t(_mm512_movepi32_mask((__m512i)mask.part[0]));
#elif defined(__AVX2__)
  return uint64_t(uint32_t(_mm256_movemask_ps((__m256)mask.part[0]))) |
         uint64_t(uint32_t(_mm256_movemask_ps((__m256)mask.part[1]))) << 8;
#else
  uint64_t found = 0;
  T lane[16];
  mask.store(lane);
  for (int i = 0; i < 16; ++i) found |= uint64_t(lane[i] & 1) << i;
  return found;
#endif
}
inline Vec<int32_t> lane_powers() { // 1, 2, 4, ...
  int32_t power[16];
  for (int i = 0; i < 16; ++i) power[i] = 1 << i;
  return Vec<int32_t>::load(power);
}
// One bit for each token of a block.
template <class T, class Test> uint64_t block_bits(const T* block, Test test) {
  uint64_t found = 0;
  for (int64_t v = 0; v < kBlock; v += 16) found |= lane_bits(test(Vec<T>::load(block + v))) << v;
  return found;
}
inline int64_t take_lowest(uint64_t& found) {
  const int64_t i = __builtin_ctzll(found);
  found &= found - 1;
  return i;
}

// Tokens in id order. Arrays reach to the end of the last block: logits of -inf and weights of 0 fill it up.
struct Tokens {
  int64_t n = 0;
  const float* z = nullptr;
  const float* last = nullptr; // the last block: z's own end, or a padded copy of it
  const int32_t* id = nullptr; // nullptr: token i is i
  int64_t* weight = nullptr;   // nullptr: not weighed yet
  int64_t total = 0;
  int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
  const float* block(int64_t b) const { return b + 1 < blocks() ? z + b * kBlock : last; }
  int64_t at(int64_t i) const { return id ? id[i] : i; }
};

// Four copies of the radix histogram, a cache line out of step: equal digits in a row would wait for each other's sums.
constexpr int64_t kCopies = 4, kCopySize = (1 << 11) + 8;

struct Workspace {
  float *z, *last, *block_max, *list_z, *distance;
  int32_t* list_id;
  int64_t *weight, *list_weight, *mass, *histogram;
  uint32_t* key;
  uint64_t* chosen; // a bit for each token, by blocks

  Workspace(Arena arena, int64_t V, int64_t* bytes = nullptr) {
    const int64_t n = round_up(V, kBlock), blocks = round_up(n / kBlock, kBlock);
    z = arena.take<float>(n);
    last = arena.take<float>(kBlock);
    block_max = arena.take<float>(blocks);
    list_z = arena.take<float>(n);
    distance = arena.take<float>(n);
    list_id = arena.take<int32_t>(n);
    weight = arena.take<int64_t>(n);
    list_weight = arena.take<int64_t>(n);
    mass = arena.take<int64_t>(n);
    key = arena.take<uint32_t>(n);
    chosen = arena.take<uint64_t>(blocks);
    histogram = arena.take<int64_t>(kCopies * kCopySize);
    if (bytes) *bytes = arena.used;
  }
};

// Elementary functions, for the few numbers that need them -------------------------------------------------------

// The same operations in the same order as reference/sampling.py's _log and _exp, and nothing fused.
inline double power_of_two(int64_t n) { // n > -1023
  const int64_t u = (n + 1023) << 52;
  double p;
  memcpy(&p, &u, 8);
  return p;
}
inline double natural_log(double v) { // of a normal number, within three units in the last place
  int64_t u;
  memcpy(&u, &v, 8);
  int64_t e = (u >> 52) - 1023;
  double m = v;
  u = (u & 0xfffffffffffff) | int64_t(1023) << 52;
  memcpy(&m, &u, 8);
  if (m >= 2 * 0x1.6a09e667f3bcdp-1) m = m / 2, ++e;
  const double s = (m - 1) / (m + 1);
  double series = 1.0 / 21;
  for (int k = 19; k > 0; k -= 2) series = series * (s * s) + 1.0 / k;
  return 2 * s * series + double(e) * 0x1.62e42fefa39efp-1;
}
inline double exponential(double y) { // of y <= 0
  if (y < -700) return 0;
  const double round = 0x1.8p+52, n = (y * 0x1.71547652b82fep+0 + round) - round;
  const double r = (y - n * 0x1.62e42fefp-1) - n * 0x1.473de6af278edp-34;
  double series = 1;
  for (int k = 14; k > 0; --k) series = 1 + series * r / k;
  return series * power_of_two(int64_t(n));
}

// Weights --------------------------------------------------------------------------------------------------------

struct Scale {
  float top;       // the row's maximum
  float inverse;   // 1 / T: finite, and 0 rather than subnormal
  int32_t s;       // the largest weight is 2^s, and V of them stay below 2^62
  int64_t one_hot; // temperature 0: the token that has all the mass; else -1
};

inline int32_t scale_bits(int64_t V) {
  int32_t log2_up = 0;
  while ((int64_t(1) << log2_up) < V) ++log2_up;
  return int32_t(least(44, 62 - log2_up));
}

inline float inverse_temperature(double t) {
  const double inverse = 1.0 / t, largest = 0x1.fffffep+127;
  return inverse < 0x1p-126 ? 0.0f : float(inverse > largest ? largest : inverse);
}

// The same operations in the same order as reference/sampling.py's _exponents and _weights.

// x = (z - top) / T, from -40, where the weight is 0 already and where banned tokens are, to 0.
inline Vec<float> exponents(Vec<float> z, const Scale& scale) {
  using F = Vec<float>;
  const F d = larger(z - F(scale.top), F(-0x1.fffffep+127f));
  const F x = larger(d * F(scale.inverse), F(-40.0f));
  return select(z == F(kNever), F(-40.0f), x); // not left to d: with a huge T a banned token's x would be 0
}

// round(2^s exp(x)). exp(r) = 1 + r + r^2 Q(r) on |r| <= ln(2) / 2; Q is a near-minimax fit
// made by tools/polynomials.py. The relative error is below 1e-7.
inline Vec<int64_t> weights_at(Vec<float> x, const Scale& scale) {
  using F = Vec<float>;
  const F round = 0x1.8p+23f; // x + round - round is the integer nearest to x
  const F shifted = x * F(0x1.715476p+0f) + round;
  const F n = shifted - round;
  const F r = (x - n * F(0x1.62ep-1f)) - n * F(0x1.0bfbe8p-15f); // the first product is exact
  F q = 0x1.6d10fcp-10f;
  q = q * r + F(0x1.120b62p-7f);
  q = q * r + F(0x1.55551ap-5f);
  q = q * r + F(0x1.5554dep-3f);
  q = q * r + F(0.5f);
  const F y = (r * r * q + r) + F(1.0f);
  // Times 2^(n + s) by adding to the exponent: the low bits of `shifted` are n in two's complement.
  const F w = bits<float>(bits<int32_t>(y) + ((bits<int32_t>(shifted) + Vec<int32_t>(scale.s)) << 23));
  // From 2^52 on the doubles are whole numbers: adding 2^52 rounds to nearest even and leaves the integer in the low
  // bits.
  const Vec<double> whole = widen(w) + Vec<double>(0x1p+52);
  return bits<int64_t>(whole) - bits<int64_t>(Vec<double>(0x1p+52));
}
inline Vec<int64_t> weights(Vec<float> z, const Scale& scale) { return weights_at(exponents(z, scale), scale); }

HEADWAY_FLATTEN inline Vec<int64_t> block_weights(const float* z, const Scale& scale, Vec<int64_t> (&w)[kBlock / 16]) {
  Vec<int64_t> sum = int64_t(0);
  for (int64_t v = 0; v < kBlock / 16; ++v) {
    w[v] = weights(Vec<float>::load(z + 16 * v), scale);
    sum = sum + w[v];
  }
  return sum;
}

inline void weigh(Tokens& tokens, const Scale& scale, int64_t* out) {
  if (tokens.weight) return;
  tokens.weight = out;
  if (scale.one_hot >= 0) {
    for (int64_t i = 0; i < tokens.blocks() * kBlock; ++i) out[i] = 0;
    for (int64_t i = 0; i < tokens.n; ++i)
      if (tokens.at(i) == scale.one_hot) out[i] = int64_t(1) << scale.s;
    tokens.total = int64_t(1) << scale.s; // the best token outlives every stage
    return;
  }
  Vec<int64_t> total = int64_t(0);
  for (int64_t b = 0; b < tokens.blocks(); ++b) {
    Vec<int64_t> w[kBlock / 16];
    total = total + block_weights(tokens.block(b), scale, w);
    memcpy(out + b * kBlock, w, sizeof w);
  }
  tokens.total = sum(total);
}

// The smallest whole number >= p * total, exactly, for 0 <= p <= 1; > p * total where `equal` is false. p is m 2^-e,
// and the product with m fits 128 bits.
inline int64_t share(double p, int64_t total, bool equal = true) {
  uint64_t u;
  memcpy(&u, &p, 8);
  const int exponent = int(u >> 52); // the sign bit is clear
  const uint64_t m = (u & 0xfffffffffffff) | (exponent ? uint64_t(1) << 52 : 0);
  const int e = 1075 - (exponent ? exponent : 1);
  const Wide product = Wide(m) * uint64_t(total);
  if (e > 127) return product != 0 || !equal;
  return int64_t(product >> e) + ((product & ((Wide(1) << e) - 1)) != 0 || !equal);
}

// Selection ------------------------------------------------------------------------------------------------------

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
inline float value_of(uint32_t key) {
  const uint32_t u = key & 0x80000000 ? key ^ 0x80000000 : ~key;
  float z;
  memcpy(&z, &u, 4);
  return z;
}

// The smallest number up to `top` for which `holds`, which a larger one does too.
template <class Holds> float lowest(float top, Holds holds) {
  uint32_t below, enough, key[16];
  keys(Vec<float>(kNever)).store(key);
  below = key[0];
  keys(Vec<float>(top)).store(key);
  enough = key[0];
  while (enough - below > 1) {
    const uint32_t middle = below + (enough - below) / 2;
    (holds(value_of(middle)) ? enough : below) = middle;
  }
  return value_of(enough);
}

// A bound below which no logit has this weight, for skipping: exp rounds by less than 1e-7, so it may be out of order
// with its argument by that much, and 2^-20 of slack is plenty.
HEADWAY_FLATTEN inline float lowest_of_weight(const Scale& scale, int64_t weight) {
  weight -= (weight >> 20) + 2;
  return lowest(scale.top, [&](float z) {
    int64_t w[16];
    weights(Vec<float>(z), scale).store(w);
    return w[0] >= weight;
  });
}

// Where a token's share of `target` comes from: itself, or its weight.
struct ByCount {
  int64_t operator()(int64_t) const { return 1; }
};
struct ByMass {
  const int64_t* weight;
  int64_t operator()(int64_t i) const { return weight[i]; }
};

// The end of the shortest prefix, best first, whose sum reaches the target (1 <= target <= the sum of all): a radix
// selection. Each round takes as digit what its keys differ in first, so that keys close together take one round.
template <class Mass>
HEADWAY_FLATTEN Boundary select_prefix(const Tokens& tokens, Mass mass, int64_t target, Ties rule,
                                       const Workspace& space) {
  uint32_t key[kBlock], lowest = ~uint32_t(0), highest = 0;
  const auto load_keys = [&](int64_t b) {
    for (int64_t v = 0; v < kBlock; v += 16) keys(Vec<float>::load(tokens.block(b) + v)).store(key + v);
    const int64_t n = least(kBlock, tokens.n - b * kBlock);
    for (int64_t i = n; i < kBlock; ++i) key[i] = key[0]; // what fills the last block widens no range
    return n;
  };
  const auto widen_range = [&](uint32_t k) {
    lowest = k < lowest ? k : lowest;
    highest = k > highest ? k : highest;
  };
  {
    Vec<uint32_t> low = lowest, high = highest;
    for (int64_t b = 0; b < tokens.blocks(); ++b) {
      load_keys(b);
      for (int64_t v = 0; v < kBlock; v += 16) {
        const Vec<uint32_t> k = Vec<uint32_t>::load(key + v);
        low = select(k < low, k, low), high = select(k > high, k, high);
      }
    }
    low.store(key);
    for (int i = 0; i < 16; ++i) widen_range(key[i]);
    high.store(key);
    for (int i = 0; i < 16; ++i) widen_range(key[i]);
  }
  int64_t left = tokens.n; // those that share all digits so far with the one where the sum crosses, in id order
  bool listed = false;     // in space.key and space.mass
  while (lowest < highest) {
    const int differ = 32 - __builtin_clz(highest - lowest), bits = left < 2048 ? 8 : 11;
    const int shift = differ > bits ? differ - bits : 0, copies = left < 2048 ? 1 : int(kCopies);
    const uint32_t base = lowest;
    for (int c = 0; c < copies; ++c)
      for (int64_t i = 0; i < int64_t(1) << bits; ++i) space.histogram[c * kCopySize + i] = 0;
    const auto add = [&](uint32_t k, int64_t i, int64_t m) {
      space.histogram[(i & (copies - 1)) * kCopySize + ((k - base) >> shift)] += m;
    };
    if (listed) {
      for (int64_t i = 0; i < left; ++i) add(space.key[i], i, space.mass[i]);
    } else {
      for (int64_t b = 0; b < tokens.blocks(); ++b) {
        const int64_t n = load_keys(b);
        for (int64_t i = 0; i < n; ++i) add(key[i], i, mass(b * kBlock + i));
      }
    }
    uint32_t digit = uint32_t(1) << bits;
    for (int64_t here = 0; digit-- > 0; target -= here) {
      here = 0;
      for (int c = 0; c < copies; ++c) here += space.histogram[c * kCopySize + digit];
      if (here >= target) break;
    }
    const int64_t many = left;
    left = 0;
    lowest = ~uint32_t(0), highest = 0;
    const auto take = [&](uint32_t k, int64_t m) {
      space.key[left] = k;
      space.mass[left++] = m;
      widen_range(k);
    };
    if (listed) {
      for (int64_t i = 0; i < many; ++i)
        if ((space.key[i] - base) >> shift == digit) take(space.key[i], space.mass[i]);
    } else {
      const Vec<uint32_t> from = base, crossing = digit;
      for (int64_t b = 0; b < tokens.blocks(); ++b) {
        const int64_t n = load_keys(b);
        uint64_t found = block_bits(key, [&](Vec<uint32_t> k) { return (k - from) >> shift == crossing; });
        if (n < kBlock) found &= (uint64_t(1) << n) - 1;
        while (found) {
          const int64_t i = take_lowest(found);
          take(key[i], mass(b * kBlock + i));
        }
      }
      listed = true;
    }
  }
  int64_t ties = 0;
  while (ties < left && target > 0) target -= listed ? space.mass[ties++] : mass(ties++);
  if (rule == Ties::keep) ties = left;
  return {value_of(lowest), rule == Ties::highest_id ? left - ties : 0, ties};
}

inline float kth_largest(const float* z, int64_t n, int64_t k, const Workspace& space) { // z: padded to whole blocks
  Tokens numbers;
  numbers.n = n;
  numbers.z = z;
  numbers.last = z + (numbers.blocks() - 1) * kBlock;
  return select_prefix(numbers, ByCount{}, k, Ties::keep, space).value;
}

// What stays ------------------------------------------------------------------------------------------------------

// Above a boundary, block by block in order. block_max, where there is one, tells what to pass over.
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
    const int64_t here = __builtin_popcountll(ties), skip = least(end.skip, here), take = least(end.ties, here - skip);
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
      const int64_t i = take_lowest(found);
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

// The whole row with all but the chosen banned, in memory of its own.
HEADWAY_FLATTEN inline Tokens ban_others(const Tokens& tokens, const Workspace& space) {
  const Vec<int32_t> lane = lane_powers();
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
    Vec<float> most = kNever;
    for (int64_t v = 0; v < kBlock; v += 16) {
      const Mask<float> in = (Vec<int32_t>(int32_t(chosen >> v & 0xffff)) & lane) != Vec<int32_t>(0);
      const Vec<float> x = select(in, Vec<float>::load(z + v), Vec<float>(kNever));
      x.store(space.z + b * kBlock + v);
      most = larger(x, most);
      if (!tokens.weight) continue;
      int64_t* weight = tokens.weight + b * kBlock + v;
      const Vec<int64_t> w = Vec<int64_t>::load(weight), stays = select(convert<int64_t>(in), w, Vec<int64_t>(0));
      removed = removed + (w - stays);
      stays.store(weight);
    }
    space.block_max[b] = maximum(most);
  }
  kept.total -= sum(removed);
  return kept;
}

// Few tokens are walked as a list, many as a row with gaps.
inline bool are_few(const Tokens& tokens, int64_t count) { return tokens.id || count < tokens.n / 8; }
inline Tokens keep_chosen(const Tokens& tokens, int64_t count, const Workspace& space) {
  return are_few(tokens, count) ? list_chosen(tokens, space) : ban_others(tokens, space);
}

// The row's random numbers: the first word of each draw's block draws, the second of the first is xtc's coin.
inline RandomBlock random_block(const Sampling& task, int64_t index, int64_t draw = 0) {
  if (!task.seed.data) return {}; // nothing but the draw is left to chance, which then has its numbers from the caller
  const uint64_t stream = task.rows_per_stream ? uint64_t(index / task.rows_per_stream) : 0;
  return philox(task.seed[index], stream, task.position[index], uint64_t(draw));
}
inline uint64_t random_word(const Sampling& task, int64_t index, int64_t draw = 0) {
  if (task.uniform.data) return uint64_t(task.uniform[index * task.draws + draw] * 0x1p+64);
  return random_block(task, index, draw).word[0];
}

// Stages ---------------------------------------------------------------------------------------------------------

struct Row {
  const Sampling& task;
  int64_t index;
  const Workspace& space;
  int64_t floor = 1; // what the stage leaves at least, if there are so many
  Scale scale{};
  Tokens tokens{}; // those still in
};

inline void weigh(Tokens& tokens, const Row& row) {
  weigh(tokens, row.scale, tokens.id ? row.space.list_weight : row.space.weight);
}

// Sums over what is not banned. A lane adds the tokens whose id leaves the lane's number modulo 16, in order: a fixed
// order, whatever was removed, for a term of 0 changes no sum.
struct Sums {
  double first, second;
  int64_t count;
};
// term(v, lane values of first, of second) for 16 tokens from the v-th on; what is banned counts as 0.
template <class Term> HEADWAY_FLATTEN Sums sums(const Tokens& tokens, Term term) {
  Vec<double> first = 0.0, second = 0.0;
  Vec<int32_t> present = int32_t(0);
  double lane[2][16] = {};
  for (int64_t b = 0; b < tokens.blocks(); ++b)
    for (int64_t v = 0; v < kBlock; v += 16) {
      const Vec<float> z = Vec<float>::load(tokens.block(b) + v);
      const Mask<float> in = z != Vec<float>(kNever);
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
      for (int64_t i = 0; i < least(16, tokens.n - b * kBlock - v); ++i)
        for (int j = 0; j < 2; ++j) lane[j][tokens.at(b * kBlock + v + i) & 15] += one[j][i];
    }
  if (tokens.id) first = Vec<double>::load(lane[0]), second = Vec<double>::load(lane[1]);
  return {sum(first), sum(second), sum(present)};
}

// The total mass, and the mean of x under the masses: a token's surprise less the entropy is this mean less its x.
struct Moments {
  int64_t total;
  double mean;
  int64_t count;
};
inline Moments moments(Row& row) {
  if (row.scale.one_hot >= 0) weigh(row.tokens, row);
  const Tokens& tokens = row.tokens;
  Vec<int64_t> total = int64_t(0);
  const Sums all = sums(tokens, [&](int64_t v, Vec<float> z, Vec<double>& first, Vec<double>& second) {
    const Vec<float> x = exponents(z, row.scale);
    const Vec<int64_t> w = tokens.weight ? Vec<int64_t>::load(tokens.weight + v) : weights_at(x, row.scale);
    total = total + w;
    // A weight below 2^52 as a double: its bits are the fraction of one in [2^52, 2^53).
    const Vec<double> wide = bits<double>(w + bits<int64_t>(Vec<double>(0x1p+52))) - Vec<double>(0x1p+52);
    first = wide * widen(x);
    second = 0.0;
  });
  const int64_t mass = sum(total);
  return {mass, all.first / double(mass), all.count};
}

inline float best_logit(const Row& row) {
  const bool list = row.tokens.id;
  const int64_t n = list ? row.tokens.n : row.tokens.blocks(); // both lists are filled up with kNever
  Vec<float> top = kNever;
  for (int64_t v = 0; v < n; v += 16)
    top = larger(Vec<float>::load((list ? row.tokens.z : row.space.block_max) + v), top);
  return maximum(top);
}

// The first `n` tokens of the order, or the floor if that is more.
inline void keep_first(Row& row, int64_t n, Ties ties) {
  Tokens& tokens = row.tokens;
  n = most(n, row.floor);
  if (n >= tokens.n) return;
  // n blocks have a maximum of at least the n-th largest maximum, so n tokens do. Fewer blocks have more than that, so
  // few tokens do: either they suffice, or the boundary is that maximum.
  if (!tokens.id && n < tokens.blocks() / 2) {
    const float bound = kth_largest(row.space.block_max, tokens.blocks(), n, row.space);
    const int64_t equal = choose_inside(tokens, row.space, {bound, 0, tokens.n});
    const int64_t over = choose_inside(tokens, row.space, {bound, 0, 0});
    if (over < n) {
      const int64_t need = ties == Ties::keep ? equal - over : least(n, equal) - over;
      const int64_t skip = ties == Ties::highest_id ? equal - over - need : 0;
      const int64_t count = choose_inside(tokens, row.space, {bound, skip, need});
      tokens = keep_chosen(tokens, count, row.space);
      return;
    }
    tokens = keep_chosen(tokens, over, row.space);
  }
  const int64_t count = choose_inside(tokens, row.space, select_prefix(tokens, ByCount{}, n, ties, row.space));
  tokens = keep_chosen(tokens, count, row.space);
}

// The chosen among `few` tokens that hold all of them, or the first of the order where the floor is higher.
inline void keep(Row& row, const Tokens& few, int64_t count, Ties ties) {
  if (count < row.floor) return keep_first(row, row.floor, ties);
  row.tokens = keep_chosen(few, count, row.space);
}

// The tokens that reach a bound, where that is a short list; else all.
inline Tokens reaching(const Row& row, float bound) {
  if (row.tokens.id) return row.tokens;
  const int64_t count = choose_inside(row.tokens, row.space, {bound, 0, row.tokens.n});
  return are_few(row.tokens, count) ? list_chosen(row.tokens, row.space) : row.tokens;
}

// What has at least this weight; where that is too few, the first of the order.
inline void keep_heavy(Row& row, int64_t weight, Ties ties) {
  Tokens few = row.scale.one_hot < 0 ? reaching(row, lowest_of_weight(row.scale, weight)) : row.tokens;
  weigh(few, row);
  const int64_t count = choose(few, row.space, [&](int64_t b) {
    const Vec<int64_t> least_weight = weight;
    const uint64_t banned = block_bits(few.block(b), [](Vec<float> z) { return z == Vec<float>(kNever); });
    return block_bits(few.weight + b * kBlock, [&](Vec<int64_t> w) { return w >= least_weight; }) & ~banned;
  });
  keep(row, few, count, ties);
}

// After a stage that may take the best token: where it did, masses are measured anew, with 2^s for the best one left.
inline void measure_anew(Row& row) {
  const float best = best_logit(row);
  if (best == row.scale.top) return;
  row.scale.top = best;
  row.tokens.weight = nullptr;
}

// Measures masses at a temperature; the best of those left has 2^s.
inline void measure(Row& row, double temperature) {
  Tokens& tokens = row.tokens;
  Scale& scale = row.scale;
  tokens.weight = nullptr;
  scale.top = best_logit(row);
  scale.inverse = inverse_temperature(temperature);
  scale.one_hot = -1;
  for (int64_t b = 0; temperature == 0 && scale.one_hot < 0; ++b) {
    if (!tokens.id && row.space.block_max[b] != scale.top) continue;
    const Vec<float> top = scale.top;
    uint64_t found = block_bits(tokens.block(b), [&](Vec<float> z) { return z == top; });
    if (found) scale.one_hot = tokens.at(b * kBlock + take_lowest(found));
  }
}

inline void greedy(Row& row, const Step& step) {
  if (step.value[0][row.index] == 0) measure(row, 0);
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
    t = low + (high - low) * (entropy < 0x1p-1022 ? 0 : exponential(step.value[2][row.index] * natural_log(entropy)));
  }
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
  const double below = n * (variance > 0 ? __builtin_sqrt(variance) : 0);
  const float bound = lowest(float(top), [&](float z) { return double(z) - top >= -below; });
  keep(row, row.tokens, choose_inside(row.tokens, row.space, {bound, 0, row.tokens.n}), step.ties);
}

inline void top_k(Row& row, const Step& step) {
  const double k = step.value[0][row.index];
  if (k < double(row.tokens.n)) keep_first(row, int64_t(k), step.ties);
}

HEADWAY_FLATTEN inline int64_t mass_reaching(const Row& row, float bound) {
  const Vec<float> value = bound;
  Vec<int64_t> mass = int64_t(0);
  for (int64_t b = 0; b < row.tokens.blocks(); ++b)
    for (int64_t v = 0; v < kBlock && row.space.block_max[b] >= bound; v += 16) {
      const Mask<float> in = Vec<float>::load(row.tokens.block(b) + v) >= value;
      mass = mass + (convert<int64_t>(in) & Vec<int64_t>::load(row.tokens.weight + b * kBlock + v));
    }
  return sum(mass);
}

inline void top_p(Row& row, const Step& step) {
  const double p = step.value[0][row.index];
  if (p == 1.0) return;
  weigh(row.tokens, row);
  const int64_t target = share(p, row.tokens.total, !step.equal), blocks = row.tokens.blocks();
  if (target == 0) return keep_first(row, row.floor, step.ties);
  // On most rows a few tokens hold the mass: try those that reach the k-th largest block maximum, for growing k.
  Tokens few = row.tokens;
  for (int64_t k = 8; !few.id && k < blocks / 2; k *= 8) {
    const float bound = kth_largest(row.space.block_max, blocks, k, row.space);
    if (mass_reaching(row, bound) < target) continue;
    few = reaching(row, bound);
    break;
  }
  const Boundary end = select_prefix(few, ByMass{few.weight}, target, step.ties, row.space);
  keep(row, few, choose_inside(few, row.space, end), step.ties);
}

inline void min_p(Row& row, const Step& step) {
  const double p = step.value[0][row.index];
  if (p == 0.0) return;
  keep_heavy(row, share(p, int64_t(1) << row.scale.s), step.ties);
}

inline void typical_p(Row& row, const Step& step) {
  const double p = step.value[0][row.index];
  if (p == 1.0) return;
  weigh(row.tokens, row);
  const Vec<float> mean = float(moments(row).mean), zero = 0.0f;
  float* distance = row.space.distance; // negative, so that the nearest are the best
  for (int64_t b = 0; b < row.tokens.blocks(); ++b)
    for (int64_t v = 0; v < kBlock; v += 16) {
      const Vec<float> z = Vec<float>::load(row.tokens.block(b) + v), apart = exponents(z, row.scale) - mean;
      select(z == Vec<float>(kNever), z, select(apart > zero, zero - apart, apart)).store(distance + b * kBlock + v);
    }
  Tokens by_distance = row.tokens;
  by_distance.z = distance;
  by_distance.last = distance + (by_distance.blocks() - 1) * kBlock;
  const auto choose_near = [&](Boundary end) {
    return choose(by_distance, row.space, Inside{by_distance, nullptr, end});
  };
  const int64_t target = share(p, row.tokens.total, !step.equal), floor = least(row.floor, row.tokens.n);
  int64_t count = 0;
  if (target > 0)
    count = choose_near(select_prefix(by_distance, ByMass{row.tokens.weight}, target, step.ties, row.space));
  if (count < floor) count = choose_near(select_prefix(by_distance, ByCount{}, floor, Ties::lowest_id, row.space));
  row.tokens = keep_chosen(row.tokens, count, row.space);
  measure_anew(row);
}

inline void epsilon_cutoff(Row& row, const Step& step) {
  const double epsilon = step.value[0][row.index];
  if (epsilon > 0) keep_heavy(row, share(epsilon, moments(row).total), step.ties);
}

// exp(-entropy) of the total is the mass that a token at the mean of x would have.
inline void eta_cutoff(Row& row, const Step& step) {
  const double epsilon = step.value[0][row.index];
  if (epsilon == 0.0) return;
  const Moments all = moments(row);
  int64_t middle[16];
  weights_at(Vec<float>(float(all.mean)), row.scale).store(middle);
  keep_heavy(row, least(share(epsilon, all.total), share(__builtin_sqrt(epsilon), middle[0])), step.ties);
}

// Of the tokens that reach the threshold all but the last of the order go (Ties::keep: all but its equals).
inline void xtc(Row& row, const Step& step) {
  const uint64_t coin = random_block(row.task, row.index).word[1];
  if (double(coin >> 11) * 0x1p-53 >= step.value[0][row.index]) return;
  weigh(row.tokens, row);
  const Tokens& tokens = row.tokens;
  const int64_t weight = most(1, share(step.value[1][row.index], tokens.total, step.equal));
  const Vec<int64_t> least_weight = weight;
  const int64_t top = choose(tokens, row.space, [&](int64_t b) {
    return block_bits(tokens.weight + b * kBlock, [&](Vec<int64_t> w) { return w >= least_weight; });
  });
  if (top < 2) return;
  int64_t last = 0;
  float last_z = __builtin_inff();
  for (int64_t b = 0; b < tokens.blocks(); ++b)
    for (uint64_t found = row.space.chosen[b]; found;) {
      const int64_t i = take_lowest(found);
      if (tokens.block(b)[i] <= last_z) last = b * kBlock + i, last_z = tokens.block(b)[i];
    }
  const int64_t count = choose(tokens, row.space, [&](int64_t b) {
    const float* z = tokens.block(b);
    const Vec<float> value = last_z;
    uint64_t stays = ~row.space.chosen[b];
    if (step.ties == Ties::keep) stays |= block_bits(z, [&](Vec<float> x) { return x == value; });
    if (b == last / kBlock) stays |= uint64_t(1) << last % kBlock;
    return stays & ~block_bits(z, [](Vec<float> x) { return x == Vec<float>(kNever); });
  });
  if (count < row.floor) return;
  row.tokens = keep_chosen(tokens, count, row.space);
  measure_anew(row);
}

using RunStage = void (*)(Row&, const Step&);
constexpr RunStage kStages[] = {greedy, temperature, top_n_sigma,    top_k,      top_p,
                                min_p,  typical_p,   epsilon_cutoff, eta_cutoff, xtc};
static_assert(sizeof kStages / sizeof *kStages == size_t(Stage::count));

// The row's way through ------------------------------------------------------------------------------------------

// -inf for what is not allowed, in a row that is filled up to whole blocks.
HEADWAY_FLATTEN inline void ban(const Sampling& task, int64_t index, float* z) {
  const int64_t stride = task.allowed.stride[0];
  const uint8_t* allowed =
      static_cast<const uint8_t*>(task.allowed.data) + batch_offset(task.batch, task.allowed, index);
  if (task.packed) {
    const Vec<int32_t> bit = lane_powers();
    for (int64_t v = 0; v < task.V; v += 16) { // two bytes: a mask has whole words of four
      const Vec<int32_t> bytes = int32_t(allowed[v / 8 * stride] | allowed[(v / 8 + 1) * stride] << 8);
      select((bytes & bit) != Vec<int32_t>(0), Vec<float>::load(z + v), Vec<float>(kNever)).store(z + v);
    }
  } else if (stride == 1) { // apart from the general loop, for the compiler to make vectors of
    for (int64_t i = 0; i < task.V; ++i) z[i] = allowed[i] ? z[i] : kNever;
  } else {
    for (int64_t i = 0; i < task.V; ++i) z[i] = allowed[i * stride] ? z[i] : kNever;
  }
}

// The row as float32 with edits, the bias added and -inf for what is not allowed: the caller's memory if it is just
// that.
inline const float* scores(const Sampling& task, int64_t index, const Workspace& space) {
  const char* logits = address(task.logits, batch_offset(task.batch, task.logits, index));
  const Edits& edits = task.edits;
  const bool changed = task.bias.data || task.allowed.data || (edits.count && edits.count[index]);
  if (task.logits.dtype == DType::f32 && task.logits.stride[0] == 1 && !changed)
    return reinterpret_cast<const float*>(logits);
  read_row(logits, task.logits.dtype, task.logits.stride[0], task.V, space.z);
  if (edits.count) {
    const int64_t first = index * edits.capacity;
    for (int64_t i = first; i < first + edits.count[index]; ++i) space.z[edits.id[i]] = float(edits.logit[i]);
  }
  if (task.bias.data) {
    const float* bias = reinterpret_cast<const float*>(address(task.bias, batch_offset(task.batch, task.bias, index)));
    for (int64_t i = 0; i < task.V; ++i) space.z[i] += bias[i * task.bias.stride[0]];
  }
  if (task.allowed.data) ban(task, index, space.z);
  return space.z;
}

// The maxima of all blocks, and the row's; NaN where a logit is NaN.
HEADWAY_FLATTEN inline float survey(const Tokens& tokens, float* block_max) {
  Mask<float> nan = int32_t(0);
  float top = kNever;
  for (int64_t b = 0; b < tokens.blocks(); ++b) {
    const float* z = tokens.block(b);
    Vec<float> most = Vec<float>::load(z);
    nan = nan | (most != most);
    for (int64_t v = 16; v < kBlock; v += 16) {
      const Vec<float> x = Vec<float>::load(z + v);
      nan = nan | (x != x);
      most = larger(x, most);
    }
    block_max[b] = maximum(most);
    if (block_max[b] > top) top = block_max[b];
  }
  for (int64_t b = tokens.blocks(); b % kBlock; ++b) block_max[b] = kNever;
  return any(nan) ? __builtin_nanf("") : top;
}

// What is wrong with a row whose maximum is NaN or infinite, and the first token that shows it.
inline int64_t diagnose(const Sampling& task, int64_t index, const float* z) {
  const int64_t offset = batch_offset(task.batch, task.logits, index);
  for (int64_t i = 0; i < task.V; ++i) {
    if (z[i] < -kNever) continue;
    double logit = 0; // as given: what overflows may do so in float32 or with the bias
    read_row(address(task.logits, offset, i), task.logits.dtype, 1, 1, &logit);
    const SamplingFault fault = logit != logit     ? SamplingFault::nan
                                : logit == -kNever ? SamplingFault::infinite
                                                   : SamplingFault::overflow;
    return i * kSamplingFaults + int64_t(fault);
  }
  return int64_t(SamplingFault::empty);
}

// The first token, in id order, at which the running sum exceeds `target`.
HEADWAY_FLATTEN inline int64_t token_at(const Tokens& tokens, int64_t target) {
  for (int64_t b = 0; b < tokens.blocks(); ++b) {
    const int64_t* w = tokens.weight + b * kBlock;
    Vec<int64_t> lanes = int64_t(0);
    for (int64_t v = 0; v < kBlock; v += 16) lanes = lanes + Vec<int64_t>::load(w + v);
    const int64_t here = sum(lanes);
    if (here <= target) {
      target -= here;
      continue;
    }
    for (int64_t i = 0;; ++i) {
      if (w[i] > target) return tokens.at(b * kBlock + i);
      target -= w[i];
    }
  }
  return -1; // not reached: the target is below the total
}

// Several draws: from the blocks' masses, so that none looks at the whole vocabulary.
inline void draw_several(Row& row) {
  const Sampling& task = row.task;
  int64_t* weight = row.tokens.weight;
  int64_t *block_mass = row.space.mass, total = row.tokens.total, drawable = 0;
  for (int64_t b = 0; b < row.tokens.blocks(); ++b) {
    block_mass[b] = 0;
    for (int64_t i = b * kBlock; i < (b + 1) * kBlock; ++i) {
      block_mass[b] += weight[i];
      drawable += weight[i] > 0;
    }
  }
  if (!task.replacement && drawable < task.draws) {
    task.status[row.index] = drawable * kSamplingFaults + int64_t(SamplingFault::few);
    return;
  }
  for (int64_t draw = 0; draw < task.draws; ++draw) {
    int64_t target = int64_t(high_product(random_word(task, row.index, draw), uint64_t(total))), b = 0;
    while (block_mass[b] <= target) target -= block_mass[b++];
    int64_t i = b * kBlock;
    while (weight[i] <= target) target -= weight[i++];
    task.tokens[row.index * task.draws + draw] = row.tokens.at(i);
    if (task.replacement) continue;
    total -= weight[i];
    block_mass[b] -= weight[i];
    weight[i] = 0;
  }
}

// Every token is still in and nothing but the token is asked for: totals of stretches, then one stretch once more, so
// that no weight is written to memory.
inline int64_t draw_unfiltered(const Tokens& tokens, const Scale& scale, uint64_t word, int64_t* totals) {
  const int64_t blocks = tokens.blocks(), stretches = (blocks + kStretch - 1) / kStretch;
  Vec<int64_t> w[kBlock / 16];
  int64_t total = 0;
  for (int64_t t = 0; t < stretches; ++t) {
    Vec<int64_t> lanes = int64_t(0);
    for (int64_t b = t * kStretch; b < least(blocks, (t + 1) * kStretch); ++b)
      lanes = lanes + block_weights(tokens.block(b), scale, w);
    total += totals[t] = sum(lanes);
  }
  int64_t target = int64_t(high_product(word, uint64_t(total))), t = 0;
  while (totals[t] <= target) target -= totals[t++];
  for (int64_t b = t * kStretch;; ++b) {
    const int64_t here = sum(block_weights(tokens.block(b), scale, w));
    if (here <= target) {
      target -= here;
      continue;
    }
    int64_t one[kBlock];
    memcpy(one, w, sizeof w);
    for (int64_t i = 0;; ++i) {
      if (one[i] > target) return b * kBlock + i;
      target -= one[i];
    }
  }
}

template <class T> void write_probabilities(const Tokens& tokens, int64_t V, T* out) {
  const double total = double(tokens.total);
  if (tokens.id)
    for (int64_t i = 0; i < V; ++i) out[i] = 0;
  for (int64_t i = 0; i < tokens.n; ++i) out[tokens.at(i)] = T(double(tokens.weight[i]) / total);
}

template <class T> void write_filtered(const Row& row, T removed) {
  const Sampling& task = row.task;
  const int64_t logits = batch_offset(task.batch, task.logits, row.index);
  const int64_t bias = task.bias.data ? batch_offset(task.batch, task.bias, row.index) : 0;
  T* out = static_cast<T*>(task.filtered) + row.index * task.V;
  for (int64_t i = 0; i < task.V; ++i) out[i] = removed;
  for (int64_t i = 0; i < row.tokens.n; ++i) {
    const float z = row.tokens.z[i];
    if (z == kNever) continue;
    const int64_t token = row.tokens.at(i);
    const char* given = address(task.logits, logits, token);
    T* to = out + token;
    if (!task.bias.data)
      memcpy(to, given, sizeof(T));
    else if constexpr (sizeof(T) == 8)
      *to = *reinterpret_cast<const double*>(given) +
            double(*reinterpret_cast<const float*>(address(task.bias, bias, token)));
    else
      write_row(&z, 1, to, task.logits.dtype);
  }
}
inline void write_filtered(const Row& row) {
  switch (row.task.logits.dtype) {
  case DType::f64: return write_filtered<double>(row, kNever);
  case DType::f32: return write_filtered<float>(row, kNever);
  default: return write_filtered<uint16_t>(row, row.task.logits.dtype == DType::f16 ? 0xfc00 : 0xff80);
  }
}

inline Plan plan_sampling(const Sampling& task, int64_t) {
  Plan plan{task.batch.size(), 0, rough_product(task.batch.size(), task.V, 8)};
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
  for (int64_t i = 0; i < kBlock; ++i) space.last[i] = whole + i < task.V ? tokens.z[whole + i] : kNever;
  tokens.last = space.last;

  Scale& scale = row.scale;
  scale.top = survey(tokens, space.block_max);
  if (!(scale.top > kNever && scale.top < -kNever)) {
    task.status[row.index] = diagnose(task, row.index, tokens.z);
    return false;
  }
  task.status[row.index] = 0;
  scale.s = scale_bits(task.V);
  measure(row, 1);
  return true;
}

// All stages; where the token is all that is asked for, those up to the one that leaves no choice.
inline void filter(Row& row, bool token_only = false) {
  for (int64_t i = 0; i < row.task.step_count; ++i) {
    const Step& step = row.task.steps[i];
    row.floor = step.floor ? row.task.min_tokens[row.index] : 1;
    kStages[int(step.stage)](row, step);
    if (token_only && row.scale.one_hot >= 0) return; // it outlives every stage that follows
  }
}

inline void run_sampling(const Sampling& task, const Plan&, int64_t index, Memory memory) {
  const Workspace space(Arena{static_cast<char*>(memory.own)}, task.V);
  Row row{task, index, space};
  if (!begin(row)) return;
  const Tokens& tokens = row.tokens;
  const bool token_only = !task.probabilities && !task.filtered && task.draws == 1;
  filter(row, token_only);

  if (token_only && row.scale.one_hot >= 0) {
    task.tokens[index] = row.scale.one_hot;
    return;
  }
  if (task.filtered) write_filtered(row);
  if (token_only && !tokens.id && !tokens.weight) {
    task.tokens[index] = draw_unfiltered(tokens, row.scale, random_word(task, index), space.mass);
    return;
  }
  if (task.tokens || task.probabilities) weigh(row.tokens, row);
  if (task.tokens && task.draws == 1)
    task.tokens[index] = token_at(tokens, int64_t(high_product(random_word(task, index), uint64_t(tokens.total))));
  else if (task.tokens)
    draw_several(row);
  if (task.probabilities) {
    if (task.logits.dtype == DType::f64)
      write_probabilities(tokens, task.V, static_cast<double*>(task.probabilities) + index * task.V);
    else
      write_probabilities(tokens, task.V, static_cast<float*>(task.probabilities) + index * task.V);
  }
}

} // namespace
} // namespace headway
