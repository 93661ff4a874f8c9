// linear: y = x w + b.
//
// Each element is a tree over blocks of the inner axis, each block one chain of kChain fused multiply-adds in order: a
// single long chain would lose accuracy beside libraries that keep many partial sums. Which elements are computed
// together, and in how many visits a chain grows, changes no bit; so few rows and many take different ways. Many rows
// wait for arithmetic: weights are packed once for all of them, a little at a time between the products with those that
// are packed already. Few rows wait for memory: weights are read once, where they are and as they are. Weights that
// serve many calls can be packed for all of them, by `pack`.
#pragma once
#include "../ground/gemm.h"
#include "../ground/makespan.h"
#include "../ground/rows.h"
#include "../ground/tree.h"

namespace headway {
namespace {

// Few rows wait for memory; from more on, packing w for all of them costs less than it saves. Processors with AVX2
// alone (measured: Zen 3) wait for arithmetic sooner. They also follow all sixteen of the columns that are read side by
// side, and a prefetch then takes as long as a load.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kFewRows = 12;
constexpr bool kPrefetchesColumns = false;
#else
constexpr int64_t kFewRows = 24;
constexpr bool kPrefetchesColumns = true;
#endif
constexpr int64_t kFewRowsOfPanels = 64; // read in place; for more, panels are widened first, as others are packed
constexpr int64_t kSplitRows = 48;       // least rows of a unit of more, where there are more threads than units,
constexpr int64_t kSplitColumns = 32;    // and columns
constexpr int64_t kStepRows = 12;        // rows of x between which the next weights are packed
constexpr int64_t kPrefetchRows = 16;    // how many rows before that they are prefetched
constexpr int64_t kPanelColumns = 64;    // weights are packed so many columns at a time, 64 KB
constexpr int64_t kFewColumns = 1024;    // most columns of a unit of few rows: a page of each row of w; for up to
constexpr int64_t kFourRows = 4;         // so many rows four pages, and the accumulators still take 64 KB
constexpr int64_t kPanelDepth = 64;      // of the inner axis, where few rows need panels: 16 KB
constexpr int64_t kPartBytes = 2048;     // of each of 16 columns, prefetched while as much is multiplied
constexpr int64_t kFewBytes = 32 << 10;  // of w between two visits of an accumulator that waits in the cache

inline bool has_few_rows(const Linear& task) { return task.M <= (task.w_in_panels ? kFewRowsOfPanels : kFewRows); }

// Rows and columns of a unit of few rows: so that the threads end soonest. A thread that is late by chance keeps the
// others waiting for a part of its last unit; but rows of w are read in stretches that are as long as they can be.
inline void cut_few(const Linear& task, int64_t threads, Plan& plan) {
  const int64_t widest = task.M <= kFourRows ? 4 * kFewColumns : kFewColumns;
  const int64_t least = max(threads, (task.N + widest - 1) / widest);
  const int64_t most = task.w.stride[1] == 1 ? (least + threads - 1) / threads * threads : least + 4 * threads;
  plan.rows = max(task.M, 1);
  Soonest soonest;
  for (int64_t parts = least; parts <= most; ++parts) {
    const int64_t span = round_up(max((task.N + parts - 1) / parts, 1), 16);
    const auto cost = [](int64_t columns) { return double(columns); };
    if (soonest.than(makespan(1, task.N, span, threads, cost) + kLate * cost(span))) plan.span = span;
  }
}
// Of many rows: each unit packs its weights, and its rows of x.
struct Cuts {
  int64_t most_rows, most_columns;
  int64_t pack_rows, pack_columns; // packing weights takes as long as so many rows, packing x as so many columns
};
inline void cut_many(const Linear& task, int64_t threads, const Cuts& cuts, Plan& plan) {
  const int64_t least = (task.M + cuts.most_rows - 1) / cuts.most_rows;
  const int64_t most = max(min(task.M / kSplitRows, least + threads), least);
  Soonest soonest;
  for (int64_t blocks = least; blocks <= most; ++blocks)
    for (int64_t span = cuts.most_columns; span >= kSplitColumns; span -= 16) {
      const int64_t rows = round_up((task.M + blocks - 1) / blocks, kTileRows);
      const auto cost = [&](int64_t columns) {
        return double(rows + cuts.pack_rows) * double(columns) + double(rows * cuts.pack_columns);
      };
      if (soonest.than(makespan(blocks, task.N, span, threads, cost))) plan.rows = rows, plan.span = span;
    }
}

// 384 KB of x stay in the second-level cache, and are read again for each 64 of the columns.
constexpr Cuts kManyCuts = {.most_rows = 384, .most_columns = 256, .pack_rows = 24, .pack_columns = 0};

inline int64_t row_blocks(const Linear& task, const Plan& plan) { return (task.M + plan.rows - 1) / plan.rows; }
inline int64_t linear_units(const Linear& task, const Plan& plan) {
  return row_blocks(task, plan) * ((task.N + plan.span - 1) / plan.span);
}
// The part of y that a unit computes.
struct LinearUnit {
  int64_t first_row, rows, first, columns;
  LinearUnit(const Linear& task, const Plan& plan, int64_t unit)
      : first_row(unit % row_blocks(task, plan) * plan.rows), rows(min(plan.rows, task.M - first_row)),
        first(unit / row_blocks(task, plan) * plan.span), columns(min(plan.span, task.N - first)) {}
};

template <class T> struct LinearBlock {
  const Linear& task;
  const Plan& plan;    // rows and span: the most rows and columns of a unit
  bool few, by_column; // by_column: few, and w's columns are contiguous, and can be computed with as they are
  int64_t block_columns = 0;
  Ahead ahead{};
  T *x_block, *packed, *next, *column, *sums; // sums: (slots, rows, columns)

  LinearBlock(const Linear& t, const Plan& p, Arena& arena) : task(t), plan(p), few(has_few_rows(task)) {
    by_column = few && task.w.stride[0] == 1 && task.w.stride[1] != 1 && Stored::kept<T>(task.w.dtype);
    block_columns = by_column && task.M <= kFourRows ? 16 : kPanelColumns;
    x_block = arena.take<T>(plan.rows * 2 * kChain);
    packed = arena.take<T>(kChain * kPanelColumns);
    next = arena.take<T>(few ? 0 : kChain * kPanelColumns);
    column = arena.take<T>(max(16 * kChain, plan.span));
    sums = arena.take<T>(stack_slots((task.K + kChain - 1) / kChain, false) * plan.rows * plan.span);
  }

  void run(int64_t unit, Stop* stop) {
    const LinearUnit at(task, plan, unit);
    const bool in_blocks = by_column || (few && task.w_in_panels);
    const int64_t end = at.first + at.columns, columns = in_blocks ? block_columns : at.columns;
    for (int64_t j = at.first; j < end && !stop->now; j += columns)
      block(at.first_row, at.rows, j, min(columns, end - j), end, stop);
  }

private:
  // The tree of one block of the result; the unit goes on up to column `end`.
  void block(int64_t first_row, int64_t rows, int64_t first, int64_t columns, int64_t end, Stop* stop) {
    const int64_t width = round_up(columns, 16), area = rows * width;
    ChunkStack stack;
    const auto joiner = [&](int slot) {
      T* at = sums + slot * area;
      for (int64_t i = 0; i < rows * width; i += 16) (load(at + i) + load(at + area + i)).store(at + i);
    };
    if (task.K == 0) memset(sums, 0, size_t(area) * sizeof(T)); // what an empty inner axis sums to
    const int64_t most = by_column && rows == 1 && item_size(task.w.dtype) == 2 ? 2 * kChain : kChain;
    for (int64_t k = 0, count; k < task.K; k += count) {
      count = min(most, task.K - k);
      if (stop->after(rows * columns * count)) return;
      T* sum[] = {sums + stack.push(k / kChain, joiner) * area, nullptr};
      if (count > kChain) sum[1] = sums + stack.push(k / kChain + 1, joiner) * area; // the two meet first of all
      int64_t x_row;
      const T* x = read_x(first_row, rows, k, count, x_row);
      if (few && task.w_in_panels)
        multiply_panels(rows, columns, k, count, first, x, x_row, sum[0], width);
      else if (by_column)
        multiply_columns(rows, columns, k, count, first, end, x, x_row, sum);
      else if (few)
        multiply_few(rows, columns, k, count, first, x, x_row, sum[0], width);
      else
        multiply_many(rows, columns, k, count, first, x, x_row, sum[0], width);
    }
    stack.finish(joiner);
    if (task.b.data) read_row(address(task.b, 0, first), task.b.dtype, task.b.stride[0], columns, column);
    for (int64_t i = 0; i < rows; ++i) {
      T* sum = sums + i * width;
      if (task.b.data)
        for (int64_t j = 0; j < columns; ++j) sum[j] += column[j];
      write_row(sum, columns, address(task.y, 0, first_row + i, first), task.y.dtype);
    }
  }

  // Panel by panel of weights. While one is multiplied, the next of the same rows of w is packed.
  void multiply_many(int64_t rows, int64_t columns, int64_t k, int64_t count, int64_t first, const T* x, int64_t x_row,
                     T* sum, int64_t width) {
    pack(k, count, 0, count, first, min(kPanelColumns, columns), packed);
    for (int64_t j = 0; j < columns; j += kPanelColumns) {
      const int64_t wide = round_up(min(kPanelColumns, columns - j), 16), after = columns - j - kPanelColumns;
      for (int64_t i = 0; i < rows; i += kStepRows) {
        const int64_t some = min(kStepRows, rows - i);
        if (after > 0)
          pack(k, count, count * i / rows, count * (i + some) / rows, first + j + kPanelColumns,
               min(kPanelColumns, after), next);
        multiply(some, wide, count, x + i * x_row, x_row, packed, 16, 16 * count, sum + i * width + j, width);
      }
      T* const done = packed;
      packed = next, next = done;
    }
  }

  void multiply_few(int64_t rows, int64_t columns, int64_t k, int64_t count, int64_t first, const T* x, int64_t x_row,
                    T* sum, int64_t width) {
    int64_t done = 0;
    if (task.w.stride[1] == 1 && Stored::kept<T>(task.w.dtype)) {
      done = columns / 16 * 16;
      read_once(rows, done, k, count, first, x, x_row, sum, width);
    }
    for (int64_t j = done; j < columns; j += kPanelColumns) {
      const int64_t wide = min(kPanelColumns, columns - j);
      pack(k, count, 0, count, first + j, wide, packed);
      multiply(rows, round_up(wide, 16), count, x, x_row, packed, 16, 16 * count, sum + j, width);
    }
  }

  // Few rows, and w in panels: each is one stretch of memory, of which the chains take a part at every visit.
  void multiply_panels(int64_t rows, int64_t columns, int64_t k, int64_t count, int64_t first, const T* x,
                       int64_t x_row, T* sum, int64_t width) {
    panels_at(k, first).template at<T>(0, [&](auto* w) {
      const int64_t panel = 16 * task.K, item = sizeof(*w), wide = round_up(columns, 16);
      Ahead next;
      // One row follows the memory by itself; more pause for arithmetic.
      if (rows > 1) next = {reinterpret_cast<const char*>(w + 16 * count), panel * item, 16 * count * item, wide / 16};
      multiply(rows, wide, count, x, x_row, w, 16, panel, sum, width, false, next);
    });
  }
  Stored panels_at(int64_t k, int64_t first) const {
    return {address(task.w, 0, first / 16, k), task.w.dtype, 16, 16 * task.K};
  }

  // Few rows, and w's rows contiguous: some rows of w at a time, so that they are read in long stretches, while the
  // chains, which grow by as many steps, wait in the cache.
  void read_once(int64_t rows, int64_t columns, int64_t k, int64_t count, int64_t first, const T* x, int64_t x_row,
                 T* sum, int64_t width) {
    const int64_t row = task.w.stride[0];
    const int64_t depth = max(kFewBytes / (max(columns, 16) * item_size(task.w.dtype)), max(8, 4 * rows));
    for (int64_t g = 0; g < count; g += depth)
      Stored{address(task.w, 0, k + g, first), task.w.dtype, row, 16}.at<T>(0, [&](auto* w) {
        const int64_t steps = min(depth, count - g), item = sizeof(*w);
        const Ahead next{reinterpret_cast<const char*>(w + depth * row), row * item, columns * item, steps};
        // One row follows the memory by itself, and prefetching would be in its way; unless the numbers are narrow.
        if (rows == 1 && item >= 4)
          multiply(rows, columns, steps, x + g, x_row, w, row, 16, sum, width, g > 0);
        else
          multiply(rows, columns, steps, x + g, x_row, w, row, 16, sum, width, g > 0, next);
      });
  }

  // Few rows, and w's columns contiguous: one chain of each, or two, the second of which grows in sums[1].
  void multiply_columns(int64_t rows, int64_t columns, int64_t k, int64_t count, int64_t first, int64_t end, const T* x,
                        int64_t x_row, T* const (&sums)[2]) {
    const View& w = task.w;
    look_ahead(k, first, end);
    Stored{address(w, 0, k, first), w.dtype, 0, 0}.at<T>(0, [&](auto* from) {
      constexpr int64_t line = 64 / sizeof(*from);
      const int64_t width = round_up(columns, 16);
      int64_t done = 0;
      if (columns == 16) done = grow(rows, from, count, x, x_row, sums);
      for (int64_t chain = 0; chain * kChain < count; ++chain) {
        const int64_t begin = chain * kChain, chain_count = min(count - begin, kChain);
        for (int64_t i = done, some; i < chain_count; i += some) {
          some = min(kPanelDepth, chain_count - i);
          for (int64_t j = 0; j < columns; j += 16) {
            for (int64_t d = 0; d < some; d += line) ahead.prefetch(16 * 64);
            make_panel(from + begin + i + j * w.stride[1], w.stride[1], min(16, columns - j), some, packed + j * some);
          }
          multiply(rows, width, some, x + begin + i, x_row, packed, 16, 16 * some, sums[chain], width, i > 0);
        }
      }
    });
  }
  // Grows chains of 16 columns, each by the same whole lines, as far as such go, and returns by how many numbers. Up to
  // four rows need no panel. For one row and narrow numbers, two chains grow at once: the numbers come faster than one
  // chain can take them.
  template <class From>
  int64_t grow(int64_t rows, const From* from, int64_t count, const T* x, int64_t x_row, T* const (&sums)[2]) {
    if constexpr (sizeof(From) == 2)
      if (count > kChain) return grow_by_lines<1, 2>(from, count - kChain, x, x_row, sums);
    switch (rows) {
    case 1: return grow_by_lines<1, 1>(from, count, x, x_row, sums);
    case 2: return grow_by_lines<2, 1>(from, count, x, x_row, sums);
    case 3: return grow_by_lines<3, 1>(from, count, x, x_row, sums);
    case 4: return grow_by_lines<4, 1>(from, count, x, x_row, sums);
    default: return 0;
    }
  }
  template <int rows, size_t chains, class From>
  int64_t grow_by_lines(const From* from, int64_t count, const T* x, int64_t x_row, T* const (&sums)[2]) {
    constexpr int64_t line = 64 / sizeof(From);
    const int64_t step = task.w.stride[1] * int64_t(sizeof(From));
    Vec<T> sum[chains][rows];
    for (auto& chain : sum)
      for (Vec<T>& row : chain) row = T(0);
    int64_t done = 0;
    for (; done + line <= count; done += line) {
      const From* at[chains];
      for (size_t c = 0; c < chains; ++c) ahead.prefetch(16 * 64), at[c] = from + int64_t(c) * kChain + done;
      each_column(at, step, [&](size_t c, int column, int part, const auto& numbers) {
        const T* number = x + int64_t(c) * kChain + done + column;
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          auto& chain = sum[c][r].part[part];
          chain = fma_reg(broadcast(number[r * x_row]).part[part], numbers, chain);
        }
      });
    }
    for (size_t c = 0; c < chains; ++c)
      for (int r = 0; r < rows; ++r) sum[c][r].store(sums[c] + 16 * r);
    return done;
  }
  // Where a part of w's columns begins at k, what is multiplied after it: the next part, or the next columns.
  void look_ahead(int64_t k, int64_t first, int64_t end) {
    if constexpr (!kPrefetchesColumns) return;
    const View& w = task.w;
    const int64_t item = item_size(w.dtype), parts = max(task.K * item / kPartBytes, 1);
    const int64_t part = round_up((task.K + parts - 1) / parts, 2 * kChain); // all about as long
    if (k % part) return;
    k += part;
    if (k >= task.K) k = 0, first += block_columns;
    ahead = {address(w, 0, k, first), w.stride[1] * item, min(part, task.K - k) * item,
             min(block_columns, end - first)};
  }

