// What a layer needs besides attention: matrix product with weights, rotary positions, RMS norm, SwiGLU.
#pragma once
#include "exp.h"
#include "gemm.h"
#include "tree.h"

namespace headway {
namespace {

// linear: y = x w + b. Each element is a tree over blocks of the inner axis, each block one chain of kChain fused
// multiply-adds: a single long chain would lose accuracy beside libraries that keep many partial sums.
//
// A unit of work: many rows by few columns, whose weights are packed once for all of them; or, where there are few
// rows, few by many, which reads the weights where they are in long stretches. Multiples of the register tiles.
constexpr int64_t kLinearRows = 192, kLinearColumns = 64;
constexpr int64_t kFewRows = 24, kManyColumns = 512;
inline int64_t linear_columns(const Linear& task) { return task.M <= kFewRows ? kManyColumns : kLinearColumns; }
static_assert(kFewRows * kManyColumns <= kLinearRows * kLinearColumns);

template <class T> struct LinearBlock {
  const Linear& task;
  T *x_block, *w_block, *column, *partial; // packed pieces; (slots, kLinearRows, kLinearColumns)

  LinearBlock(const Linear& t, Arena& arena) : task(t) {
    const int64_t slots = stack_slots((task.K + kChain - 1) / kChain, false);
    x_block = arena.take<T>(kLinearRows * kChain);
    w_block = arena.take<T>(kChain * linear_columns(task));
    column = arena.take<T>(most(kChain, kManyColumns));
    partial = arena.take<T>(slots * kLinearRows * kLinearColumns);
  }

  void run(int64_t unit) {
    const int64_t row_blocks = (task.M + kLinearRows - 1) / kLinearRows;
    const int64_t first_row = unit % row_blocks * kLinearRows, first_column = unit / row_blocks * linear_columns(task);
    const int64_t rows = least(kLinearRows, task.M - first_row);
    const int64_t columns = least(linear_columns(task), task.N - first_column);
    const int64_t width = round_up(columns, 16);
    ChunkStack stack;
    const auto joiner = [&](int slot) {
      T* a = partial + slot * kLinearRows * kLinearColumns;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < width; j += 16) {
          T* at = a + i * width + j;
          (Vec<T>::load(at) + Vec<T>::load(at + kLinearRows * kLinearColumns)).store(at);
        }
    };
    memset(partial, 0, size_t(kLinearRows * kLinearColumns) * sizeof(T)); // what an empty inner axis sums to
    for (int64_t k = 0; k < task.K; k += kChain) {
      const int64_t count = least(kChain, task.K - k);
      const int slot = stack.push(k / kChain, joiner);
      int64_t x_row, w_row;
      const T* x = read_x(first_row, rows, k, count, x_row);
      const T* w = read_w(k, count, first_column, columns, w_row);
      multiply(rows, width, count, x, x_row, w, w_row, 16, partial + slot * kLinearRows * kLinearColumns, width);
    }
    stack.finish(joiner);
    if (task.b.data) read_row(address(task.b, 0, first_column), task.b.dtype, task.b.stride[0], columns, column);
    for (int64_t i = 0; i < rows; ++i) {
      T* sum = partial + i * width;
      if (task.b.data)
        for (int64_t j = 0; j < columns; ++j) sum[j] += column[j];
      write_row(sum, columns, address(task.y, 0, first_row + i, first_column), task.y.dtype);
    }
  }

