// Sixteen lanes of one type, on any instruction set.
//
// A Vec is 16 lanes whatever a register holds: one AVX-512 register of floats, two of AVX2, four of NEON. All
// arithmetic is lane by lane and IEEE (round to nearest even), so every target computes the same bits. GCC's and
// Clang's vector extensions give + - * / compare and select; only the fused multiply-add needs to be named per
// target. The build passes -ffp-contract=off: nothing fuses unless fma() says so.
//
// This header is compiled once per instruction set: everything in it has internal linkage, and no function of the
// C++ library is used, or the linker could keep one target's copy for all of them.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifdef __FAST_MATH__
#error "headway promises bits: fast-math would break them"
#endif

namespace headway {
namespace {

constexpr float kInfinity = __builtin_inff();

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

// The register tile of the matrix micro-kernel, rows x Vecs of columns (gemm.h). It must leave room for the operands;
// of floats, AVX-512: 6 x 4 accumulators + 4 + 1 of 32 registers; AVX2: 6 x 2 + 2 + 1 of 16; NEON: 6 x 4 + 4 + 1 of 32.
// A single row is kRowVecs wide.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVecs = 4, kRowVecs = 8;
#else
constexpr int kTileRows = 6, kTileVecs = 1, kRowVecs = 4;
#endif

template <class T, int Bytes> struct VectorType {
  typedef T type __attribute__((vector_size(Bytes)));
};

template <class T> struct IntOf;
template <> struct IntOf<float> {
  using type = int32_t;
};
template <> struct IntOf<double> {
  using type = int64_t;
};
template <> struct IntOf<int32_t> {
  using type = int32_t;
};
template <> struct IntOf<uint32_t> {
  using type = int32_t;
};
template <> struct IntOf<int64_t> {
  using type = int64_t;
};
template <> struct IntOf<uint64_t> {
  using type = int64_t;
};

template <class T> struct Vec {
  using Reg = typename VectorType<T, kRegisterBytes>::type;
  using Whole = typename VectorType<T, 16 * sizeof(T)>::type;
  static constexpr int parts = 16 * int(sizeof(T)) / kRegisterBytes;
  Reg part[parts];

  Vec() = default;
  Vec(T x) {
    for (int i = 0; i < parts; ++i) part[i] = x - Reg{}; // broadcast; x - 0 is x for every x, -0 included
  }
  static Vec load(const T* p) {
    Vec v; // register by register: GCC copies a whole Vec in pieces of 16 bytes, which wider loads then wait for
    for (int i = 0; i < parts; ++i) v.part[i] = reinterpret_cast<const Unaligned*>(p)[i];
    return v;
  }
  void store(T* p) const {
    for (int i = 0; i < parts; ++i) reinterpret_cast<Unaligned*>(p)[i] = part[i];
  }

private:
  typedef T Unaligned __attribute__((vector_size(kRegisterBytes), aligned(sizeof(T)), may_alias));
};

template <class T> using Mask = Vec<typename IntOf<T>::type>; // lanes of 0 or -1

#define HEADWAY_LANEWISE(op)                                                    \
  template <class T> Vec<T> operator op(Vec<T> a, Vec<T> b) {                   \
    for (int i = 0; i < Vec<T>::parts; ++i) a.part[i] = a.part[i] op b.part[i]; \
    return a;                                                                   \
  }
#define HEADWAY_COMPARE(op)                                                     \
  template <class T> Mask<T> operator op(Vec<T> a, Vec<T> b) {                  \
    Mask<T> m;                                                                  \
    for (int i = 0; i < Vec<T>::parts; ++i) m.part[i] = a.part[i] op b.part[i]; \
    return m;                                                                   \
  }
// clang-format off
HEADWAY_LANEWISE(+) HEADWAY_LANEWISE(-) HEADWAY_LANEWISE(*) HEADWAY_LANEWISE(/)
HEADWAY_LANEWISE(&) HEADWAY_LANEWISE(|) HEADWAY_LANEWISE(^)
HEADWAY_COMPARE(<) HEADWAY_COMPARE(<=) HEADWAY_COMPARE(>) HEADWAY_COMPARE(>=) HEADWAY_COMPARE(==) HEADWAY_COMPARE(!=)
// clang-format on
#undef HEADWAY_LANEWISE
#undef HEADWAY_COMPARE