  const T* read_x(int64_t row, int64_t rows, int64_t k, int64_t count, int64_t& x_row) {
    const View& x = task.x;
    if (x.dtype == dtype_of<T> && x.stride[1] == 1) {
      x_row = x.stride[0];
      return reinterpret_cast<const T*>(address(x, 0, row, k));
    }
    for (int64_t i = 0; i < rows; ++i)
      read_row(address(x, 0, row + i, k), x.dtype, x.stride[1], count, x_block + i * 2 * kChain);
    x_row = 2 * kChain;
    return x_block;
  }

  // Packs rows k .. k + count of w, columns first .. first + columns, into panels of 16 columns; now the share `from`
  // .. `to` of `count`.
  void pack(int64_t k, int64_t count, int64_t from, int64_t to, int64_t first, int64_t columns, T* into) {
    const View& w = task.w;
    const int64_t width = round_up(columns, 16);
    if (task.w_in_panels) {
      for (int64_t j = 0; j < columns; j += 16)
        panels_at(k, first + j).template at<T>(0, [&](auto* panel) {
          for (int64_t i = 16 * from; i < 16 * to; i += 16) load(panel + i).store(into + j * count + i);
        });
      return;
    }
    if (w.stride[1] == 1) {
      for (int64_t i = from; i < to; ++i) {
        // Short stretches far apart, which the processor does not foresee.
        const char* ahead = address(w, 0, k + i + kPrefetchRows, first);
        for (int64_t byte = 0; byte < columns * item_size(w.dtype); byte += 64) __builtin_prefetch(ahead + byte);
        const char* row_of_w = address(w, 0, k + i, first);
        int64_t j = 0;
        if (Stored::kept<T>(w.dtype))
          Stored{row_of_w, w.dtype, 0, 0}.at<T>(0, [&](auto* row) {
            for (; j + 16 <= columns; j += 16) load(row + j).store(into + j * count + 16 * i);
          });
        for (; j < columns; j += 16) {
          T* panel = into + j * count + 16 * i;
          const int64_t lanes = min(16, columns - j);
          read_row(row_of_w + j * item_size(w.dtype), w.dtype, 1, lanes, panel);
          for (int64_t lane = lanes; lane < 16; ++lane) panel[lane] = T(0);
        }
      }
      return;
    }
    for (int64_t j = 0; j < columns; j += 16) {
      if (const int64_t turn = j * count / width; turn < from || turn >= to) continue;
      T* panel = into + j * count;
      const int64_t lanes = min(16, columns - j);
      if (w.stride[0] == 1 && Stored::kept<T>(w.dtype)) { // the transposed view of an (out, in) matrix
        Stored{address(w, 0, k, first + j), w.dtype, 0, 0}.at<T>(
            0, [&](auto* rows) { make_panel(rows, w.stride[1], lanes, count, panel); });
      } else {
        for (int64_t lane = 0; lane < lanes; ++lane)
          read_row(address(w, 0, k, first + j + lane), w.dtype, w.stride[0], count, column + lane * count);
        make_panel(column, count, lanes, count, panel);
      }
    }
  }
};

template <class T> Plan plan_linear_as(const Linear& task, int64_t threads) {
  Plan plan{};
  plan.work = saturating_product(task.M, task.K, task.N);
  threads = min(threads, 1 + plan.work / kWorkPerThread);
  has_few_rows(task) ? cut_few(task, threads, plan) : cut_many(task, threads, kManyCuts, plan);
  plan.units = linear_units(task, plan);
  Arena counting{nullptr};
  const LinearBlock<T> block(task, plan, counting);
  plan.workspace = counting.used;
  return plan;
}
inline Plan plan_linear(const Linear& task, int64_t threads) {
  return task.compute == DType::f64 ? plan_linear_as<double>(task, threads) : plan_linear_as<float>(task, threads);
}
inline void run_linear(const Linear& task, const Plan& plan, int64_t unit, const Memory& memory) {
  Arena arena{static_cast<char*>(memory.own)};
  if (task.compute == DType::f64)
    LinearBlock<double>(task, plan, arena).run(unit, memory.stop);
  else
    LinearBlock<float>(task, plan, arena).run(unit, memory.stop);
}

// A unit is a panel. A few rows of w at a time, so that what is read of a line of the cache is read at once.
template <class Word> void pack_panel(const Packing& task, int64_t unit) {
  const View& w = task.w;
  const int64_t columns = min(16, task.N - 16 * unit), depth = 128 / int64_t(sizeof(Word));
  const auto* from = reinterpret_cast<const Word*>(address(w, 0, 0, 16 * unit));
  auto* panel = static_cast<Word*>(task.panels) + unit * 16 * task.K;
  for (int64_t k = 0; k < task.K; k += depth)
    for (int64_t j = 0; j < 16; ++j)
      for (int64_t i = k; i < min(k + depth, task.K); ++i)
        panel[16 * i + j] = j < columns ? from[i * w.stride[0] + j * w.stride[1]] : Word(0);
}
inline Plan plan_pack(const Packing& task, int64_t) {
  return {(task.N + 15) / 16, 0, saturating_product(task.K, task.N)};
}
inline void run_pack(const Packing& task, const Plan&, int64_t unit, const Memory&) {
  switch (item_size(task.w.dtype)) {
  case 8: return pack_panel<uint64_t>(task, unit);
  case 4: return pack_panel<uint32_t>(task, unit);
  default: return pack_panel<uint16_t>(task, unit);
  }
}

} // namespace
} // namespace headway
