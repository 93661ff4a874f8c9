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
  static_assert(sizeof(T) == 4);
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
  float *z, *last, *block_max, *list_z;
  int32_t* list_id;
  int64_t *weight, *list_weight, *mass, *histogram;
  uint32_t* key;

  Workspace(Arena arena, int64_t V, int64_t* bytes = nullptr) {
    const int64_t n = round_up(V, kBlock), blocks = round_up(n / kBlock, kBlock);
    z = arena.take<float>(n);
    last = arena.take<float>(kBlock);
    block_max = arena.take<float>(blocks);
    list_z = arena.take<float>(n);
    list_id = arena.take<int32_t>(n);
    weight = arena.take<int64_t>(n);
    list_weight = arena.take<int64_t>(n);
    mass = arena.take<int64_t>(n);
    key = arena.take<uint32_t>(n);
    histogram = arena.take<int64_t>(kCopies * kCopySize);
    if (bytes) *bytes = arena.used;
  }
};

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

// The same operations in the same order as reference/sampling.py's _weights. exp(r) = 1 + r + r^2 Q(r) on |r| <= ln(2)
// / 2; Q is a near-minimax fit made by tools/polynomials.py. The relative error is below 1e-7.
inline Vec<int64_t> weights(Vec<float> z, const Scale& scale) {
  using F = Vec<float>;
  const F round = 0x1.8p+23f; // x + round - round is the integer nearest to x
  const F d = larger(z - F(scale.top), F(-0x1.fffffep+127f));
  const F x = larger(d * F(scale.inverse), F(-40.0f)); // there the weight is 0 already
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
  F w = bits<float>(bits<int32_t>(y) + ((bits<int32_t>(shifted) + Vec<int32_t>(scale.s)) << 23));
  w = select(z == F(kNever), F(0.0f), w); // not left to x: with a huge T a banned token's x is 0
  // From 2^52 on the doubles are whole numbers: adding 2^52 rounds to nearest even and leaves the integer in the low
  // bits.
  const Vec<double> whole = widen(w) + Vec<double>(0x1p+52);
  return bits<int64_t>(whole) - bits<int64_t>(Vec<double>(0x1p+52));
}

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

// The smallest whole number >= p * total, exactly, for 0 <= p <= 1: p is m 2^-e, and the product with m fits 128 bits.
inline int64_t share(double p, int64_t total) {
  uint64_t u;
  memcpy(&u, &p, 8);
  const int exponent = int(u >> 52); // the sign bit is clear
  const uint64_t m = (u & 0xfffffffffffff) | (exponent ? uint64_t(1) << 52 : 0);
  const int e = 1075 - (exponent ? exponent : 1);
  const Wide product = Wide(m) * uint64_t(total);
  if (e > 127) return product != 0;
  return int64_t((product >> e) + ((product & ((Wide(1) << e) - 1)) != 0));
}

// Selection ------------------------------------------------------------------------------------------------------