        template <class T>
        Vec<T> operator<<(Vec<T> a, int n) {
  for (int i = 0; i < Vec<T>::parts; ++i) a.part[i] = a.part[i] << n;
  return a;
}
template <class T> Vec<T> operator>>(Vec<T> a, int n) {
  for (int i = 0; i < Vec<T>::parts; ++i) a.part[i] = a.part[i] >> n;
  return a;
}

template <class T> Vec<T> select(Mask<T> m, Vec<T> yes, Vec<T> no) {
  for (int i = 0; i < Vec<T>::parts; ++i) no.part[i] = m.part[i] ? yes.part[i] : no.part[i];
  return no;
}
template <class To, class From> Vec<To> bits(Vec<From> v) {
  static_assert(sizeof(To) == sizeof(From));
  Vec<To> r;
  for (int i = 0; i < Vec<To>::parts; ++i) r.part[i] = (typename Vec<To>::Reg)v.part[i];
  return r;
}
template <class To, class From> Vec<To> convert(Vec<From> v) {
  typename Vec<From>::Whole from;
  memcpy(&from, &v, sizeof from);
  const auto to = __builtin_convertvector(from, typename Vec<To>::Whole);
  Vec<To> r;
  memcpy(&r, &to, sizeof r);
  return r;
}
// convert<double>: what GCC 12 takes through memory where a Vec is several registers.
inline Vec<double> widen(Vec<float> v) {
#if defined(__SSE2__) && !defined(__AVX512F__)
  Vec<double> r;
  for (int i = 0; i < Vec<float>::parts; ++i) {
#if defined(__AVX2__)
    r.part[2 * i] = (Vec<double>::Reg)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v.part[i]));
    r.part[2 * i + 1] = (Vec<double>::Reg)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v.part[i], 1));
#else
    r.part[2 * i] = (Vec<double>::Reg)_mm_cvtps_pd((__m128)v.part[i]);
    r.part[2 * i + 1] = (Vec<double>::Reg)_mm_cvtps_pd(_mm_movehl_ps((__m128)v.part[i], (__m128)v.part[i]));
#endif
  }
  return r;
#else
  return convert<double>(v);
#endif
}

// The nearest whole number, to even where two are; of 0 <= v < 2^52.
inline Vec<int64_t> nearest_integer(Vec<float> v) {
#if defined(__AVX512F__)
  Vec<int64_t> r;
  r.part[0] = (Vec<int64_t>::Reg)_mm512_maskz_cvtps_epi64(0xff, _mm512_castps512_ps256((__m512)v.part[0]));
  r.part[1] = (Vec<int64_t>::Reg)_mm512_maskz_cvtps_epi64(0xff, _mm512_extractf32x8_ps((__m512)v.part[0], 1));
  return r;
#else
  // From 2^52 on the doubles are whole numbers: adding 2^52 rounds and leaves the number in the low bits.
  const Vec<double> whole = widen(v) + Vec<double>(0x1p+52);
  return bits<int64_t>(whole) - bits<int64_t>(Vec<double>(0x1p+52));
#endif
}

// The maximum and the minimum of two ------------------------------------------------------------------------------