  const T* read_x(int64_t row, int64_t rows, int64_t k, int64_t count, int64_t& x_row) {
    const View& x = task.x;
    if (x.dtype == dtype_of<T> && x.stride[1] == 1) {
      x_row = x.stride[0];
      return reinterpret_cast<const T*>(address(x, 0, row, k));
    }
    for (int64_t i = 0; i < rows; ++i)
      read_row(address(x, 0, row + i, k), x.dtype, x.stride[1], count, x_block + i * kChain);
    x_row = kChain;
    return x_block;
  }
  const T* read_w(int64_t k, int64_t count, int64_t first, int64_t columns, int64_t& w_row) {
    const View& w = task.w;
    if (w.dtype == dtype_of<T> && w.stride[1] == 1 && columns % 16 == 0 && task.M <= kFewRows) {
      w_row = w.stride[0];
      return reinterpret_cast<const T*>(address(w, 0, k, first));
    }
    w_row = round_up(columns, 16);
    if (columns % 16) memset(w_block, 0, size_t(count * w_row) * sizeof(T));
    if (w.stride[1] == 1) {
      for (int64_t i = 0; i < count; ++i)
        read_row(address(w, 0, k + i, first), w.dtype, 1, columns, w_block + i * w_row);
    } else { // a transposed view: read along the inner axis
      for (int64_t j = 0; j < columns; ++j) {
        read_row(address(w, 0, k, first + j), w.dtype, w.stride[0], count, column);
        for (int64_t i = 0; i < count; ++i) w_block[i * w_row + j] = column[i];
      }
    }
    return w_block;
  }
};

template <class T> Plan plan_linear_as(const Linear& task) {
  Arena counting{nullptr};
  const LinearBlock<T> block(task, counting);
  const int64_t row_blocks = (task.M + kLinearRows - 1) / kLinearRows;
  return {row_blocks * ((task.N + linear_columns(task) - 1) / linear_columns(task)), counting.used,
          rough_product(task.M, task.K, task.N)};
}
inline Plan plan_linear(const Linear& task, int64_t) {
  return task.compute == DType::f64 ? plan_linear_as<double>(task) : plan_linear_as<float>(task);
}
inline void run_linear(const Linear& task, const Plan&, int64_t unit, Memory memory) {
  Arena arena{static_cast<char*>(memory.own)};
  if (task.compute == DType::f64)
    LinearBlock<double>(task, arena).run(unit);
  else
    LinearBlock<float>(task, arena).run(unit);
}

// rotary: each pair (i, i + D/2) turns by position * frequency[i] (Su et al., 2021, in the layout of Llama). Angles are
// float64: at position 100,000 a float32 angle is already wrong by 0.004. A unit is one position.
template <class T> void rotate(const Rotary& task, int64_t l, Arena arena) {
  const int64_t half = task.D / 2, padded = round_up(half, 16), items = task.batch.size();
  double *angle = arena.take<double>(padded), *sine = arena.take<double>(padded), *cosine = arena.take<double>(padded);
  T* row = arena.take<T>(task.D);
  T* turned = arena.take<T>(task.D);
  int64_t known = -1;
  for (int64_t item = 0; item < items; ++item) {
    const int64_t position = *reinterpret_cast<const int64_t*>(
        static_cast<char*>(task.positions.data) +
        (batch_offset(task.batch, task.positions, item) + l * task.positions.stride[0]) * 8);
    if (position != known) {
      known = position;
      for (int64_t i = 0; i < padded; ++i) angle[i] = i < half ? double(position) * task.frequencies[i] : 0.0;
      for (int64_t i = 0; i < padded; i += 16) {
        Vec<double> s, c;
        sin_cos(Vec<double>::load(angle + i), s, c);
        s.store(sine + i), c.store(cosine + i);
      }
    }
    read_row(address(task.x, batch_offset(task.batch, task.x, item), l), task.x.dtype, task.x.stride[1], task.D, row);
    for (int64_t i = 0; i < half; ++i) {
      const T s = T(sine[i]), c = T(cosine[i]);
      const T left = row[i] * c, right = row[i + half] * c;
      turned[i] = left - row[i + half] * s;
      turned[i + half] = right + row[i] * s;
    }
    write_row(turned, task.D, address(task.y, batch_offset(task.batch, task.y, item), l), task.y.dtype);
  }
}
// frequency[i] = base^(-i / half), by our own exp and log: the library's pow differs between machines.
inline void rotary_frequencies(double base, int64_t half, double* out) {
  const double ln = log(base);
  for (int64_t i = 0; i < half; ++i) out[i] = exp(-(double(i) / double(half)) * ln);
}
inline Plan plan_rotary(const Rotary& task, int64_t) {
  const int64_t row = (task.D + 16) * 8 + 64;
  return {task.L, 5 * row, rough_product(task.batch.size(), task.L, task.D, 8)};
}
inline void run_rotary(const Rotary& task, const Plan&, int64_t unit, Memory memory) {
  const Arena arena{static_cast<char*>(memory.own)};
  task.compute == DType::f64 ? rotate<double>(task, unit, arena) : rotate<float>(task, unit, arena);
}

// rms_norm: x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019). A unit is one row. Squares are summed in
// float64 for every type: in float32 those of numbers above 2^64 would overflow.
template <class T> void normalise(const RowWise& task, int64_t r, Arena arena) {
  const int64_t n = task.columns, padded = round_up(n, 16);
  T *x = arena.take<T>(padded), *weight = arena.take<T>(padded);
  double* wide = arena.take<double>(padded);
  read_row(address(task.x, 0, r), task.x.dtype, task.x.stride[1], n, x);
  read_row(address(task.x, 0, r), task.x.dtype, task.x.stride[1], n, wide);
  read_row(address(task.other, 0), task.other.dtype, task.other.stride[1], n, weight);
  for (int64_t i = n; i < padded; ++i) x[i] = weight[i] = T(0), wide[i] = 0;
  Vec<double> squares = 0.0;
  for (int64_t i = 0; i < n; i += 16) squares = squares + Vec<double>::load(wide + i) * Vec<double>::load(wide + i);
  const T scale = T(1.0 / __builtin_sqrt(sum(squares) / double(n) + task.eps));
  for (int64_t i = 0; i < n; i += 16) (Vec<T>::load(x + i) * Vec<T>(scale) * Vec<T>::load(weight + i)).store(x + i);
  write_row(x, n, address(task.y, 0, r), task.y.dtype);
}

// swiglu: gate * sigmoid(gate) * up (Shazeer, 2020), by exp(-|gate|), which cannot overflow. A unit is one row.
template <class T> void gate(const RowWise& task, int64_t r, Arena arena) {
  const int64_t n = task.columns, padded = round_up(n, 16);
  T *x = arena.take<T>(padded), *up = arena.take<T>(padded);
  read_row(address(task.x, 0, r), task.x.dtype, task.x.stride[1], n, x);
  read_row(address(task.other, 0, r), task.other.dtype, task.other.stride[1], n, up);
  for (int64_t i = n; i < padded; ++i) x[i] = up[i] = T(0);
  for (int64_t i = 0; i < n; i += 16) {
    const Vec<T> g = Vec<T>::load(x + i), zero = T(0), one = T(1);
    const Vec<T> e = exp(select(g > zero, zero - g, g));
    const Vec<T> sigmoid = select(g > zero, one, e) / (one + e);
    (g * sigmoid * Vec<T>::load(up + i)).store(x + i);
  }
  write_row(x, n, address(task.y, 0, r), task.y.dtype);
}
inline Plan plan_row_wise(const RowWise& task, int64_t) {
  return {task.rows, 3 * ((task.columns + 16) * 8 + 64), rough_product(task.rows, task.columns, 8)};
}
inline void run_rms_norm(const RowWise& task, const Plan&, int64_t unit, Memory memory) {
  const Arena arena{static_cast<char*>(memory.own)};
  task.compute == DType::f64 ? normalise<double>(task, unit, arena) : normalise<float>(task, unit, arena);
}
inline void run_swiglu(const RowWise& task, const Plan&, int64_t unit, Memory memory) {
  const Arena arena{static_cast<char*>(memory.own)};
  task.compute == DType::f64 ? gate<double>(task, unit, arena) : gate<float>(task, unit, arena);
}

} // namespace
} // namespace headway
