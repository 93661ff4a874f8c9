// Elementary functions, made of the same rounded operations on every target.
//
// The C library's differ by version and machine; these are the library's own part of the contract of bits. The
// coefficients are near-minimax fits made by tools/polynomials.py; each function is within one unit in the last place.
#pragma once
#include "vec.h"

namespace headway {
namespace {

template <class T> struct Constants;
template <> struct Constants<float> {
  static constexpr float log2e = 0x1.715476p+0f, round = 0x1.8p+23f; // x + round - round: the nearest integer
  // ln 2 in two parts: n * ln2_high is exact for every exponent n.
  static constexpr float ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f;
  static constexpr float exp_lowest = -87.33654f; // ln of the smallest normal number
  static constexpr float lowest = -0x1.fffffep+127f, smallest = 0x1p-126f, sqrt_half = 0x1.6a09e6p-1f;
  static constexpr float tanh_one = 10.0f; // beyond, tanh rounds to 1
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float exp_tail[] = {0.0013926176119935579f, 0.0083631730745137109f, 0.041666554662050534f,
                                       0.16666577025597988f, 0.5f};
  static constexpr float log_tail[] = {0.23330467216303836f, 0.28550820815960663f, 0.40000121839806127f,
                                       0.66666666554497092f};
};
template <> struct Constants<double> {
  static constexpr double log2e = 0x1.71547652b82fep+0, round = 0x1.8p+52;
  static constexpr double ln2_high = 0x1.62e42fefp-1, ln2_low = 0x1.473de6af278edp-34;
  static constexpr double exp_lowest = -708.39641853226408;
  static constexpr double lowest = -0x1.fffffffffffffp+1023, smallest = 0x1p-1022, sqrt_half = 0x1.6a09e667f3bcdp-1;
  static constexpr double tanh_one = 20.0;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double exp_tail[] = {1.6086622436215554e-10, 2.0918129454967066e-9, 2.5052071109214448e-8,
                                        2.7557263301474755e-7,  2.755731924720479e-6,  2.4801587316421323e-5,
                                        1.9841269841263305e-4,  1.3888888888879081e-3, 8.333333333333334e-3,
                                        4.1666666666666677e-2,  1.6666666666666667e-1, 0.5};
  static constexpr double log_tail[] = {0.13086626147840102, 0.13268773138656885, 0.15386239702814658,
                                        0.18181795640132906, 0.22222222391713917, 0.28571428570803612,
                                        0.40000000000000877, 0.66666666666666466};
  static constexpr double sin_tail[] = {-7.5866971177069179e-13, 1.6058531618986147e-10, -2.5052106232447578e-8,
                                        2.7557319219339167e-6,   -1.9841269841265065e-4, 8.3333333333333315e-3,
                                        -1.6666666666666667e-1};
  static constexpr double cos_tail[] = {4.7458719020432915e-14, -1.1470460887609960e-11, 2.0876755791080424e-9,
                                        -2.7557319221402824e-7, 2.4801587301584646e-5,   -1.3888888888888888e-3,
                                        4.1666666666666667e-2};
};

// Inlined by force: GCC would pass a Vec of several registers through memory, which doubled the cost of exp on AVX2.
template <class T, int N> [[gnu::always_inline]] inline Vec<T> horner(Vec<T> x, const T (&coefficients)[N]) {
  Vec<T> y = coefficients[0];
  for (int i = 1; i < N; ++i) y = fma(y, x, Vec<T>(coefficients[i]));
  return y;
}

template <class T> struct Reduced {
  Vec<T> scale, tail; // exp(x) = scale * (1 + tail), scale a power of two
};
template <class T> [[gnu::always_inline]] inline Reduced<T> reduce_exp(Vec<T> x) {
  using C = Constants<T>;
  using Int = typename IntOf<T>::type;
  // The low bits of `shifted` are n plus the exponent's bias; shifting them up drops the rest.
  const Vec<T> round = C::round + C::bias, shifted = fma(x, Vec<T>(C::log2e), round);
  const Vec<T> n = shifted - round;
  Vec<T> r = fma(n, Vec<T>(-C::ln2_high), x);
  r = fma(n, Vec<T>(-C::ln2_low), r);
  const Vec<T> scale = bits<T>(bits<Int>(shifted) << C::mantissa);
  return {scale, fma(r * r, horner(r, C::exp_tail), r)};
}

// exp for x <= 0, the only exponential that softmax needs. Results below the smallest normal number are 0.
template <class T> [[gnu::always_inline]] inline Vec<T> exp(Vec<T> x) {
  const auto [scale, tail] = reduce_exp(x);
  return select(x < Vec<T>(Constants<T>::exp_lowest), Vec<T>(T(0)), fma(tail, scale, scale));
}
template <class T> T exp(T x) {
  T y[16];
  exp(Vec<T>(x)).store(y);
  return y[0];
}

template <class T> Vec<T> tanh(Vec<T> x) {
  using Int = typename IntOf<T>::type;
  const Vec<Int> sign = bits<Int>(x) & bits<Int>(Vec<T>(T(-0.0)));
  const Vec<T> size = bits<T>(bits<Int>(x) ^ sign), one = Vec<T>(Constants<T>::tanh_one);
  const auto [scale, tail] = reduce_exp(Vec<T>(T(-2)) * select(size < one, size, one));
  const Vec<T> e = fma(scale, tail, scale - Vec<T>(T(1))); // exp(-2|x|) - 1, exact to the last place near 0 as well
  const Vec<T> y = (Vec<T>(T(0)) - e) / (Vec<T>(T(2)) + e);
  return select(x == x, bits<T>(bits<Int>(y) | sign), x);
}

template <class T> Vec<T> log(Vec<T> x) {
  using C = Constants<T>;
  using Int = typename IntOf<T>::type;
  const auto tiny = x < Vec<T>(C::smallest);
  const Vec<T> normal = select(tiny, x * Vec<T>(T(Int(1) << C::mantissa)), x);
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)), so that log(m) has no cancellation with e ln 2.
  const Vec<Int> raw = bits<Int>(normal);
  const Vec<Int> e = (raw - bits<Int>(Vec<T>(C::sqrt_half))) >> C::mantissa;
  const Vec<T> m = bits<T>(raw - (e << C::mantissa));
  const Vec<T> n = convert<T>(e - (tiny & Vec<Int>(C::mantissa)));
  const Vec<T> f = m - Vec<T>(T(1)), s = f / (m + Vec<T>(T(1))), z = s * s, half = Vec<T>(T(0.5)) * f * f;
  // log(1 + f) = f - (f^2/2 - s (f^2/2 + s^2 R)), the arrangement that keeps f exact (as in fdlibm).
  const Vec<T> tail = fma(s, fma(z, horner(z, C::log_tail), half), n * Vec<T>(C::ln2_low));
  Vec<T> y = fma(n, Vec<T>(C::ln2_high), f - (half - tail));
  y = select(x == Vec<T>(T(__builtin_inff())), x, y);
  y = select(x == Vec<T>(T(0)), Vec<T>(T(-__builtin_inff())), y);
  return select(x >= Vec<T>(T(0)), y, Vec<T>(T(__builtin_nanf(""))));
}
template <class T> T log(T x) {
  T y[16];
  log(Vec<T>(x)).store(y);
  return y[0];
}

