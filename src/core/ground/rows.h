// Rows of any floating type, read and written as the computing type. 16-bit numbers widen exactly and narrow to
// nearest even; on the way out there is one NaN, and no negative zero is made that the sum's history decides.
#pragma once
#include "../kernels.h"
#include "vec.h"

#include <type_traits> // types alone, no code
#include <utility>

namespace headway {
namespace {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

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

template <class T, class From> void read_as(const void* from, int64_t stride, int64_t n, T* to) {
  const From* p = static_cast<const From*>(from);
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = T(p[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = T(p[i * stride]);
}
template <class T, class From> void widen_as(const void* from, int64_t stride, int64_t n, T* to) {
  const From* p = static_cast<const From*>(from);
  int64_t i = 0;
  if (sizeof(T) == 4 && stride == 1)
    for (; i + 16 <= n; i += 16) load(p + i).store(reinterpret_cast<float*>(to) + i);
  for (; i < n; i += 16) {
    From narrow[16] = {};
    float wide[16];
    for (int64_t j = 0; j < min(n - i, 16); ++j) narrow[j] = p[(i + j) * stride];
    load(narrow).store(wide);
    for (int64_t j = 0; j < min(n - i, 16); ++j) to[i + j] = T(wide[j]);
  }
}

template <class T> void read_row(const void* from, DType dtype, int64_t stride, int64_t n, T* to) {
  switch (dtype) {
  case DType::f64: return read_as<T, double>(from, stride, n, to);
  case DType::f32: return read_as<T, float>(from, stride, n, to);
  case DType::boolean: return read_as<T, uint8_t>(from, stride, n, to);
  case DType::bf16: return widen_as<T, BFloat16>(from, stride, n, to);
  case DType::f16: return widen_as<T, Float16>(from, stride, n, to);
  }
}

// A float on the way to 16 bits. From a double it is rounded to odd (Boldo and Melquiond, 2008): what is lost leaves
// its mark in the last bit, so that the narrowing that follows is the only rounding that counts.
inline float round_to_odd(float x) { return x; }
inline float round_to_odd(double x) {
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
    for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = float_to_half(round_to_odd(from[i]));
    return;
  case DType::bf16:
    for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = float_to_bfloat(round_to_odd(from[i]));
    return;
  case DType::boolean: return;
  }
}

// Transposes a square of as many registers as a register has lanes: swaps its quarters, theirs, and so on.
template <int H, class Reg, size_t N> [[gnu::always_inline]] inline void transpose(Reg (&r)[N]) {
  const auto swap_quarters = [&]<size_t... I>(std::index_sequence<I...>) {
#pragma GCC unroll 16
    for (size_t i = 0; i < N; ++i) {
      if (i & H) continue;
      const Reg x = r[i], y = r[i + H];
      r[i] = __builtin_shufflevector(x, y, int(I & H ? N + I - H : I)...);
      r[i + H] = __builtin_shufflevector(x, y, int(I & H ? N + I : I + H)...);
    }
  };
  swap_quarters(std::make_index_sequence<N>());
  if constexpr (H > 1) transpose<H / 2>(r);
}

// The first bytes of a register, and zeros; nothing else is read.
template <class Reg> [[gnu::always_inline]] inline Reg load_partial(const void* from, int64_t bytes) {
#if defined(__AVX512BW__)
  return (Reg)_mm512_maskz_loadu_epi8(bytes == 64 ? ~0ull : (1ull << bytes) - 1, from);
#else
  Reg r{};
  memcpy(&r, from, size_t(bytes));
  return r;
#endif
}

// Up to 16 rows of n numbers become a panel (n, 16): each row a lane, 0 where there is none. Numbers of 16 bits travel
// in pairs and are widened on the way out. Meanwhile it prefetches the 16 rows from `next` on, a few lines at a time
// and in the order of their addresses, into the second-level cache: the processor's own prefetching follows that, but
// not 16 rows read side by side, which alone get half as much from memory.
template <class T, class From>
void make_panel(const From* rows, int64_t row_stride, int64_t count, int64_t n, T* panel, const From* next = nullptr) {
  constexpr int pair = sizeof(From) == 2 ? 2 : 1;
  using Word = std::conditional_t<pair == 2, int32_t, From>;
  using Reg = typename Vec<Word>::Reg;
  constexpr int lanes = kRegisterBytes / int(sizeof(Word)), step = lanes * pair;
  for (int64_t d = 0, column = 0; d < n; d += step) {
    const int64_t columns = min(step, n - d);
    for (int i = 0; i < 16; i += lanes) {
      const From* from = rows + i * row_stride + d;
      Reg r[lanes];
      if (columns == step && count == 16) {
#pragma GCC unroll 16
        for (int j = 0; j < lanes; ++j) memcpy(&r[j], from + j * row_stride, sizeof(Reg));
      } else {
        for (int j = 0; j < lanes; ++j)
          r[j] = load_partial<Reg>(from + j * row_stride, i + j < count ? columns * int64_t(sizeof(From)) : 0);
      }
      for (int j = 0; j < lanes && next; ++j) {
        __builtin_prefetch(next + column, 0, 2);
        if ((column += step) >= n) column = 0, next += row_stride;
      }
      transpose<lanes / 2>(r);
      const auto put = [&](int64_t j, const auto& reg) {
        if (j < columns) memcpy(panel + (d + j) * 16 + i, &reg, sizeof reg);
      };
#pragma GCC unroll 16
      for (int j = 0; j < lanes; ++j) {
        if constexpr (pair == 2) {
          put(2 * j, widen_reg(From{}, r[j] & 0xffff));
          put(2 * j + 1, widen_reg(From{}, r[j] >> 16 & 0xffff));
        } else {
          put(j, r[j]);
        }
      }
    }
  }
}

// Keys, values or weights as the kernels read them: in memory of the caller's, perhaps of 16 bits, or packed.
struct Stored {
  const void* data;
  DType dtype;
  int64_t row, block; // strides as in gemm.h
  int64_t ahead;      // to what is read soon after

  // Whether numbers of this type can be computed with as they are.
  template <class T> static bool kept(DType dtype) {
    return dtype == dtype_of<T> || (sizeof(T) == 4 && (dtype == DType::bf16 || dtype == DType::f16));
  }
  // Calls visit with a pointer of the right type to element `offset`.
  template <class T, class Visit> auto at(int64_t offset, Visit visit) const {
    if constexpr (sizeof(T) == 4) {
      if (dtype == DType::bf16) return visit(static_cast<const BFloat16*>(data) + offset);
      if (dtype == DType::f16) return visit(static_cast<const Float16*>(data) + offset);
    }
    return visit(static_cast<const T*>(data) + offset);
  }
};

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
template <class... Sizes> int64_t saturating_product(Sizes... sizes) {
  const double product = (1.0 * ... * double(sizes));
  return product < 0x1p62 ? int64_t(product) : int64_t(1) << 62;
}

} // namespace
} // namespace headway
