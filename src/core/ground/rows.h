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

// Memory that is read soon, prefetched a little at every step, row after row: the processor's own prefetching follows
// one long stream, but not what is read a piece of each row at a time.
class Ahead {
public:
  Ahead() = default;
  Ahead(const char* row, int64_t stride, int64_t bytes, int64_t rows) // from one row to the next; of one row
      : at_(row), end_(row + bytes), back_(stride - bytes), bytes_(bytes), rows_(bytes ? rows : 0) {}

  bool empty() const { return rows_ <= 0; }
  void prefetch(int64_t some) {
    for (int64_t i = 0; i < some && !empty(); i += 64) step<64>();
  }
  template <int some> [[gnu::always_inline]] void step() { // where not empty; behind the last row it does no harm
    for (int i = 0; i < some; i += 64) __builtin_prefetch(at_ + i);
    at_ += some;
    if (at_ >= end_) at_ = end_ + back_, end_ = at_ + bytes_, --rows_;
  }

private:
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t back_ = 0, bytes_ = 0, rows_ = 0;
};
// Where all is in a cache already, prefetches would only take turns from the loads.
struct Nothing {
  template <int> void step() {}
};

// Sixteen bytes from each of a register's rows, those that are `step` rows apart.
template <class Reg> [[gnu::always_inline]] inline Reg gather_parts(const char* from, [[maybe_unused]] int64_t step) {
#if defined(__AVX512F__)
  const auto half = [&](int64_t i) {
    const auto* low = reinterpret_cast<const float*>(from + i * step);
    const auto* high = reinterpret_cast<const float*>(from + (i + 1) * step);
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
  };
  return (Reg)_mm512_maskz_insertf32x8(0xffff, _mm512_castps256_ps512(half(0)), half(2), 1);
#elif defined(__AVX2__)
  const __m128 low = _mm_loadu_ps(reinterpret_cast<const float*>(from));
  return (Reg)_mm256_insertf128_ps(_mm256_castps128_ps256(low),
                                   _mm_loadu_ps(reinterpret_cast<const float*>(from + step)), 1);
#else
  Reg reg;
  memcpy(&reg, from, sizeof reg);
  return reg;
#endif
}

// Transposes squares of as many words as 16 bytes hold, each square in the same 16 bytes of all registers.
template <class Reg, size_t N> [[gnu::always_inline]] inline void transpose_squares(Reg (&r)[N]) {
  constexpr int lanes = sizeof(Reg) / sizeof(r[0][0]);
  const auto zip = [&]<size_t... I>(Reg x, Reg y, int half, std::index_sequence<I...>) {
    // Pairs of lanes of x and y in turns: of the lower half of each square, or of the upper one.
    return half ? __builtin_shufflevector(x, y, int(I / N * N + N / 2 + I % N / 2 + I % 2 * lanes)...)
                : __builtin_shufflevector(x, y, int(I / N * N + I % N / 2 + I % 2 * lanes)...);
  };
  const auto join = [&]<size_t... I>(Reg x, Reg y, int half, std::index_sequence<I...>) {
    return half ? __builtin_shufflevector(x, y, int(I / 4 * 4 + 2 + I % 2 + I % 4 / 2 * lanes)...)
                : __builtin_shufflevector(x, y, int(I / 4 * 4 + I % 2 + I % 4 / 2 * lanes)...);
  };
  constexpr auto all = std::make_index_sequence<lanes>();
  if constexpr (N == 2) {
    const Reg x = r[0], y = r[1];
    r[0] = zip(x, y, 0, all), r[1] = zip(x, y, 1, all);
  } else {
    static_assert(N == 4);
    const Reg a = zip(r[0], r[1], 0, all), b = zip(r[0], r[1], 1, all);
    const Reg c = zip(r[2], r[3], 0, all), d = zip(r[2], r[3], 1, all);
    r[0] = join(a, c, 0, all), r[1] = join(a, c, 1, all);
    r[2] = join(b, d, 0, all), r[3] = join(b, d, 1, all);
  }
}

