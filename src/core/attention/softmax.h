// A row of scores to weights: scale, softcap, bias, mask; the maximum; exponentials and their sum.
#pragma once
#include "../ground/exp.h"
#include "../ground/rows.h"

namespace headway {
namespace {

// Where one row's mask and bias lie, and the keys it may reach, all relative to a chunk's first key.
template <class T> struct RowRules {
  int64_t low, high;
  const uint8_t* mask;
  int64_t mask_stride;
  const T* bias;
  int64_t bias_stride;
};

template <class T> Vec<T> load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1 && n >= 16) return Vec<T>::load(p);
  T x[16] = {};
  for (int64_t i = 0; i < min(n, 16); ++i) x[i] = p[i * stride];
  return Vec<T>::load(x);
}

// Which of the keys j .. j + 15 the row may attend to. A bias of -inf forbids as a mask does.
template <class T> Mask<T> allowed(const RowRules<T>& row, int64_t j) {
  using Int = typename IntOf<T>::type;
  const bool inside = row.low <= j && j + 16 <= row.high;
  Mask<T> keep = Int(-1);
  if (!inside) {
    const Vec<Int> key = convert<Int>(lane_index()) + Vec<Int>(Int(j));
    keep = (key >= Vec<Int>(Int(row.low))) & (key < Vec<Int>(Int(row.high)));
  }
  if (row.mask && row.mask_stride == 1 && inside) {
    keep = load_integers<Int>(row.mask + j) != Vec<Int>(Int(0));
  } else if (row.mask) {
    Int x[16] = {};
    for (int64_t i = max(row.low - j, 0); i < min(row.high - j, 16); ++i) x[i] = row.mask[(j + i) * row.mask_stride];
    keep = keep & (Vec<Int>::load(x) != Vec<Int>(Int(0)));
  }
  if (row.bias)
    keep =
        keep & (load_strided(row.bias + j * row.bias_stride, row.bias_stride, row.high - j) != Vec<T>(-T(kInfinity)));
  return keep;
}

// Whether scores are products times a positive scale and nothing else. That keeps their order, so the maximum of the
// scaled is the scaled maximum, rounding included, and products are scaled on their way into the exponential.
template <class T> bool plain(const RowRules<T>& row, T scale, T softcap) {
  return !row.bias && softcap == 0 && scale > 0;
}

// Products of keys begin .. end (multiples of 16) become scores, but for a plain row's scale, and -inf where the row
// may not attend. Returns the maximum of the scores: -inf where nothing is allowed, else finite or +inf, so that the
// exponentials of -inf scores are 0. A NaN score does not decide the maximum; it reaches the row through its
// exponential. `poison` becomes 0, or NaN in some lane where a product or a score that counts is infinite: a product
// that left the type's range may belong to any score.
template <class T>
T score_row(T* s, int64_t begin, int64_t end, const RowRules<T>& row, T scale, T softcap, Vec<T>& poison) {
  using Int = typename IntOf<T>::type;
  const bool is_plain = plain(row, scale, softcap);
  Vec<T> top = -T(kInfinity), low = T(0), lost = T(0); // x * 0 is 0 for finite x alone
  Mask<T> seen = Int(0);
  const auto decide = [&](int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j += 16) {
      const Vec<T> product = Vec<T>::load(s + j);
      Vec<T> x = product;
      if (!is_plain) {
        x = x * Vec<T>(scale);
        if (softcap > 0) x = Vec<T>(softcap) * tanh(x / Vec<T>(softcap));
        if (row.bias) x = x + load_strided(row.bias + j * row.bias_stride, row.bias_stride, row.high - j);
      }
      const Mask<T> keep = allowed(row, j);
      seen = seen | keep;
      low = min(select(keep, product, Vec<T>(T(0))), low);
      if (!is_plain) lost = lost + select(keep, product * Vec<T>(T(0)) + x * Vec<T>(T(0)), Vec<T>(T(0)));
      x = select(keep, x, Vec<T>(-T(kInfinity)));
      x.store(s + j);
      top = max(x, top);
    }
  };
  int64_t free_from = end, free_to = end; // what needs no deciding, and no writing
  if (is_plain && !row.mask && round_up(row.low, 16) < row.high / 16 * 16)
    free_from = round_up(row.low, 16), free_to = row.high / 16 * 16, seen = Mask<T>(Int(-1));
  decide(begin, free_from);
  for (int64_t j = free_from; j < free_to; j += 16) {
    const Vec<T> x = Vec<T>::load(s + j);
    top = max(x, top), low = min(x, low);
  }
  decide(free_to, end);
  poison = low * Vec<T>(T(0)) + lost;
  if (!any(seen)) return -T(kInfinity);
  const T m = is_plain ? reduce_max(top) * scale : reduce_max(top);
  return m > Constants<T>::lowest ? m : Constants<T>::lowest;
}

// Scores times scale become exp(score - m); returns their sum over 16 lanes and one tree. The lanes begin with `total`.
template <class T> T exponentiate_and_sum(T* s, int64_t begin, int64_t end, T scale, T m, Vec<T> total = T(0)) {
#pragma GCC unroll 2
  for (int64_t j = begin; j < end; j += 16) {
    const Vec<T> p = exp(Vec<T>::load(s + j) * Vec<T>(scale) - Vec<T>(m));
    p.store(s + j);
    total = total + p;
  }
  return reduce_sum(total);
}

} // namespace
} // namespace headway
