// The small kernels of a transformer layer: rotary positions (RoPE), RMSNorm, SwiGLU.
#pragma once
#include "../ground/exp.h"
#include "../ground/rows.h"

namespace headway {
namespace {

// rotary: each pair (i, i + D/2) turns by position * frequency[i] (Su et al., 2021, in the layout of Llama). Angles are
// float64: at position 100,000 a float32 angle is already wrong by 0.004. A unit is one position.
template <class T> void rotate(const Rotary& task, int64_t l, Arena arena, Stop* stop) {
  const int64_t half = task.D / 2, padded = round_up(half, 16), items = task.batch.size();
  double *angle = arena.take<double>(padded), *sine = arena.take<double>(padded), *cosine = arena.take<double>(padded);
  T* row = arena.take<T>(task.D);
  T* turned = arena.take<T>(task.D);
  int64_t known = -1;
  for (int64_t item = 0; item < items && !stop->after(4 * task.D); ++item) {
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
  return {task.L, 5 * row, saturating_product(task.batch.size(), task.L, task.D, 8)};
}
inline void run_rotary(const Rotary& task, const Plan&, int64_t unit, const Memory& memory) {
  const Arena arena{static_cast<char*>(memory.own)};
  if (task.compute == DType::f64)
    rotate<double>(task, unit, arena, memory.stop);
  else
    rotate<float>(task, unit, arena, memory.stop);
}

// rms_norm: x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019). A unit is one row. Squares are summed in
// float64 for every type: in float32 those of numbers above 2^64 would overflow.
template <class T> void normalize(const RowWise& task, int64_t r, Arena arena) {
  const int64_t n = task.columns, padded = round_up(n, 16);
  T *x = arena.take<T>(padded), *weight = arena.take<T>(padded);
  double* wide = arena.take<double>(padded);
  read_row(address(task.x, 0, r), task.x.dtype, task.x.stride[1], n, x);
  read_row(address(task.x, 0, r), task.x.dtype, task.x.stride[1], n, wide);
  read_row(address(task.other, 0), task.other.dtype, task.other.stride[1], n, weight);
  for (int64_t i = n; i < padded; ++i) x[i] = weight[i] = T(0), wide[i] = 0;
  Vec<double> squares = 0.0;
  for (int64_t i = 0; i < n; i += 16) squares = squares + Vec<double>::load(wide + i) * Vec<double>::load(wide + i);
  const T scale = T(1.0 / __builtin_sqrt(reduce_sum(squares) / double(n) + task.eps));
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
  return {task.rows, 3 * ((task.columns + 16) * 8 + 64), saturating_product(task.rows, task.columns, 8)};
}
inline void run_rms_norm(const RowWise& task, const Plan&, int64_t unit, const Memory& memory) {
  const Arena arena{static_cast<char*>(memory.own)};
  task.compute == DType::f64 ? normalize<double>(task, unit, arena) : normalize<float>(task, unit, arena);
}
inline void run_swiglu(const RowWise& task, const Plan&, int64_t unit, const Memory& memory) {
  const Arena arena{static_cast<char*>(memory.own)};
  task.compute == DType::f64 ? gate<double>(task, unit, arena) : gate<float>(task, unit, arena);
}

} // namespace
} // namespace headway
