// A row of logits as tokens with masses: mass = round(2^s exp((z - max z) / T)). Each float32 operation is rounded on
// its own, and none is fused, so that NumPy computes the same. All arithmetic after it is exact, on integers: neither
// lanes nor the order of a sum matter. reference/_sampling/masses.py is the definition.
#pragma once
#include "../ground/rows.h"

namespace headway {
namespace {

// For functions with loops over the vocabulary: without it GCC 12 calls the functions in the loop and inlines none.
#define HEADWAY_FLATTEN __attribute__((flatten))
// For long functions that are called once a row: without it each caller with HEADWAY_FLATTEN holds a copy of them.
#define HEADWAY_NOINLINE __attribute__((noinline))

constexpr int64_t kBlock = 64; // tokens that share a maximum

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
// The inverse: 16 bits as the lanes of a mask.
inline Mask<float> lane_mask(uint64_t found) {
#if defined(__AVX512F__)
  Mask<float> mask;
  mask.part[0] = (Mask<float>::Reg)_mm512_movm_epi32(__mmask16(found));
  return mask;
#else
  return (Vec<int32_t>(int32_t(found & 0xffff)) & lane_powers()) != Vec<int32_t>(0);
#endif
}
// One bit for each token of a block.
template <class T, class Test> uint64_t block_bits(const T* block, Test test) {
  uint64_t found = 0;
  for (int64_t v = 0; v < kBlock; v += 16) found |= lane_bits(test(Vec<T>::load(block + v))) << v;
  return found;
}
inline int64_t pop_lowest_bit(uint64_t& found) {
  const int64_t i = __builtin_ctzll(found);
  found &= found - 1;
  return i;
}

// Tokens in id order. Arrays are padded to the end of the last block, with logits of -inf and masses of 0.
struct Tokens {
  int64_t n = 0;
  const float* z = nullptr;
  const float* last = nullptr; // the last block: z's own end, or a padded copy of it
  const int32_t* id = nullptr; // nullptr: token i is i
  int64_t* mass = nullptr;     // nullptr: not computed yet
  int64_t total = 0;
  int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
  const float* block(int64_t b) const { return b + 1 < blocks() ? z + b * kBlock : last; }
  int64_t at(int64_t i) const { return id ? id[i] : i; }
};

// The first place whose token has this id or a higher one.
inline int64_t place_of(const Tokens& tokens, int64_t id) {
  if (!tokens.id) return id;
  int64_t low = 0, high = tokens.n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (tokens.id[middle] < id)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}
inline bool holds(const Tokens& tokens, int64_t place, int64_t id) {
  return place < tokens.n && tokens.at(place) == id && tokens.z[place] > -kInfinity;
}

// Four copies of the radix histogram, a cache line out of step: equal digits in a row would wait for each other's sums.
constexpr int64_t kCopies = 4, kCopySize = (1 << 11) + 8;

// The number of tokens in the sample of a long row, from which guess_end finds where a prefix ends.
constexpr int64_t kSample = 4096;

struct Workspace {
  float *z, *last, *block_max, *list_z, *distance, *sample_z;
  int32_t* list_id;
  int64_t *row_mass, *list_mass, *key_mass, *histogram, *sample_mass;
  uint32_t* key;
  uint64_t* chosen; // a bit for each token, by blocks
  Team team;

