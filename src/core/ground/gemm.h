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
#include "rows.h"

namespace headway {
namespace {

// With `accumulate`, C goes on from what it holds, as if one chain had walked both stretches of k.
template <int R, int P, class T, class A, class B, class Next>
void tile(int64_t k_count, const A* __restrict a, int64_t a_row, const B* __restrict b, int64_t b_row, int64_t b_block,
          T* __restrict c, int64_t c_row, bool accumulate, Next& to_come) {
  constexpr int bytes = 16 * P * int(sizeof(B)); // of a step
  Next next = to_come;                           // in registers
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
    }
    next.template step<bytes>();
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
  to_come = next;
}

template <int R, int P, class T, class A, class B, class Next>
void tile_columns(int64_t columns, int64_t k_count, const A* a, int64_t a_row, const B* b, int64_t b_row,
                  int64_t b_block, T* c, int64_t c_row, bool accumulate, Next& next) {
  int64_t j = 0;
  for (; j + 16 * P <= columns; j += 16 * P)
    tile<R, P>(k_count, a, a_row, b + j / 16 * b_block, b_row, b_block, c + j, c_row, accumulate, next);
  if constexpr (P > 1)
    tile_columns<R, P / 2>(columns - j, k_count, a, a_row, b + j / 16 * b_block, b_row, b_block, c + j, c_row,
                           accumulate, next);
}

// C = A B. columns is a multiple of 16; rows may be any number: full tiles, then four, two and one, in tiles that are
// no narrower, so that few rows (decoding) still read B in long stretches. Few rows wait for memory: while the first of
// them read B, as much of what comes next is prefetched.
template <class T, class A, class B>
void multiply(int64_t rows, int64_t columns, int64_t k_count, const A* a, int64_t a_row, const B* b, int64_t b_row,
              int64_t b_block, T* c, int64_t c_row, bool accumulate = false, Ahead next = {}) {
  int64_t i = 0;
  Nothing nothing;
  const auto run = [&]<int R, int P>() {
    for (; i + R <= rows; i += R) {
      const auto with = [&](auto& to_come) {
        tile_columns<R, P>(columns, k_count, a + i * a_row, a_row, b, b_row, b_block, c + i * c_row, c_row, accumulate,
                           to_come);
      };
      i == 0 && !next.empty() ? with(next) : with(nothing);
    }
  };
  constexpr int vecs = sizeof(T) == 8 ? (kTileVecs + 1) / 2 : kTileVecs; // a Vec of doubles fills twice the registers
  run.template operator()<kTileRows, vecs>();
  run.template operator()<4, vecs>();
  run.template operator()<2, 2 * vecs>();
  run.template operator()<1, sizeof(T) == 8 ? kRowVecs / 2 : kRowVecs>();
}

} // namespace
} // namespace headway
