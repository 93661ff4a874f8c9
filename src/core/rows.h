// Rows of any floating type, read and written as the computing type. 16-bit numbers widen exactly and narrow to
// nearest even; on the way out there is one NaN, and no negative zero is made that the sum's history decides.
#pragma once
#include "kernels.h"
#include "vec.h"

#include <utility> // index_sequence: a type, no code

namespace headway {
namespace {

inline int64_t item_size(DType t) {
  switch (t) {
  case DType::f64: return 8;
  case DType::f32: return 4;
  case DType::boolean: return 1;
  default: return 2;
  }
}

template <class T> constexpr DType dtype_of = sizeof(T) == 8 ? DType::f64 : DType::f32;

// The address of element (x, y, z) of one batch item.
inline char* address(const View& v, int64_t offset, int64_t x = 0, int64_t y = 0, int64_t z = 0) {
  return static_cast<char*>(v.data) +
         (offset + x * v.stride[0] + y * v.stride[1] + z * v.stride[2]) * item_size(v.dtype);
}
// Where batch item `index` (in C order) begins, in elements.
inline int64_t batch_offset(const Batch& batch, const View& v, int64_t index) {
  int64_t offset = 0;
  for (int i = batch.axes - 1; i >= 0; --i) {
    offset += index % batch.shape[i] * v.batch[i];
    index /= batch.shape[i];
  }
  return offset;
}

template <class T, class From, class Convert>
void read_as(const void* from, int64_t stride, int64_t n, T* to, Convert widen) {
  const From* p = static_cast<const From*>(from);
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = T(widen(p[i]));
  else
    for (int64_t i = 0; i < n; ++i) to[i] = T(widen(p[i * stride]));
}

inline void read_halves(const uint16_t* p, int64_t n, float* to) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
#endif
  for (; i < n; ++i) to[i] = half_to_float(p[i]);
}

template <class T> void read_row(const void* from, DType dtype, int64_t stride, int64_t n, T* to) {
  switch (dtype) {
  case DType::f64: return read_as<T, double>(from, stride, n, to, [](double x) { return x; });
  case DType::f32: return read_as<T, float>(from, stride, n, to, [](float x) { return x; });
  case DType::bf16: return read_as<T, uint16_t>(from, stride, n, to, bfloat_to_float);
  case DType::boolean: return read_as<T, uint8_t>(from, stride, n, to, [](uint8_t x) { return x; });
  case DType::f16:
    if constexpr (sizeof(T) == 4)
      if (stride == 1) return read_halves(static_cast<const uint16_t*>(from), n, to);
    return read_as<T, uint16_t>(from, stride, n, to, half_to_float);
  }
}

// A float on the way to 16 bits. From a double it is rounded to odd (Boldo and Melquiond, 2008): what is lost leaves
// its mark in the last bit, so that the narrowing that follows is the only rounding that counts.
inline float to_odd_float(float x) { return x; }
inline float to_odd_float(double x) {
  float f = float(x);
  if (double(f) == x || x != x) return f;
  uint32_t u;
  memcpy(&u, &f, 4);
  if (__builtin_fabs(double(f)) > __builtin_fabs(x)) u -= 1; // back to the neighbour towards zero
  u |= 1;
  memcpy(&f, &u, 4);
  return f;
}

// Rows are written where the last axis is contiguous: the bindings allocate them so.
template <class T> void write_row(const T* from, int64_t n, void* to, DType dtype) {
  switch (dtype) {
  case DType::f64:
    for (int64_t i = 0; i < n; ++i) static_cast<double*>(to)[i] = canonical(double(from[i]));
    return;
  case DType::f32:
    for (int64_t i = 0; i < n; ++i) static_cast<float*>(to)[i] = canonical(float(from[i]));
    return;
  case DType::f16:
    for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = float_to_half(to_odd_float(from[i]));
    return;
  case DType::bf16:
    for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = float_to_bfloat(to_odd_float(from[i]));
    return;
  case DType::boolean: return;
  }
}

// 16 rows of n numbers become a panel (n, 16): each row a lane. Floats go four rows by four columns at a time, as many
// such blocks side by side as a register holds, which keeps packing at 1 or 2 % of a prefill.
inline Vec<float>::Reg load_quads(const float* p, int64_t step) { // p[0..3], p[step..], ...: four of each
  using Quad = VectorType<float, 16>::type;
  const auto quad = [&](int i) {
    Quad q;
    memcpy(&q, p + i * step, 16);
    return q;
  };
#if defined(__AVX512F__)
  const auto low = __builtin_shufflevector(quad(0), quad(1), 0, 1, 2, 3, 4, 5, 6, 7);
  const auto high = __builtin_shufflevector(quad(2), quad(3), 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(quad(0), quad(1), 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return quad(0);
#endif
}
template <int A, int B, int C, int D, class V, size_t... I>
V pick_quads(V x, V y, std::index_sequence<I...>) { // A .. D: 0 to 3 of x's quad, 4 to 7 of y's
  constexpr int pick[4] = {A, B, C, D}, lanes = sizeof...(I);
  return __builtin_shufflevector(x, y, (int(I) / 4 * 4 + pick[I % 4] % 4 + pick[I % 4] / 4 * lanes)...);
}
template <class T> void make_panel(const T* rows, int64_t row_stride, int64_t n, T* panel) {
  int64_t d = 0;
  if constexpr (sizeof(T) == 4) {
    using Reg = Vec<float>::Reg;
    constexpr int lanes = kRegisterBytes / 4;
    constexpr std::make_index_sequence<lanes> all{};
    for (; d + 4 <= n; d += 4)
      for (int i = 0; i < 16; i += lanes) {
        Reg r[4];
        for (int j = 0; j < 4; ++j) r[j] = load_quads(rows + (i + j) * row_stride + d, 4 * row_stride);
        const Reg a = pick_quads<0, 4, 1, 5>(r[0], r[1], all), b = pick_quads<2, 6, 3, 7>(r[0], r[1], all);
        const Reg c = pick_quads<0, 4, 1, 5>(r[2], r[3], all), e = pick_quads<2, 6, 3, 7>(r[2], r[3], all);
        const Reg column[4] = {pick_quads<0, 1, 4, 5>(a, c, all), pick_quads<2, 3, 6, 7>(a, c, all),
                               pick_quads<0, 1, 4, 5>(b, e, all), pick_quads<2, 3, 6, 7>(b, e, all)};
        for (int j = 0; j < 4; ++j) memcpy(panel + (d + j) * 16 + i, &column[j], sizeof(Reg));
      }
  }
  for (; d < n; ++d)
    for (int i = 0; i < 16; ++i) panel[d * 16 + i] = rows[i * row_stride + d];
}

// A workspace is handed out front to back, every piece on a 64-byte line. With no memory it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T> T* take(int64_t n) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

// A product of sizes for Plan::work, where it may be rough but must not overflow.
template <class... Sizes> int64_t rough_product(Sizes... sizes) {
  const double product = (1.0 * ... * double(sizes));
  return product < 0x1p62 ? int64_t(product) : int64_t(1) << 62;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

} // namespace
} // namespace headway