  Workspace(Arena arena, int64_t V, int64_t* bytes = nullptr, Team threads = {}) : team(threads) {
    const int64_t n = round_up(V, kBlock), blocks = round_up(n / kBlock, kBlock);
    z = arena.take<float>(n);
    last = arena.take<float>(kBlock);
    block_max = arena.take<float>(blocks);
    list_z = arena.take<float>(n);
    distance = arena.take<float>(n);
    list_id = arena.take<int32_t>(n);
    row_mass = arena.take<int64_t>(n);
    list_mass = arena.take<int64_t>(n);
    key_mass = arena.take<int64_t>(n);
    key = arena.take<uint32_t>(n);
    chosen = arena.take<uint64_t>(blocks);
    histogram = arena.take<int64_t>(kCopies * kCopySize);
    sample_z = arena.take<float>(kSample);
    sample_mass = arena.take<int64_t>(kSample);
    if (bytes) *bytes = arena.used;
  }
};

// Calls body(part, first, last) for ranges that make up 0 .. n, each of at least `smallest` where there is more than
// one, on all threads of the team; returns the number of ranges. A part computes whole numbers or a maximum, so no
// result depends on how a row is cut.
constexpr int64_t kMaxParts = 32;
template <class Body> int64_t split(const Team& team, int64_t n, int64_t smallest, const Body& body) {
  const int64_t parts = team.run ? max(1, min(kMaxParts, n / smallest)) : 1;
  if (parts == 1) {
    body(int64_t(0), int64_t(0), n);
    return 1;
  }
  struct Work {
    const Body& body;
    int64_t n, parts;
  } work{body, n, parts};
  team.run(
      team.threads, parts,
      [](const void* work, int64_t i) HEADWAY_FLATTEN {
        const Work& w = *static_cast<const Work*>(work);
        w.body(i, w.n * i / w.parts, w.n * (i + 1) / w.parts);
      },
      &work);
  return parts;
}
constexpr int64_t kPart = 128; // blocks: some 4 microseconds of work

// Elementary functions, for the few numbers that need them -------------------------------------------------------

// The same operations in the same order as log and exp of reference/_sampling/masses.py, and nothing fused.
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
inline double power(double share, double exponent) { // of a share from 0 to 1; what is not normal is 0
  if (exponent == 0) return 1;
  if (share < 0x1p-1022) return exponent > 0 ? 0 : __builtin_inf();
  const double y = exponent * natural_log(share);
  return y <= 0 ? exponential(y) : 1 / exponential(-y);
}

// Masses --------------------------------------------------------------------------------------------------------

struct Scale {
  float top;       // the row's maximum
  float inverse;   // 1 / T: finite, and 0 rather than subnormal
  int32_t s;       // the largest mass is 2^s, and V of them stay below 2^62
  int64_t one_hot; // at temperature 0 the token that has all the mass; else -1
  // A difference top - z up to `tiny` counts as 0. Then x is above -2^-50 and the mass is the same, but products of x
  // would be subnormal, and a processor takes a hundred times as long for them. 0 where the row has no such difference.
  float tiny;
};

inline int32_t scale_bits(int64_t V) {
  int32_t log2_up = 0;
  while ((int64_t(1) << log2_up) < V) ++log2_up;
  return int32_t(min(44, 62 - log2_up));
}

inline float inverse_temperature(double t) {
  const double inverse = 1.0 / t, largest = 0x1.fffffep+127;
  return inverse < 0x1p-126 ? 0.0f : float(inverse > largest ? largest : inverse);
}

// The same operations in the same order as exponents and masses_of of reference/_sampling/masses.py.

// Returns x, or -40 where x is below -40: the mass is 0 there. The bits of -0 and of the negative numbers, read as
// signed integers, rise as the numbers fall, so that one integer min is enough; zeros must be -0. NaN and positive
// numbers, which come only of logits that another thread has written to since their maximum was found, become -40 as
// well.
inline Vec<float> bounded(Vec<float> x) {
  return bits<float>(min(bits<int32_t>(x), bits<int32_t>(Vec<float>(-40.0f))));
}
// x = (z - top) / T, from -40, where banned tokens are too, to 0.
inline Vec<float> exponents(Vec<float> z, const Scale& scale) {
  using F = Vec<float>;
  const F d = F(0.0f) - max(z - F(scale.top), F(-0x1.fffffep+127f));
  const F x = bounded(d * F(-scale.inverse));
  return select(z == F(-kInfinity), F(-40.0f), x); // not left to d: with a huge T a banned token's x would be 0
}

// round(2^s exp(x)). exp(r) = 1 + r + r^2 Q(r) on |r| <= ln(2) / 2; Q is a near-minimax fit
// made by tools/polynomials.py. The relative error is below 1e-7.
inline Vec<int64_t> masses_at(Vec<float> x, const Scale& scale) {
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
  return nearest_integer(bits<float>(bits<int32_t>(y) + ((bits<int32_t>(shifted) + Vec<int32_t>(scale.s)) << 23)));
}
inline Vec<int64_t> masses(Vec<float> z, const Scale& scale) { return masses_at(exponents(z, scale), scale); }

HEADWAY_FLATTEN inline Vec<int64_t> block_masses(const float* z, const Scale& scale, Vec<int64_t> (&w)[kBlock / 16]) {
  using F = Vec<float>;
  Vec<int64_t> sum = int64_t(0);
  const F top = scale.top + 0.0f, inverse = -scale.inverse, tiny = scale.tiny; // + 0: so that no difference is -0
  const bool usual = scale.inverse > 0x1p-100f; // what -inf is in exponents(), -FLT_MAX, gives -40 by itself
  for (int64_t v = 0; v < kBlock / 16; ++v) {
    const F x = F::load(z + 16 * v);
    F d = top - x;
    if (scale.tiny > 0) d = select(d > tiny, d, F(0.0f));
    w[v] = masses_at(usual ? bounded(d * inverse) : exponents(x, scale), scale);
    sum = sum + w[v];
  }
  return sum;
}

inline void fill_masses(Tokens& tokens, const Scale& scale, int64_t* out, const Team& team) {
  if (tokens.mass) return;
  tokens.mass = out;
  if (scale.one_hot >= 0) {
    for (int64_t i = 0; i < tokens.blocks() * kBlock; ++i) out[i] = 0;
    for (int64_t i = 0; i < tokens.n; ++i)
      if (tokens.at(i) == scale.one_hot) out[i] = int64_t(1) << scale.s;
    tokens.total = int64_t(1) << scale.s; // the best token outlives every stage
    return;
  }
  int64_t total[kMaxParts];
  const int64_t parts = split(team, tokens.blocks(), kPart, [&](int64_t part, int64_t first, int64_t last) {
    Vec<int64_t> lanes = int64_t(0);
    for (int64_t b = first; b < last; ++b) {
      Vec<int64_t> w[kBlock / 16];
      lanes = lanes + block_masses(tokens.block(b), scale, w);
      memcpy(out + b * kBlock, w, sizeof w);
    }
    total[part] = reduce_sum(lanes);
  });
  tokens.total = 0;
  for (int64_t i = 0; i < parts; ++i) tokens.total += total[i];
}

// The smallest integer >= p * total, exactly, for 0 <= p <= 2; > p * total where `equal` is false. p is m 2^-e, and the
// product of m and total fits into 128 bits.
inline int64_t least_mass(double p, int64_t total, bool equal = true) {
  uint64_t u;
  memcpy(&u, &p, 8);
  const int exponent = int(u >> 52); // the sign bit is clear
  const uint64_t m = (u & 0xfffffffffffff) | (exponent ? uint64_t(1) << 52 : 0);
  const int e = 1075 - (exponent ? exponent : 1);
  const Wide product = Wide(m) * uint64_t(total);
  if (e > 127) return product != 0 || !equal;
  return int64_t(product >> e) + ((product & ((Wide(1) << e) - 1)) != 0 || !equal);
}

} // namespace
} // namespace headway