// max is a > b ? a : b, so b where either is NaN: the definition of x86's instruction, but not of Arm's.
inline Vec<float>::Reg max_reg(Vec<float>::Reg a, Vec<float>::Reg b) {
#if defined(__AVX512F__)
  return (Vec<float>::Reg)_mm512_mask_max_ps((__m512)a, 0xffff, (__m512)a,
                                             (__m512)b); // GCC 12 warns about the plain one
#elif defined(__AVX2__)
  return (Vec<float>::Reg)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline Vec<double>::Reg max_reg(Vec<double>::Reg a, Vec<double>::Reg b) { return a > b ? a : b; }
template <class T> Vec<T> max(Vec<T> a, Vec<T> b) {
  for (int i = 0; i < Vec<T>::parts; ++i) a.part[i] = max_reg(a.part[i], b.part[i]);
  return a;
}

// min is a < b ? a : b.
inline Vec<float>::Reg min_reg(Vec<float>::Reg a, Vec<float>::Reg b) {
#if defined(__AVX512F__)
  return (Vec<float>::Reg)_mm512_mask_min_ps((__m512)a, 0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>::Reg)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
inline Vec<double>::Reg min_reg(Vec<double>::Reg a, Vec<double>::Reg b) { return a < b ? a : b; }
inline Vec<int32_t>::Reg min_reg(Vec<int32_t>::Reg a, Vec<int32_t>::Reg b) {
#if defined(__AVX512F__) // GCC 12 makes two instructions of the plain one
  return (Vec<int32_t>::Reg)_mm512_mask_min_epi32((__m512i)a, 0xffff, (__m512i)a, (__m512i)b);
#else
  return a < b ? a : b;
#endif
}
template <class T> Vec<T> min(Vec<T> a, Vec<T> b) {
  for (int i = 0; i < Vec<T>::parts; ++i) a.part[i] = min_reg(a.part[i], b.part[i]);
  return a;
}

// a * b + c, rounded once ---------------------------------------------------------------------------------------

#if defined(__AVX512F__)
inline Vec<float>::Reg fma_reg(Vec<float>::Reg a, Vec<float>::Reg b, Vec<float>::Reg c) {
  return (Vec<float>::Reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vec<double>::Reg fma_reg(Vec<double>::Reg a, Vec<double>::Reg b, Vec<double>::Reg c) {
  return (Vec<double>::Reg)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
inline Vec<float>::Reg fma_reg(Vec<float>::Reg a, Vec<float>::Reg b, Vec<float>::Reg c) {
  return (Vec<float>::Reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Vec<double>::Reg fma_reg(Vec<double>::Reg a, Vec<double>::Reg b, Vec<double>::Reg c) {
  return (Vec<double>::Reg)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
inline Vec<float>::Reg fma_reg(Vec<float>::Reg a, Vec<float>::Reg b, Vec<float>::Reg c) {
  return (Vec<float>::Reg)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Vec<double>::Reg fma_reg(Vec<double>::Reg a, Vec<double>::Reg b, Vec<double>::Reg c) {
  return (Vec<double>::Reg)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
// Without the instruction. The product of two floats is exact in double; their sum with c is not, and rounding it to
// double and then to float would round twice. Rounding to odd in between (the last bit set where anything was lost)
// makes the second rounding the only one that counts (Boldo and Melquiond, 2008).
inline Vec<float>::Reg fma_reg(Vec<float>::Reg a, Vec<float>::Reg b, Vec<float>::Reg c) {
  using Wide = VectorType<double, 2 * kRegisterBytes>::type;
  using WideInt = VectorType<int64_t, 2 * kRegisterBytes>::type;
  const Wide p = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
  const Wide z = __builtin_convertvector(c, Wide);
  const Wide sum = p + z;
  const Wide from_z = sum - p;
  const Wide error = (p - (sum - from_z)) + (z - from_z); // exact (Knuth, TwoSum); NaN where the sum is not finite
  WideInt s = (WideInt)sum;
  // Lost and even: one step away from zero if the error points outward, else one step towards it.
  const WideInt lost = ((error < 0) | (error > 0)) & ((s & 1) == 0);
  const WideInt outward = ((error > 0) == (sum > 0));
  s += lost & ((outward & 1) | ((~outward) & -1));
  return __builtin_convertvector((Wide)s, Vec<float>::Reg);
}
inline Vec<double>::Reg fma_reg(Vec<double>::Reg a, Vec<double>::Reg b, Vec<double>::Reg c) {
  for (int i = 0; i < 2; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]); // libm's is correctly rounded, and slow
  return c;
}
#endif

template <class T> Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  for (int i = 0; i < Vec<T>::parts; ++i) c.part[i] = fma_reg(a.part[i], b.part[i], c.part[i]);
  return c;
}

// Sums and maxima over lanes, by one fixed tree ------------------------------------------------------------------

// Lanes i and i + 8 meet first, then i and i + 4, and so on. `op` takes vectors as well as numbers.
template <class T, int Lanes, class Op> T reduce_lanes(typename VectorType<T, Lanes* int(sizeof(T))>::type v, Op op) {
  if constexpr (Lanes == 16)
    return reduce_lanes<T, 8>(op(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)),
                              op);
  else if constexpr (Lanes == 8)
    return reduce_lanes<T, 4>(op(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)),
                              op);
  else if constexpr (Lanes == 4)
    return reduce_lanes<T, 2>(op(__builtin_shufflevector(v, v, 0, 1), __builtin_shufflevector(v, v, 2, 3)), op);
  else
    return op(v[0], v[1]);
}
template <class T, class Op> T reduce(Vec<T> v, Op op) {
  for (int half = Vec<T>::parts / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v.part[i] = op(v.part[i], v.part[i + half]);
  return reduce_lanes<T, kRegisterBytes / int(sizeof(T))>(v.part[0], op);
}
template <class T> T reduce_sum(Vec<T> v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
template <class T> T reduce_max(Vec<T> v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}
template <class T> bool any(Vec<T> mask) {
  return reduce(mask, [](auto a, auto b) { return a | b; }) != 0;
}

// Loads and stores with conversion -------------------------------------------------------------------------------

inline Vec<int32_t> lane_index() {
  constexpr int32_t k[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return Vec<int32_t>::load(k);
}

// Numbers as they are stored. The 16-bit ones widen exactly, in the register.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
template <class T> Vec<T> load(const T* p) { return Vec<T>::load(p); }
template <class To, class From> Vec<To> load_integers(const From* p) {
  typedef From Narrow __attribute__((vector_size(kRegisterBytes / sizeof(To) * sizeof(From)), aligned(1), may_alias));
  Vec<To> v;
#if defined(__AVX512F__) // GCC 12 takes what comes below apart into halves
  if constexpr (sizeof(To) == 4 && sizeof(From) == 2)
    v.part[0] = (typename Vec<To>::Reg)_mm512_maskz_cvtepu16_epi32(
        0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  else if constexpr (sizeof(To) == 4 && sizeof(From) == 1)
    v.part[0] =
        (typename Vec<To>::Reg)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  else
#elif defined(__AVX2__)
  if constexpr (sizeof(To) == 4 && sizeof(From) == 2)
    for (int i = 0; i < 2; ++i)
      v.part[i] =
          (typename Vec<To>::Reg)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
  else
#endif
    for (int i = 0; i < Vec<To>::parts; ++i)
      v.part[i] = __builtin_convertvector(reinterpret_cast<const Narrow*>(p)[i], typename Vec<To>::Reg);
  return v;
}
// 16 bits in the low half of each lane, as floats.
inline Vec<float>::Reg widen_reg(BFloat16, Vec<int32_t>::Reg h) { return (Vec<float>::Reg)(h << 16); }
inline Vec<float>::Reg widen_reg(Float16, Vec<int32_t>::Reg h) {
  // The exponent and fraction moved into place and scaled by 2^112, which is exact for subnormal numbers as well.
  const Vec<int32_t>::Reg rest = (h & 0x7fff) << 13;
  const Vec<int32_t>::Reg finite = (Vec<int32_t>::Reg)((Vec<float>::Reg)rest * 0x1p112f);
  const Vec<int32_t>::Reg infinite = rest | 0x7f800000;
  return (Vec<float>::Reg)((rest >= (0x7c00 << 13) ? infinite : finite) | (h & 0x8000) << 16);
}
template <class Narrow> Vec<float> load_narrow(const Narrow* p) {
  const Vec<int32_t> h = load_integers<int32_t>(&p->bits);
  Vec<float> v;
  for (int i = 0; i < Vec<float>::parts; ++i) v.part[i] = widen_reg(Narrow{}, h.part[i]);
  return v;
}
inline Vec<float> load(const BFloat16* p) { return load_narrow(p); }
inline Vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
  Vec<float> v;
  v.part[0] = (Vec<float>::Reg)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return v;
#elif defined(__F16C__) && defined(__AVX2__)
  Vec<float> v;
  for (int i = 0; i < Vec<float>::parts; ++i)
    v.part[i] = (Vec<float>::Reg)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
  return v;
#else
  return load_narrow(p);
#endif
}

// The numbers in the lower and in the upper halves of the lanes.
inline void widen_pairs(BFloat16, Vec<int32_t>::Reg pairs, Vec<float>::Reg& even, Vec<float>::Reg& odd) {
  even = (Vec<float>::Reg)(pairs << 16), odd = (Vec<float>::Reg)(pairs & -0x10000);
}
inline void widen_pairs(Float16, Vec<int32_t>::Reg pairs, Vec<float>::Reg& even, Vec<float>::Reg& odd) {
#if defined(__AVX512F__)
  const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22,
                                         20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i apart = _mm512_maskz_permutexvar_epi16(~0u, order, (__m512i)pairs);
  even = (Vec<float>::Reg)_mm512_maskz_cvtph_ps(0xffff, _mm512_castsi512_si256(apart));
  odd = (Vec<float>::Reg)_mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_extracti64x4_epi64(0xf, apart, 1));
#elif defined(__F16C__) && defined(__AVX2__)
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, //
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i apart = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)pairs, order), 0xd8);
  even = (Vec<float>::Reg)_mm256_cvtph_ps(_mm256_castsi256_si128(apart));
  odd = (Vec<float>::Reg)_mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1));
#else
  even = widen_reg(Float16{}, pairs & 0xffff), odd = widen_reg(Float16{}, pairs >> 16 & 0xffff);
#endif
}

template <class T> Vec<T> broadcast(T x) { return x; }

inline uint16_t float_to_half(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00; // rounds to 2^16 or more
  if (u >= 0x38800000) return sign | uint16_t((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
  float magnitude; // a subnormal: adding 2^-1 * 2^0 leaves the multiple of 2^-24, rounded to even, in the low bits
  memcpy(&magnitude, &u, 4);
  magnitude += 0.5f;
  memcpy(&u, &magnitude, 4);
  return sign | uint16_t(u - 0x3f000000);
}
inline uint16_t float_to_bfloat(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

template <class T> T canonical(T x) { return x == x ? x : T(__builtin_nanf("")); } // one NaN for all targets

} // namespace
} // namespace headway
