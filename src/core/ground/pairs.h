// Products of bfloat16 pairs, for precision="fast": numbers are rounded to bfloat16 and multiplied two at a time, sums
// are float32. The instructions (AVX512-BF16, and AMX, whose tiles hold 16 rows of 16 pairs) round and flush in ways of
// their own, so none of this is under the contract of bits.
#pragma once
#include "gemm.h"
#include "rows.h"

#include <immintrin.h>

namespace headway {
namespace {

// Two bfloat16 numbers side by side, the earlier in the low half.
struct BFloat16Pair {
  uint32_t bits;
};
inline Vec<int32_t> load(const BFloat16Pair* p) { return Vec<int32_t>::load(reinterpret_cast<const int32_t*>(p)); }
inline Vec<int32_t> broadcast(BFloat16Pair x) { return int32_t(x.bits); }
// c + the dot products of pairs.
inline Vec<float> fma(Vec<int32_t> a, Vec<int32_t> b, Vec<float> c) {
  c.part[0] = (Vec<float>::Reg)_mm512_dpbf16_ps((__m512)c.part[0], (__m512bh)a.part[0], (__m512bh)b.part[0]);
  return c;
}
// Floats as bfloat16, to nearest even.
inline __m256i narrow(Vec<float> x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x.part[0]); }
// Of two rows of floats, the pairs that stand in one column.
inline void join_rows(const float* even, const float* odd, int64_t n, BFloat16Pair* to) {
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(load(even + i))),
                  high = _mm512_cvtepu16_epi32(narrow(load(odd + i)));
    _mm512_storeu_si512(to + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

#if defined(__AMX_BF16__)

constexpr int64_t kPairRows = 16, kPairStep = 16; // of a tile of A: rows, and pairs along k

// Eight tiles of 16 rows of 64 bytes. The thread's own configuration, if it has one, comes back in the end.
class Tiles {
public:
  Tiles() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Configuration all{};
    all.palette = 1;
    for (int i = 0; i < 8; ++i) all.bytes[i] = 64, all.rows[i] = 16;
    load(all);
  }
  ~Tiles() {
    if (before_.palette)
      load(before_);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;

private:
  struct Configuration {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  // Not _tile_loadconfig: GCC 12's says that it reads 8 bytes, and the rest may be dropped as never read.
  static void load(const Configuration& c) { asm volatile("ldtilecfg %0" : : "m"(c)); }
  Configuration before_;
};

// As multiply() in gemm.h: 16 rows at least are computed, k_count is a multiple of kPairStep. Four tiles of C wait for
// one of A, so that loading tiles takes less time than multiplying them.
[[gnu::noinline]] inline void multiply_pairs(int64_t rows, int64_t columns, int64_t k_count, const BFloat16Pair* a,
                                             int64_t a_row, const BFloat16Pair* b, int64_t b_row, int64_t b_block,
                                             float* c, int64_t c_row, bool accumulate) {
  asm volatile("" ::: "memory"); // GCC does not know that tile loads read memory
  const int64_t a_bytes = 4 * a_row, b_bytes = 4 * b_row, c_bytes = 4 * c_row;
  for (int64_t i = 0; i < rows; i += 16) {
    const BFloat16Pair* a_tile = a + i * a_row;
    int64_t j = 0;
    for (; j + 64 <= columns; j += 64) {
      float* to = c + i * c_row + j;
      if (accumulate) {
        _tile_loadd(0, to, c_bytes);
        _tile_loadd(1, to + 16, c_bytes);
        _tile_loadd(2, to + 32, c_bytes);
        _tile_loadd(3, to + 48, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < k_count; k += kPairStep) {
        const BFloat16Pair* from = b + j / 16 * b_block + k * b_row;
        _tile_loadd(4, a_tile + k, a_bytes);
        _tile_loadd(5, from, b_bytes);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, from + b_block, b_bytes);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, from + 2 * b_block, b_bytes);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, from + 3 * b_block, b_bytes);
        _tile_dpbf16ps(3, 4, 5);
      }
      _tile_stored(0, to, c_bytes);
      _tile_stored(1, to + 16, c_bytes);
      _tile_stored(2, to + 32, c_bytes);
      _tile_stored(3, to + 48, c_bytes);
    }
    for (; j < columns; j += 16) {
      float* to = c + i * c_row + j;
      if (accumulate)
        _tile_loadd(0, to, c_bytes);
      else
        _tile_zero(0);
      for (int64_t k = 0; k < k_count; k += kPairStep) {
        _tile_loadd(4, a_tile + k, a_bytes);
        _tile_loadd(5, b + j / 16 * b_block + k * b_row, b_bytes);
        _tile_dpbf16ps(0, 4, 5);
      }
      _tile_stored(0, to, c_bytes);
    }
  }
}

#else

constexpr int64_t kPairRows = kTileRows, kPairStep = 1;
struct Tiles {}; // nothing to configure

inline void multiply_pairs(int64_t rows, int64_t columns, int64_t k_count, const BFloat16Pair* a, int64_t a_row,
                           const BFloat16Pair* b, int64_t b_row, int64_t b_block, float* c, int64_t c_row,
                           bool accumulate) {
  multiply(rows, columns, k_count, a, a_row, b, b_row, b_block, c, c_row, accumulate);
}

#endif

// n floats as pairs, and zeros up to `pairs` of them; the floats have room for these.
inline void narrow_row(float* row, int64_t n, int64_t pairs, BFloat16Pair* to) {
  for (int64_t i = n; i < 2 * pairs; ++i) row[i] = 0;
  write_row(row, 2 * pairs, to, DType::bf16);
}
// A row of bfloat16 numbers that may be read as these pairs, or nullptr.
inline const BFloat16Pair* as_pairs(const void* row, DType dtype, int64_t stride, int64_t row_stride, int64_t n,
                                    int64_t pairs) {
  const bool fits = dtype == DType::bf16 && stride == 1 && row_stride % 2 == 0 && n == 2 * pairs &&
                    reinterpret_cast<uintptr_t>(row) % 4 == 0;
  return fits ? static_cast<const BFloat16Pair*>(row) : nullptr;
}

} // namespace
} // namespace headway
