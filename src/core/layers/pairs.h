// linear for precision="fast": x and w are rounded to bfloat16 and multiplied in pairs along the inner axis.
//
// A unit is a block of rows by a span of columns. For each stretch of the inner axis its rows of x become pairs, or are
// read in place, and w is packed 64 columns at a time; the sums of a unit stay in the second-level cache.
#pragma once
#include "../ground/pairs.h"
#include "linear.h"

namespace headway {
namespace {

constexpr Cuts kPairCuts = {.most_rows = 512, .most_columns = 1024, .pack_rows = 48, .pack_columns = 32};
constexpr int64_t kPairDepth = 512; // pairs of the inner axis, at most: of 512 rows they take 1 MB
constexpr int64_t kPairPanel = 64;  // columns

struct PairLinear {
  const Linear& task;
  const Plan& plan;
  BFloat16Pair *x_pairs, *packed;
  float *sums, *buffer;

  PairLinear(const Linear& t, const Plan& p, Arena& arena) : task(t), plan(p) {
    const int64_t rows = round_up(plan.rows, kPairRows), width = round_up(plan.span, 16);
    x_pairs = arena.take<BFloat16Pair>(rows * kPairDepth);
    packed = arena.take<BFloat16Pair>(kPairPanel * kPairDepth);
    sums = arena.take<float>(rows * width);
    buffer = arena.take<float>(max(18 * kPairDepth, width)); // a column of floats, behind 16 columns of pairs
  }

  // Whether all results are finite; if not, none is written.
  bool run(int64_t unit, Stop* stop) {
    const auto [first_row, rows, first, columns] = LinearUnit(task, plan, unit);
    const int64_t width = round_up(columns, 16);
    if (task.K == 0) memset(sums, 0, size_t(rows * width) * sizeof(float));
    for (int64_t k = 0; k < task.K; k += 2 * kPairDepth) {
      const int64_t count = min(2 * kPairDepth, task.K - k), pairs = round_up((count + 1) / 2, kPairStep);
      int64_t x_row;
      const BFloat16Pair* x = read_x(first_row, rows, k, count, pairs, x_row);
      for (int64_t j = 0; j < columns; j += kPairPanel) {
        const int64_t some = min(kPairPanel, columns - j);
        if (stop->after(rows * some * count)) return true;
        pack(k, count, pairs, first + j, some);
        multiply_pairs(rows, round_up(some, 16), pairs, x, x_row, packed, 16, 16 * pairs, sums + j, width, k > 0);
      }
    }
    memset(buffer, 0, size_t(width) * sizeof(float));
    if (task.b.data) read_row(address(task.b, 0, first), task.b.dtype, task.b.stride[0], columns, buffer);
    Vec<float> poison = 0.0f; // becomes NaN: x * 0 is 0 for finite x alone
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; j += 16) {
        const Vec<float> sum = load(sums + i * width + j) + load(buffer + j);
        sum.store(sums + i * width + j);
        poison = poison + sum * Vec<float>(0.0f);
      }
    if (any(poison != poison)) return false;
    for (int64_t i = 0; i < rows; ++i)
      write_row(sums + i * width, columns, address(task.y, 0, first_row + i, first), task.y.dtype);
    return true;
  }

private:
  // Tiles read kPairRows rows at least: in place only where there are so many.
  const BFloat16Pair* read_x(int64_t first_row, int64_t rows, int64_t k, int64_t count, int64_t pairs, int64_t& x_row) {
    const View& x = task.x;
    x_row = x.stride[0] / 2;
    if (rows % kPairRows == 0)
      if (const auto* in_place = as_pairs(address(x, 0, first_row, k), x.dtype, x.stride[1], x.stride[0], count, pairs))
        return in_place;
    x_row = pairs;
    for (int64_t i = 0; i < rows; ++i) {
      read_row(address(x, 0, first_row + i, k), x.dtype, x.stride[1], count, buffer);
      narrow_row(buffer, count, pairs, x_pairs + i * pairs);
    }
    return x_pairs;
  }
  // Up to kPairPanel columns of w, in panels (pairs, 16).
  void pack(int64_t k, int64_t count, int64_t pairs, int64_t first, int64_t columns) {
    const bool by_column = task.w.stride[0] == 1 && task.w.stride[1] != 1;
    if (!by_column) return pack_rows(k, count, pairs, first, columns);
    for (int64_t j = 0; j < columns; j += 16)
      pack_columns(k, count, pairs, first + j, min(16, columns - j), packed + j * pairs);
  }
  // Two rows at a time.
  void pack_rows(int64_t k, int64_t count, int64_t pairs, int64_t first, int64_t columns) {
    const View& w = task.w;
    const bool whole = w.stride[1] == 1 && columns % 16 == 0;
    memset(buffer, 0, 2 * kPairPanel * sizeof(float));
    const auto row = [&](int64_t i) { return address(w, 0, k + i, first); };
    const auto floats = [&](int64_t i, float* to) -> const float* {
      if (i >= count)
        memset(to, 0, kPairPanel * sizeof(float));
      else if (whole && w.dtype == DType::f32)
        return reinterpret_cast<const float*>(row(i));
      else
        read_row(row(i), w.dtype, w.stride[1], columns, to);
      return to;
    };
    for (int64_t i = 0; i < pairs; ++i) {
      for (int64_t later = 2 * i + kPrefetchRows; later < 2 * i + kPrefetchRows + 2; ++later) // as in LinearBlock::pack
        for (int64_t byte = 0; byte < columns * item_size(w.dtype); byte += 64) __builtin_prefetch(row(later) + byte);
      BFloat16Pair* to = packed + 16 * i;
      if (whole && w.dtype == DType::bf16 && 2 * i + 1 < count) {
        const auto* even = reinterpret_cast<const uint16_t*>(row(2 * i));
        const uint16_t* odd = even + w.stride[0];
        for (int64_t j = 0; j < columns; j += 16)
          (load_integers<int32_t>(even + j) | load_integers<int32_t>(odd + j) << 16)
              .store(reinterpret_cast<int32_t*>(to + j * pairs));
      } else {
        const float *even = floats(2 * i, buffer), *odd = floats(2 * i + 1, buffer + kPairPanel);
        for (int64_t j = 0; j < columns; j += 16) join_rows(even + j, odd + j, 16, to + j * pairs);
      }
    }
  }
  void pack_columns(int64_t k, int64_t count, int64_t pairs, int64_t column, int64_t columns, BFloat16Pair* panel) {
    const View& w = task.w;
    auto* words = reinterpret_cast<int32_t*>(panel);
    if (const auto* in_place = as_pairs(address(w, 0, k, column), w.dtype, 1, w.stride[1], count, pairs))
      return make_panel(reinterpret_cast<const int32_t*>(in_place), w.stride[1] / 2, columns, pairs, words);
    auto* lanes = reinterpret_cast<BFloat16Pair*>(buffer);
    float* lane = buffer + 16 * pairs;
    for (int64_t i = 0; i < columns; ++i) {
      read_row(address(w, 0, k, column + i), w.dtype, 1, count, lane);
      narrow_row(lane, count, pairs, lanes + i * pairs);
    }
    make_panel(reinterpret_cast<const int32_t*>(lanes), pairs, columns, pairs, words);
  }
};

} // namespace
} // namespace headway