// Transposes the line of the cache that begins at rows[place] in each of 16 rows, which are `step` bytes apart: calls
// visit(place, column, part, numbers) for each place, each column and each part of its Vec, a row's number in the lane
// of the row. The columns of one place and part come in order. Numbers of 16 bits travel in pairs and are widened on
// the way out.
template <size_t places, class From, class Visit>
[[gnu::always_inline]] inline void each_column(const From* const (&rows)[places], int64_t step, Visit visit) {
  constexpr bool pairs = sizeof(From) == 2;
  using Word = std::conditional_t<pairs, int32_t, From>;
  using Reg = typename Vec<Word>::Reg;
  constexpr int words = 16 / int(sizeof(Word)), lanes = kRegisterBytes / int(sizeof(Word));
  constexpr int squares = kRegisterBytes / 16; // of one register
#pragma GCC unroll 8
  for (int part = 0; part < Vec<Word>::parts; ++part)
#pragma GCC unroll 4
    for (int begin = 0; begin < 64; begin += kRegisterBytes)
#pragma GCC unroll 2
      for (size_t place = 0; place < places; ++place) {
        // Rows one after the other: they are often a power of two apart, and share few places in the cache, so that a
        // line that is read in pieces is lost in between.
        const char* from = reinterpret_cast<const char*>(rows[place]) + part * lanes * step + begin;
        Reg square[squares][words];
#pragma GCC unroll 4
        for (int i = 0; i < words; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < squares; ++j) square[j][i] = gather_parts<Reg>(from + i * step + 16 * j, words * step);
#pragma GCC unroll 4
        for (int j = 0; j < squares; ++j) {
          transpose_squares(square[j]);
#pragma GCC unroll 4
          for (int i = 0; i < words; ++i) {
            const int word = (begin / 16 + j) * words + i;
            if constexpr (pairs) {
              Vec<float>::Reg even, odd;
              widen_pairs(From{}, square[j][i], even, odd);
              visit(place, 2 * word, part, even), visit(place, 2 * word + 1, part, odd);
            } else {
              visit(place, word, part, square[j][i]);
            }
          }
        }
      }
}

// Up to 16 rows of n numbers become a panel (n, 16): each row a lane, 0 where there is none. Meanwhile as much of what
// comes next is prefetched.
template <class T, class From>
void make_panel(const From* rows, int64_t row_stride, int64_t count, int64_t n, T* panel, Ahead* next = nullptr) {
  constexpr int64_t line = 64 / int(sizeof(From));
  const int64_t step = row_stride * int64_t(sizeof(From));
  const auto store_at = [](T* to) {
    return [to](size_t, int column, int part, const auto& numbers) {
      memcpy(to + 16 * column + part * int(sizeof numbers / sizeof(T)), &numbers, sizeof numbers);
    };
  };
  int64_t d = 0;
  for (; count == 16 && d + line <= n; d += line) {
    if (next) next->prefetch(16 * 64);
    each_column({rows + d}, step, store_at(panel + d * 16));
  }
  if (d == n) return;
  From part[16 * line] = {}; // of rows or lines that are cut: nothing else is read
  for (; d < n; d += line) {
    const int64_t columns = min(line, n - d);
    for (int64_t i = 0; i < count; ++i)
      memcpy(part + i * line, rows + i * row_stride + d, size_t(columns) * sizeof(From));
    if (columns == line) {
      each_column({&part[0]}, 64, store_at(panel + d * 16));
      continue;
    }
    T cut[line * 16];
    each_column({&part[0]}, 64, store_at(cut));
    memcpy(panel + d * 16, cut, size_t(columns) * 16 * sizeof(T));
  }
}

// Keys, values or weights as the kernels read them: in memory of the caller's, perhaps of 16 bits, or packed.
struct Stored {
  const void* data;
  DType dtype;
  int64_t row, block; // strides as in gemm.h

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
