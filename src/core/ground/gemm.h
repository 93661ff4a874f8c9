// The matrix micro-kernel that scores, weighted sums and linear layers share.
//
// C (rows x columns) = A B, each element one chain of fused multiply-adds over k in order, from 0. The chain is the
// contract of bits; the tile is only speed: R x P accumulators stay in registers while k walks, so each step loads P
// Vecs of B and R numbers of A for R * P fused multiply-adds. A tile over rows and columns never changes the order
// within one element, so any R and P give the same bits.
//
// B comes in columns of 16: row k of column block j is at b + j * b_block + k * b_row. A row-major matrix has b_block
// 16; panels of 16 keys, each (D, 16), have b_row 16 and b_block 16 D. Its numbers may be of 16 bits, widened as they
// are loaded; or both A and B hold pairs of 16-bit numbers, and k counts pairs.
#pragma once
#include "vec.h"

namespace headway {
namespace {

// Few rows wait for memory, not for arithmetic: while the tile reads B it prefetches what lies `ahead` numbers later
// into the second-level cache. Where B is in a cache already, prefetches would only take turns from the loads.
enum class Source { cache, memory };

// With `accumulate`, C goes on from what it holds, as if one chain had walked both stretches of k.
template <Source source, int R, int P, class T, class A, class B>
void tile(int64_t k_count, const A* __restrict a, int64_t a_row, const B* __restrict b, int64_t b_row, int64_t b_block,
          int64_t ahead, T* __restrict c, int64_t c_row, bool accumulate) {
  // Unrolled at once, or GCC keeps the accumulators in memory before and after the loop.
  Vec<T> sum[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sum[r][p] = Vec<T>(T(0));
  if (accumulate)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) sum[r][p] = load(c + r * c_row + 16 * p);
#pragma GCC unroll 4 // so that the processor foresees where the loop ends
  for (int64_t k = 0; k < k_count; ++k) {
    decltype(load(b)) row[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const B* from = b + k * b_row + p * b_block;
      row[p] = load(from);
      if constexpr (source == Source::memory) __builtin_prefetch(from + ahead, 0, 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto x = broadcast(a[r * a_row + k]);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) sum[r][p] = fma(x, row[p], sum[r][p]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) sum[r][p].store(c + r * c_row + 16 * p);
}

template <Source source, int R, int P, class T, class A, class B>
void tile_columns(int64_t columns, int64_t k_count, const A* a, int64_t a_row, const B* b, int64_t b_row,
                  int64_t b_block, int64_t ahead, T* c, int64_t c_row, bool accumulate) {
  int64_t j = 0;
  for (; j + 16 * P <= columns; j += 16 * P)
    tile<source, R, P>(k_count, a, a_row, b + j / 16 * b_block, b_row, b_block, ahead, c + j, c_row, accumulate);
  if constexpr (P > 1)
    tile_columns<source, R, P / 2>(columns - j, k_count, a, a_row, b + j / 16 * b_block, b_row, b_block, ahead, c + j,
                                   c_row, accumulate);
}

// C = A B. columns is a multiple of 16; rows may be any number: full tiles, then four, two and one, in tiles that are
// no narrower, so that few rows (decoding) still read B in long stretches.
template <Source source = Source::cache, class T, class A, class B>
void multiply(int64_t rows, int64_t columns, int64_t k_count, const A* a, int64_t a_row, const B* b, int64_t b_row,
              int64_t b_block, T* c, int64_t c_row, bool accumulate = false, int64_t ahead = 0) {
  int64_t i = 0;
  const auto run = [&]<int R, int P>() {
    for (; i + R <= rows; i += R)
      tile_columns<source, R, P>(columns, k_count, a + i * a_row, a_row, b, b_row, b_block, ahead, c + i * c_row, c_row,
                                 accumulate);
  };
  constexpr int vecs = sizeof(T) == 8 ? (kTileVecs + 1) / 2 : kTileVecs; // a Vec of doubles fills twice the registers
  run.template operator()<kTileRows, vecs>();
  run.template operator()<4, vecs>();
  run.template operator()<2, 2 * vecs>();
  run.template operator()<1, sizeof(T) == 8 ? kRowVecs / 2 : kRowVecs>();
}

} // namespace
} // namespace headway