// Tokens stay that lie above `value`, and the first `ties` of those equal to it.
struct Boundary {
  float value;
  int64_t ties;
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

// A bound below which no logit has this weight, for skipping: exp rounds by less than 1e-7, so it may be out of order
// with its argument by that much, and 2^-20 of slack is plenty.
HEADWAY_FLATTEN inline float lowest_of_weight(const Scale& scale, int64_t weight) {
  uint32_t below, enough, key[16];
  keys(Vec<float>(kNever)).store(key);
  below = key[0];
  keys(Vec<float>(scale.top)).store(key);
  enough = key[0];
  weight -= (weight >> 20) + 2;
  while (enough - below > 1) {
    const uint32_t middle = below + (enough - below) / 2;
    int64_t w[16];
    weights(Vec<float>(value_of(middle)), scale).store(w);
    (w[0] >= weight ? enough : below) = middle;
  }
  return value_of(below);
}

// Where a token's share of `target` comes from: itself, or its weight.
struct ByCount {
  int64_t operator()(int64_t) const { return 1; }
};
struct ByMass {
  const int64_t* weight;
  int64_t operator()(int64_t i) const { return weight[i]; }
};

// Which digit of the radix the running sum from above first reaches `target` in; `target` becomes what is left of it
// there.
struct Digits {
  int bits, copies;
  int64_t* histogram;
  void clear() const {
    for (int c = 0; c < copies; ++c)
      for (int64_t i = 0; i < int64_t(1) << bits; ++i) histogram[c * kCopySize + i] = 0;
  }
  void add(uint32_t digit, int64_t i, int64_t mass) const { histogram[(i & (copies - 1)) * kCopySize + digit] += mass; }
  uint32_t crossing(int64_t& target) const {
    for (uint32_t digit = uint32_t(1) << bits; digit-- > 0;) {
      int64_t here = 0;
      for (int c = 0; c < copies; ++c) here += histogram[c * kCopySize + digit];
      if (here >= target) return digit;
      target -= here;
    }
    return 0; // not reached: the target is at most the total
  }
};

// The end of the shortest prefix, best first, whose sum reaches the target (1 <= target <= the sum of all).
template <class Mass>
HEADWAY_FLATTEN Boundary select_prefix(const Tokens& tokens, Mass mass, int64_t target, const Workspace& space) {
  const bool few = tokens.n < 2048;
  const Digits digits{few ? 8 : 11, few ? 1 : int(kCopies), space.histogram};
  int shift = few ? 24 : 21;
  uint32_t key[kBlock];
  const auto load_keys = [&](int64_t b) {
    for (int64_t v = 0; v < kBlock; v += 16) keys(Vec<float>::load(tokens.block(b) + v)).store(key + v);
    return least(kBlock, tokens.n - b * kBlock);
  };
  digits.clear();
  for (int64_t b = 0; b < tokens.blocks(); ++b) {
    const int64_t n = load_keys(b);
    for (int64_t i = 0; i < n; ++i) digits.add(key[i] >> shift, i, mass(b * kBlock + i));
  }
  uint32_t digit = digits.crossing(target);
  int64_t left = 0; // tokens that share all digits so far with the crossing one, in id order
  for (int64_t b = 0; b < tokens.blocks(); ++b) {
    const int64_t n = load_keys(b);
    const Vec<uint32_t> first = digit << shift, rest = (uint32_t(1) << shift) - 1;
    uint64_t found = block_bits(key, [&](Vec<uint32_t> k) { return (k | rest) == (first | rest); });
    if (n < kBlock) found &= (uint64_t(1) << n) - 1;
    while (found) {
      const int64_t i = take_lowest(found);
      space.key[left] = key[i];
      space.mass[left++] = mass(b * kBlock + i);
    }
  }
  while (shift > 0) {
    const int next = shift > digits.bits ? shift - digits.bits : 0;
    const uint32_t low = (uint32_t(1) << (shift - next)) - 1;
    digits.clear();
    for (int64_t i = 0; i < left; ++i) digits.add(space.key[i] >> next & low, i, space.mass[i]);
    digit = digits.crossing(target);
    int64_t fewer = 0;
    for (int64_t i = 0; i < left; ++i) {
      space.key[fewer] = space.key[i];
      space.mass[fewer] = space.mass[i];
      fewer += (space.key[i] >> next & low) == digit;
    }
    left = fewer;
    shift = next;
  }
  int64_t ties = 0;
  while (ties < left && target > 0) target -= space.mass[ties++];
  return {value_of(space.key[0]), ties};
}

inline float kth_largest(const float* z, int64_t n, int64_t k, const Workspace& space) { // z: padded to whole blocks
  Tokens numbers;
  numbers.n = n;
  numbers.z = z;
  numbers.last = z + (numbers.blocks() - 1) * kBlock;
  return select_prefix(numbers, ByCount{}, k, space).value;
}

// The list of tokens that `find(b)` has a bit for in block b. In place where the tokens are that list already.
template <class Find> Tokens compact(const Tokens& tokens, const Workspace& space, Find find) {
  Tokens kept;
  for (int64_t b = 0; b < tokens.blocks(); ++b) {
    uint64_t found = find(b);
    if (!found) continue;
    const float* z = tokens.block(b);
    while (found) {
      const int64_t i = take_lowest(found);
      space.list_z[kept.n] = z[i];
      space.list_id[kept.n] = int32_t(tokens.at(b * kBlock + i));
      if (tokens.weight) kept.total += space.list_weight[kept.n] = tokens.weight[b * kBlock + i];
      ++kept.n;
    }
  }
  kept.z = space.list_z;
  kept.id = space.list_id;
  kept.last = space.list_z + (kept.blocks() - 1) * kBlock;
  for (int64_t i = kept.n; i < kept.blocks() * kBlock; ++i) space.list_z[i] = kNever;
  if (tokens.weight) {
    kept.weight = space.list_weight;
    for (int64_t i = kept.n; i < kept.blocks() * kBlock; ++i) space.list_weight[i] = 0;
  }
  return kept;
}
HEADWAY_FLATTEN inline Tokens above(const Tokens& tokens, const Workspace& space, Boundary end) {
  const Vec<float> value = end.value;
  return compact(tokens, space, [&](int64_t b) -> uint64_t {
    if (!tokens.id && (space.block_max[b] < end.value || space.block_max[b] == kNever)) return 0;
    const float* z = tokens.block(b);
    const uint64_t over = block_bits(z, [&](Vec<float> x) { return x > value; });
    if (end.value == kNever) return over; // what is banned is never kept, nor what fills the last block
    uint64_t ties = block_bits(z, [&](Vec<float> x) { return x == value; });
    int64_t many = __builtin_popcountll(ties) - end.ties;
    end.ties -= least(end.ties, __builtin_popcountll(ties));
    for (; many > 0; --many) ties ^= uint64_t(1) << (63 - __builtin_clzll(ties));
    return over | ties;
  });
}

// Stages ---------------------------------------------------------------------------------------------------------

struct Row {
  const Sampling& task;
  int64_t index;
  const Workspace& space;
  Scale scale;
  Tokens tokens; // those still in
};

inline void weigh(Row& row) { weigh(row.tokens, row.scale, row.tokens.id ? row.space.list_weight : row.space.weight); }

inline void keep_best(Row& row, int64_t k, bool keep_ties) {
  if (k >= row.tokens.n) return;
  // k blocks have a maximum of at least the k-th largest maximum, so k tokens do: the k best are among those.
  if (!row.tokens.id && k < row.tokens.blocks() / 2) {
    const float bound = kth_largest(row.space.block_max, row.tokens.blocks(), k, row.space);
    row.tokens = above(row.tokens, row.space, {bound, row.tokens.n});
    if (k >= row.tokens.n) return; // fewer are not banned
  }
  Boundary end = select_prefix(row.tokens, ByCount{}, k, row.space);
  if (keep_ties) end.ties = row.tokens.n;
  row.tokens = above(row.tokens, row.space, end);
}
inline void top_k(Row& row) { keep_best(row, row.task.top_k[row.index], row.task.keep_ties); }

inline void top_p(Row& row) {
  const double p = row.task.top_p[row.index];
  if (p == 1.0) return;
  weigh(row);
  const int64_t target = share(p, row.tokens.total);
  // On most rows a few tokens hold the mass: try those that reach the k-th largest block maximum, for growing k.
  if (!row.tokens.id)
    for (int64_t k = 8; k < row.tokens.blocks() / 2; k *= 8) {
      const float bound = kth_largest(row.space.block_max, row.tokens.blocks(), k, row.space);
      const Tokens few = above(row.tokens, row.space, {bound, row.tokens.n});
      if (few.total < target) continue;
      row.tokens = few;
      break;
    }
  row.tokens = above(row.tokens, row.space, select_prefix(row.tokens, ByMass{row.tokens.weight}, target, row.space));
}

inline void min_p(Row& row) {
  const double p = row.task.min_p[row.index];
  if (p == 0.0) return;
  const int64_t least_weight = share(p, int64_t(1) << row.scale.s); // the best token outlives every stage
  if (!row.tokens.id && row.scale.one_hot < 0)
    row.tokens = above(row.tokens, row.space, {lowest_of_weight(row.scale, least_weight), row.tokens.n});
  weigh(row);
  const int64_t* weight = row.tokens.weight;
  row.tokens = compact(row.tokens, row.space, [&](int64_t b) {
    uint64_t found = 0;
    const int64_t n = least(kBlock, row.tokens.n - b * kBlock);
    for (int64_t i = 0; i < n; ++i) found |= uint64_t(weight[b * kBlock + i] >= least_weight) << i;
    return found;
  });
}

// The order is the meaning: a new option is a function here and a place in these lists. Both of the first two keep
// prefixes of one order, so measuring p over all tokens is the same as taking top_p first.
using Stage = void (*)(Row&);
constexpr Stage kAfterTopK[] = {top_k, top_p, min_p};
constexpr Stage kJoint[] = {top_p, top_k, min_p};

// The row's way through ------------------------------------------------------------------------------------------

// -inf for what is not allowed, in a row that is filled up to whole blocks.
HEADWAY_FLATTEN inline void ban(const Sampling& task, int64_t index, float* z) {
  const int64_t stride = task.allowed.stride[0];
  const uint8_t* allowed =
      static_cast<const uint8_t*>(task.allowed.data) + batch_offset(task.batch, task.allowed, index);
  if (task.packed) {
    const Vec<int32_t> bit = [] {
      int32_t one[16];
      for (int i = 0; i < 16; ++i) one[i] = 1 << i;
      return Vec<int32_t>::load(one);
    }();
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

inline RandomBlock random_block(const Sampling& task, int64_t index, int64_t draw = 0) {
  const uint64_t stream = task.rows_per_stream ? uint64_t(index / task.rows_per_stream) : 0;
  return philox(task.seed[index], stream, task.position[index], uint64_t(draw));
}
inline uint64_t random_word(const Sampling& task, int64_t index, int64_t draw = 0) {
  if (task.uniform.data) return uint64_t(task.uniform[index * task.draws + draw] * 0x1p+64);
  return random_block(task, index, draw).word[0];
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

// The row's scores and scale. False where the row has a fault, which is in its status then.
inline bool begin(Row& row) {
  const Sampling& task = row.task;
  const Workspace& space = row.space;
  const int64_t index = row.index;
  Tokens& tokens = row.tokens;
  tokens.n = task.V;
  tokens.z = scores(task, index, space);
  const int64_t whole = (tokens.blocks() - 1) * kBlock;
  for (int64_t i = 0; i < kBlock; ++i) space.last[i] = whole + i < task.V ? tokens.z[whole + i] : kNever;
  tokens.last = space.last;

  Scale& scale = row.scale;
  scale.top = survey(tokens, space.block_max);
  if (!(scale.top > kNever && scale.top < -kNever)) {
    task.status[index] = diagnose(task, index, tokens.z);
    return false;
  }
  task.status[index] = 0;
  const double temperature = task.temperature[index];
  scale.s = scale_bits(task.V);
  scale.inverse = inverse_temperature(temperature);
  scale.one_hot = -1;
  if (temperature == 0) {
    int64_t b = 0, i = 0;
    while (space.block_max[b] != scale.top) ++b;
    while (tokens.block(b)[i] != scale.top) ++i;
    scale.one_hot = b * kBlock + i;
  }
  return true;
}

inline void filter(Row& row) {
  for (Stage stage : row.task.joint ? kJoint : kAfterTopK) stage(row);
}

inline void run_sampling(const Sampling& task, const Plan&, int64_t index, Memory memory) {
  const Workspace space(Arena{static_cast<char*>(memory.own)}, task.V);
  Row row{task, index, space, {}, {}};
  if (!begin(row)) return;
  const Tokens& tokens = row.tokens;
  const Scale& scale = row.scale;
  const bool token_only = !task.probabilities && !task.filtered && task.draws == 1;
  if (token_only && scale.one_hot >= 0) { // it outlives every stage
    task.tokens[index] = scale.one_hot;
    return;
  }

  filter(row);

  if (task.filtered) write_filtered(row);
  if (token_only && !tokens.id && !tokens.weight) {
    task.tokens[index] = draw_unfiltered(tokens, scale, random_word(task, index), space.mass);
    return;
  }
  if (task.tokens || task.probabilities) weigh(row);
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