// Sine and cosine of |x| < 2^24: pi / 2 in four parts (Cody and Waite) whose products with n < 2^24 are exact.
inline void sin_cos(Vec<double> x, Vec<double>& sine, Vec<double>& cosine) {
  using C = Constants<double>;
  using V = Vec<double>;
  const V shifted = fma(x, V(0x1.45f306dc9c883p-1), V(C::round));
  const V n = shifted - V(C::round);
  V r = fma(n, V(-0x1.921fb54p+0), x);
  r = fma(n, V(-0x1.10b4611p-30), r);
  r = fma(n, V(-0x1.4c4c662p-59), r);
  r = fma(n, V(-0x1.1701b839a252p-88), r);
  const V z = r * r;
  const V s = fma(r * z, horner(z, C::sin_tail), r);
  const V c = fma(z * z, horner(z, C::cos_tail), fma(z, V(-0.5), V(1.0)));
  const Vec<int64_t> quadrant = bits<int64_t>(shifted), zero = int64_t(0);
  const auto odd = (quadrant & Vec<int64_t>(1)) != zero;
  const auto sine_negative = (quadrant & Vec<int64_t>(2)) != zero;
  const auto cosine_negative = ((quadrant + Vec<int64_t>(1)) & Vec<int64_t>(2)) != zero;
  const V sine_size = select(odd, c, s), cosine_size = select(odd, s, c);
  sine = select(sine_negative, V(-0.0) - sine_size, sine_size);
  cosine = select(cosine_negative, V(-0.0) - cosine_size, cosine_size);
}

} // namespace
} // namespace headway
