// The only file that knows Python. Arrays arrive checked and broadcast by the Python layer; here they become plain
// structs, and the GIL is released. uint16 carries the bits of bfloat16, uint8 a mask.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ground/rows.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace headway {
namespace {

using In = nb::ndarray<nb::ro, nb::device::cpu>;
using Out = nb::ndarray<nb::device::cpu>;
using Shape = std::vector<int64_t>;

DType dtype_of_array(const nb::dlpack::dtype& t, const char* name) {
  using Code = nb::dlpack::dtype_code;
  if (t.lanes == 1) {
    if (t.code == uint8_t(Code::Float) && t.bits == 64) return DType::f64;
    if (t.code == uint8_t(Code::Float) && t.bits == 32) return DType::f32;
    if (t.code == uint8_t(Code::Float) && t.bits == 16) return DType::f16;
    if (t.code == uint8_t(Code::UInt) && t.bits == 16) return DType::bf16;
    if (t.code == uint8_t(Code::UInt) && t.bits == 8) return DType::boolean;
    if (t.code == uint8_t(Code::Int) && t.bits == 64) return DType::f64; // 8 bytes; only its reader knows better
  }
  throw std::invalid_argument(std::string(name) + ": unsupported dtype");
}

// The view of an array with the shape (batch..., core...).
template <class Array> View view(const Array& a, const char* name, const Batch& batch, const Shape& core) {
  if (a.ndim() != size_t(batch.axes) + core.size())
    throw std::invalid_argument(std::string(name) + ": wrong number of axes");
  View v;
  v.data = const_cast<void*>(static_cast<const void*>(a.data()));
  v.dtype = dtype_of_array(a.dtype(), name);
  for (int i = 0; i < batch.axes; ++i) {
    if (int64_t(a.shape(size_t(i))) != batch.shape[i])
      throw std::invalid_argument(std::string(name) + ": wrong batch shape");
    v.batch[i] = a.stride(size_t(i));
  }
  for (size_t i = 0; i < core.size(); ++i) {
    if (int64_t(a.shape(size_t(batch.axes) + i)) != core[i])
      throw std::invalid_argument(std::string(name) + ": wrong shape");
    v.stride[i] = a.stride(size_t(batch.axes) + i);
  }
  return v;
}
template <class Array>
View view(const std::optional<Array>& a, const char* name, const Batch& batch, const Shape& core) {
  return a ? view(*a, name, batch, core) : View{};
}

Batch batch_of(const In& a, size_t core_axes) {
  Batch batch;
  if (a.ndim() < core_axes || a.ndim() - core_axes > size_t(kMaxBatchAxes))
    throw std::invalid_argument("array: expected at most " + std::to_string(kMaxBatchAxes) + " leading axes");
  batch.axes = int(a.ndim() - core_axes);
  for (int i = 0; i < batch.axes; ++i) batch.shape[i] = int64_t(a.shape(size_t(i)));
  return batch;
}

DType computing_type(bool wide) { return wide ? DType::f64 : DType::f32; }

// Signals reach Python's main thread alone: no other polls for them. A child that is forked has a main thread of its
// own.
unsigned long main_thread;

// Runs the handlers of the signals that have come meanwhile; whether one of them raised.
bool interrupted() {
  const nb::gil_scoped_acquire held;
  return PyErr_CheckSignals() != 0;
}

template <class Task> void run(const Kernel<Task>& kernel, const Task& task) {
  const Interrupted poll = PyThread_get_thread_ident() == main_thread ? interrupted : nullptr;
  bool finished;
  {
    const nb::gil_scoped_release released;
    finished = execute(kernel, task, poll);
  }
  if (!finished) throw nb::python_error();
}

// What every attention function shares.
struct Options {
  std::optional<double> scale;
  double softcap;
  bool causal, bottom_right;
  std::optional<int64_t> window_left, window_right;
  int64_t total, key_offset;
  bool wide, k_in_panels, fast;

  // The same for a computation in float64, of products that are to be scaled by another number.
  Options wider(double other_scale) const {
    Options o = *this;
    o.scale = other_scale, o.wide = true, o.fast = false;
    return o;
  }
};

Attention attention_task(const In& q, const In& k, const std::optional<In>& v, const std::optional<In>& mask,
                         const std::optional<In>& bias, const std::optional<In>& sinks,
                         const std::optional<In>& kv_lengths, const Options& o) {
  Attention t{};
  t.batch = batch_of(q, 3);
  const size_t axes = size_t(t.batch.axes);
  t.H = int64_t(q.shape(axes)), t.L = int64_t(q.shape(axes + 1)), t.D = int64_t(q.shape(axes + 2));
  if (k.ndim() != axes + (o.k_in_panels ? 4 : 3)) throw std::invalid_argument("k: wrong number of axes");
  t.G = int64_t(k.shape(axes));
  t.k_in_panels = o.k_in_panels;
  if (o.k_in_panels) {
    t.S = o.total - o.key_offset;
    const int64_t panels = int64_t(k.shape(axes + 1));
    if (panels * kLanes < t.S) throw std::invalid_argument("k: too few panels");
    View& view_k = t.k;
    view_k.data = const_cast<void*>(k.data());
    view_k.dtype = dtype_of_array(k.dtype(), "k");
    const bool packed = k.stride(axes + 3) == 1 && (k.stride(axes + 2) == kLanes || t.D == 1);
    if (int64_t(k.shape(axes + 2)) != t.D || int64_t(k.shape(axes + 3)) != kLanes || !(packed || panels == 0))
      throw std::invalid_argument("k: wrong panel shape");
    for (int i = 0; i < t.batch.axes; ++i) {
      if (int64_t(k.shape(size_t(i))) != t.batch.shape[i]) throw std::invalid_argument("k: wrong batch shape");
      view_k.batch[i] = k.stride(size_t(i));
    }
    view_k.stride[0] = k.stride(axes), view_k.stride[1] = k.stride(axes + 1);
  } else {
    t.S = int64_t(k.shape(axes + 1));
    t.k = view(k, "k", t.batch, {t.G, t.S, t.D});
  }
  if (t.G < 1 || t.H % t.G) throw std::invalid_argument("k: heads must divide those of q");
  if (v) t.E = int64_t(v->shape(axes + 2));
  t.q = view(q, "q", t.batch, {t.H, t.L, t.D});
  t.v = view(v, "v", t.batch, {t.G, t.S, t.E});
  t.mask = view(mask, "mask", t.batch, {t.H, t.L, t.S});
  t.bias = view(bias, "bias", t.batch, {t.H, t.L, t.S});
  t.sinks = view(sinks, "sinks", t.batch, {t.H});
  t.kv_lengths = view(kv_lengths, "kv_lengths", t.batch, {});
  t.compute = computing_type(o.wide);
  for (const View* x : {&t.bias, &t.sinks})
    if (x->data && x->dtype != t.compute) throw std::invalid_argument("bias, sinks: expected the computing type");
  const StandardFloats floats; // the caller's rounding must not reach the default
  t.scale = o.scale ? *o.scale : 1.0 / std::sqrt(double(t.D));
  t.softcap = o.softcap;
  t.causal = o.causal, t.bottom_right = o.bottom_right;
  t.window_left = o.window_left.value_or(kUnset), t.window_right = o.window_right.value_or(kUnset);
  t.total = o.total, t.key_offset = o.key_offset;
  return t;
}

// Whether all results are finite.
bool attention(const In& q, const In& k, const In& v, const std::optional<In>& mask, const std::optional<In>& bias,
               const std::optional<In>& sinks, const std::optional<In>& kv_lengths, const std::optional<In>& rows,
               const Options& options, const Out& out, const std::optional<Out>& lse) {
  Attention t = attention_task(q, k, v, mask, bias, sinks, kv_lengths, options);
  t.out = view(out, "out", t.batch, {t.H, t.L, t.E});
  t.lse = view(lse, "lse", t.batch, {t.H, t.L});
  t.rows = view(rows, "rows", t.batch, {t.H, t.L});
  bool lost = false;
  t.lost = &lost;
  run(options.fast && !options.wide ? fast_kernels().attention : kernels().attention, t);
  return !lost;
}

bool attention_weights(const In& q, const In& k, const std::optional<In>& mask, const std::optional<In>& bias,
                       const std::optional<In>& sinks, const std::optional<In>& kv_lengths,
                       const std::optional<In>& rows, const Options& options, const Out& out) {
  Attention t = attention_task(q, k, std::nullopt, mask, bias, sinks, kv_lengths, options);
  t.out = view(out, "out", t.batch, {t.H, t.L, t.S});
  t.rows = view(rows, "rows", t.batch, {t.H, t.L});
  bool lost = false;
  t.lost = &lost;
  run(kernels().attention_weights, t);
  return !lost;
}

// The first chunks of the tree nodes that the chunks first .. end - 1 leave, in order: from each on the largest node
// that begins there and does not reach beyond the end.
std::vector<int64_t> node_chunks(int64_t first, int64_t end) {
  std::vector<int64_t> chunks;
  while (first < end) {
    int64_t size = first ? first & -first : int64_t(1) << 62;
    while (size > end - first) size /= 2;
    chunks.push_back(first);
    first += size;
  }
  return chunks;
}

void check_nodes(const Attention& t, const Out& maximum, const Out& total, const Out& sum, size_t nodes) {
  const size_t rows = size_t(t.batch.size() * t.H * t.L);
  const auto item = size_t(t.compute == DType::f64 ? 8 : 4);
  if (maximum.size() != nodes * rows || total.size() != nodes * rows || sum.size() != nodes * rows * size_t(t.E) ||
      maximum.itemsize() != item || total.itemsize() != item || sum.itemsize() != item)
    throw std::invalid_argument("nodes: wrong shape or dtype");
}

void attention_nodes(const In& q, const In& k, const In& v, const std::optional<In>& mask,
                     const std::optional<In>& bias, const std::optional<In>& kv_lengths, const Options& options,
                     const Out& maximum, const Out& total_weight, const Out& weighted_sum) {
  Attention t = attention_task(q, k, v, mask, bias, std::nullopt, kv_lengths, options);
  const int64_t first = t.key_offset / kChunk;
  const auto chunks = node_chunks(first, first + (t.S + kChunk - 1) / kChunk);
  check_nodes(t, maximum, total_weight, weighted_sum, chunks.size());
  t.node_chunk = chunks.data();
  t.nodes = int64_t(chunks.size());
  t.maximum = maximum.data(), t.total_weight = total_weight.data(), t.weighted_sum = weighted_sum.data();
  run(kernels().attention_nodes, t);
}

void attention_merge(const std::vector<int64_t>& chunks, const Out& maximum, const Out& total_weight,
                     const Out& weighted_sum, const std::optional<In>& sinks, bool wide, const In& out,
                     const std::optional<Out>& lse) {
  Attention t{};
  t.batch = batch_of(out, 3);
  const size_t axes = size_t(t.batch.axes);
  t.H = int64_t(out.shape(axes)), t.L = int64_t(out.shape(axes + 1)), t.E = int64_t(out.shape(axes + 2));
  t.compute = computing_type(wide);
  check_nodes(t, maximum, total_weight, weighted_sum, chunks.size());
  for (size_t i = 1; i < chunks.size(); ++i)
    if (chunks[i] <= chunks[i - 1]) throw std::invalid_argument("chunks: expected rising order");
  t.node_chunk = chunks.data();
  t.nodes = int64_t(chunks.size());
  t.maximum = maximum.data(), t.total_weight = total_weight.data(), t.weighted_sum = weighted_sum.data();
  t.sinks = view(sinks, "sinks", t.batch, {t.H});
  t.out = view(out, "out", t.batch, {t.H, t.L, t.E});
  t.lse = view(lse, "lse", t.batch, {t.H, t.L});
  run(kernels().attention_merge, t);
}

template <class Array> View panels_of_columns(const Array& a, const char* name, int64_t K, int64_t N) {
  const View v = view(a, name, {}, {(N + 15) / 16, K, 16});
  if (a.size() && (v.stride[2] != 1 || v.stride[1] != 16 || v.stride[0] != 16 * K))
    throw std::invalid_argument(std::string(name) + ": expected a contiguous array");
  return v;
}
Linear linear_task(const In& x, const In& w, const std::optional<In>& b, bool wide, const Out& y) {
  if (x.ndim() != 2 || y.ndim() != 2) throw std::invalid_argument("linear: expected matrices");
  Linear t{};
  t.M = int64_t(x.shape(0)), t.K = int64_t(x.shape(1)), t.N = int64_t(y.shape(1));
  t.x = view(x, "x", {}, {t.M, t.K});
  t.w_in_panels = w.ndim() == 3;
  t.w = t.w_in_panels ? panels_of_columns(w, "w", t.K, t.N) : view(w, "w", {}, {t.K, t.N});
  if (t.w_in_panels && (wide || t.w.dtype == DType::f64))
    throw std::invalid_argument("w: expected float32 or narrower");
  t.b = view(b, "b", {}, {t.N});
  t.y = view(y, "y", {}, {t.M, t.N});
  t.compute = computing_type(wide);
  return t;
}
void linear(const In& x, const In& w, const std::optional<In>& b, bool wide, bool fast, const Out& y) {
  const Linear t = linear_task(x, w, b, wide, y);
  if (fast && t.w_in_panels) throw std::invalid_argument("w: expected no panels beside fast");
  run(fast && !wide ? fast_kernels().linear : kernels().linear, t);
}

void pack(const In& w, const Out& panels) {
  if (w.ndim() != 2) throw std::invalid_argument("w: expected a matrix");
  Packing t{};
  t.K = int64_t(w.shape(0)), t.N = int64_t(w.shape(1));
  t.w = view(w, "w", {}, {t.K, t.N});
  const View to = panels_of_columns(panels, "panels", t.K, t.N);
  if (to.dtype != t.w.dtype || to.dtype == DType::boolean)
    throw std::invalid_argument("panels: expected the type of w, a floating one");
  t.panels = to.data;
  run(kernels().pack, t);
}

Rotary rotary_task(const In& x, const In& positions, const In& frequencies, bool wide, const Out& y) {
  Rotary t{};
  t.batch = batch_of(x, 2);
  const size_t axes = size_t(t.batch.axes);
  t.L = int64_t(x.shape(axes)), t.D = int64_t(x.shape(axes + 1));
  t.x = view(x, "x", t.batch, {t.L, t.D});
  t.y = view(y, "y", t.batch, {t.L, t.D});
  t.positions = view(positions, "positions", t.batch, {t.L});
  if (frequencies.ndim() != 1 || int64_t(frequencies.shape(0)) * 2 != t.D || frequencies.itemsize() != 8 ||
      (t.D && frequencies.stride(0) != 1))
    throw std::invalid_argument("frequencies: wrong shape");
  t.frequencies = static_cast<const double*>(frequencies.data());
  t.compute = computing_type(wide);
  return t;
}
void rotary(const In& x, const In& positions, const In& frequencies, bool wide, const Out& y) {
  run(kernels().rotary, rotary_task(x, positions, frequencies, wide, y));
}

void rotary_frequencies(double base, const Out& frequencies) {
  const StandardFloats floats;
  kernels().rotary_frequencies(base, int64_t(frequencies.shape(0)), static_cast<double*>(frequencies.data()));
}

// other: a row for each of x, or one for all of them.
RowWise row_wise_task(const In& x, const In& other, double eps, bool wide, const Out& y) {
  if (x.ndim() != 2) throw std::invalid_argument("x: expected a matrix");
  RowWise t{};
  t.rows = int64_t(x.shape(0)), t.columns = int64_t(x.shape(1));
  t.x = view(x, "x", {}, {t.rows, t.columns});
  t.y = view(y, "y", {}, {t.rows, t.columns});
  if (other.ndim() == 1) {
    t.other = view(other, "other", {}, {t.columns});
    t.other.stride[1] = t.other.stride[0], t.other.stride[0] = 0;
  } else {
    t.other = view(other, "other", {}, {t.rows, t.columns});
  }
  t.eps = eps;
  t.compute = computing_type(wide);
  return t;
}
void rms_norm(const In& x, const In& weight, double eps, bool wide, const Out& y) {
  run(kernels().rms_norm, row_wise_task(x, weight, eps, wide, y));
}
void swiglu(const In& gate, const In& up, bool wide, const Out& y) {
  run(kernels().swiglu, row_wise_task(gate, up, 0, wide, y));
}

// The tokens that come next in a cache of keys and values: k (..., G, L, D), v (..., G, L, E), panels (..., G, panels,
// D, 16), values (..., G, S, E).
struct Append {
  Batch batch;
  int64_t G, L, D, E, room;
  View k, v, panels, values;

  void run(int64_t length) const {
    if (length < 0 || L > room - length) throw std::invalid_argument("length: no room in the cache");
    const StandardFloats floats;
    const int64_t item = item_size(panels.dtype);
    std::vector<double> row(static_cast<size_t>(std::max(D, E))); // holds every number of every type exactly
    std::vector<char> stored(static_cast<size_t>(D * item));
    for (int64_t i = 0; i < batch.size(); ++i) {
      const int64_t from_k = batch_offset(batch, k, i), from_v = batch_offset(batch, v, i);
      const int64_t to_k = batch_offset(batch, panels, i), to_v = batch_offset(batch, values, i);
      for (int64_t g = 0; g < G; ++g)
        for (int64_t l = 0; l < L; ++l) {
          const int64_t token = length + l;
          read_row(address(k, from_k, g, l), k.dtype, k.stride[2], D, row.data());
          write_row(row.data(), D, stored.data(), panels.dtype);
          char* panel = address(panels, to_k, g, token / kLanes) + token % kLanes * item;
          for (int64_t d = 0; d < D; ++d) memcpy(panel + d * kLanes * item, stored.data() + d * item, size_t(item));
          read_row(address(v, from_v, g, l), v.dtype, v.stride[2], E, row.data());
          write_row(row.data(), E, address(values, to_v, g, token), values.dtype);
        }
    }
  }
};

Append append_task(const In& k, const In& v, const Out& panels, const Out& values) {
  Append t{};
  t.batch = batch_of(k, 3);
  const size_t axes = size_t(t.batch.axes);
  t.G = int64_t(k.shape(axes)), t.L = int64_t(k.shape(axes + 1)), t.D = int64_t(k.shape(axes + 2));
  if (v.ndim() != axes + 3 || panels.ndim() != axes + 4 || values.ndim() != axes + 3)
    throw std::invalid_argument("append: wrong number of axes");
  t.E = int64_t(v.shape(axes + 2));
  const int64_t count = int64_t(panels.shape(axes + 1));
  t.room = std::min(count * kLanes, int64_t(values.shape(axes + 1)));
  t.k = view(k, "k", t.batch, {t.G, t.L, t.D});
  t.v = view(v, "v", t.batch, {t.G, t.L, t.E});
  t.values = view(values, "values", t.batch, {t.G, int64_t(values.shape(axes + 1)), t.E});
  if (int64_t(panels.shape(axes + 2)) != t.D || int64_t(panels.shape(axes + 3)) != kLanes)
    throw std::invalid_argument("panels: wrong shape");
  t.panels.data = panels.data(), t.panels.dtype = dtype_of_array(panels.dtype(), "panels");
  for (int i = 0; i < t.batch.axes; ++i) t.panels.batch[i] = panels.stride(size_t(i));
  t.panels.stride[0] = panels.stride(axes), t.panels.stride[1] = panels.stride(axes + 1);
  if (panels.size() && (panels.stride(axes + 3) != 1 || (t.D > 1 && panels.stride(axes + 2) != kLanes)))
    throw std::invalid_argument("panels: wrong strides");
  return t;
}
void append(const In& k, const In& v, const Out& panels, const Out& values, int64_t length) {
  const Append t = append_task(k, v, panels, values);
  const nb::gil_scoped_release released;
  t.run(length);
}

// One value for all rows, or one for each: 8 bytes of any type that the kernel expects.
template <class T> PerRow<T> per_row(const In& a, const char* name, int64_t rows) {
  if (a.ndim() != 1 || a.itemsize() != sizeof(T) || (a.shape(0) != 1 && int64_t(a.shape(0)) != rows))
    throw std::invalid_argument(std::string(name) + ": expected one number, or one per row");
  return {static_cast<const T*>(a.data()), a.shape(0) == 1 ? 0 : a.stride(0)};
}
template <class T> const T* rows_in(const In& a, const char* name, int64_t size) {
  if (int64_t(a.size()) != size || a.itemsize() != sizeof(T))
    throw std::invalid_argument(std::string(name) + ": wrong shape or dtype");
  return static_cast<const T*>(a.data());
}
template <class T> T* rows_out(const Out& a, const char* name, int64_t size, size_t item) {
  if (int64_t(a.size()) != size || a.itemsize() != item)
    throw std::invalid_argument(std::string(name) + ": wrong shape or dtype");
  return static_cast<T*>(a.data());
}
template <class T> T* rows_out(const std::optional<Out>& a, const char* name, int64_t size, size_t item) {
  return a ? rows_out<T>(*a, name, size, item) : nullptr;
}

using StepTuple = std::tuple<int, int, bool, bool, std::vector<In>>; // Step of kernels.h

// What is removed and how: the same object serves many calls where nothing of it is a row's own.
struct Stages {
  std::vector<StepTuple> steps;
  In min_tokens;
};

// What penalties know of rows, counted on by penalize, read by the sampling functions. It keeps the arrays alive.
struct RowHistories {
  In slot, first, length, prompt, tokens, breakers;
  Out counted, distinct, id, times, same, logit;

  Histories of(int64_t rows) const {
    const int64_t slots = int64_t(length.size()), places = int64_t(tokens.size());
    Histories h{};
    h.slot = rows_in<int64_t>(slot, "slot", rows);
    h.first = rows_in<int64_t>(first, "first", slots);
    h.length = rows_in<int64_t>(length, "length", slots);
    h.prompt = rows_in<int64_t>(prompt, "prompt", slots);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t s = h.slot[i];
      if (s < 0 || s >= slots || h.first[s] < 0 || h.length[s] < 0 || h.length[s] > places - h.first[s])
        throw std::invalid_argument("slot: out of range");
    }
    h.tokens = rows_in<int64_t>(tokens, "tokens", places);
    h.breakers = rows_in<uint8_t>(breakers, "breakers", places);
    h.counted = rows_out<int64_t>(counted, "counted", slots, 8);
    h.distinct = rows_out<int64_t>(distinct, "distinct", slots, 8);
    h.id = rows_out<int64_t>(id, "id", places, 8);
    h.times = rows_out<int64_t>(times, "times", places * kPenaltyKinds, 8);
    h.same = rows_out<int64_t>(same, "same", places, 8);
    h.logit = rows_out<double>(logit, "logit", places, 8);
    return h;
  }
};

// What every sampling function shares: rows of logits and how to sample each. It keeps the arrays alive.
struct Rows {
  In logits;
  std::optional<In> bias, allowed;
  bool packed;
  Stages stages;
  In spared;
  std::optional<RowHistories> histories;
  std::optional<In> seed, stream, position, uniform;
  Out status;
  std::vector<Step> list{}; // of the task, which lives no longer

  Sampling task(int64_t draws = 1) {
    Sampling t{};
    t.batch = batch_of(logits, 1);
    t.V = int64_t(logits.shape(size_t(t.batch.axes)));
    if (t.V < 1 || t.V > INT32_MAX) throw std::invalid_argument("logits: expected a vocabulary of 1 to 2^31 - 1");
    const int64_t rows = t.batch.size();
    t.logits = view(logits, "logits", t.batch, {t.V});
    t.bias = view(bias, "bias", t.batch, {t.V});
    if (bias && t.bias.dtype != DType::f32) throw std::invalid_argument("bias: expected float32");
    if (histories) t.histories = histories->of(rows);
    t.allowed = view(allowed, "allowed", t.batch, {packed ? (t.V + 31) / 32 * 4 : t.V});
    if (allowed && t.allowed.dtype != DType::boolean) throw std::invalid_argument("allowed: expected uint8");
    t.packed = packed;
    list.clear();
    for (const auto& [stage, ties, equal, floor, values] : stages.steps) {
      if (!kernels().sampling->stage_name(stage) || ties < 0 || ties >= int(Ties::count) || values.empty() ||
          values.size() > size_t(kStepValues))
        throw std::invalid_argument("steps: no such stage");
      Step step{stage, Ties(ties), equal, floor, {}};
      for (size_t i = 0; i < values.size(); ++i) step.value[i] = per_row<double>(values[i], "steps", rows);
      list.push_back(step);
    }
    t.steps = list.data(), t.step_count = int64_t(list.size());
    t.min_tokens = per_row<int64_t>(stages.min_tokens, "min_tokens", rows);
    t.spared_count = int64_t(spared.size());
    t.spared = rows_in<int64_t>(spared, "spared", t.spared_count);
    for (int64_t i = 0; i < t.spared_count; ++i)
      if (t.spared[i] < 0 || t.spared[i] >= t.V) throw std::invalid_argument("spared: out of range");
    if (bool(seed) != bool(stream) || bool(seed) != bool(position))
      throw std::invalid_argument("expected seed, stream and position together");
    if (seed) t.seed = per_row<uint64_t>(*seed, "seed", rows);
    if (stream) t.stream = per_row<uint64_t>(*stream, "stream", rows);
    if (position) t.position = per_row<uint64_t>(*position, "position", rows);
    if (uniform) t.uniform = per_row<double>(*uniform, "uniform", rows * draws);
    t.draws = draws;
    t.status = rows_out<int64_t>(status, "status", rows, 8);
    return t;
  }
  void check_source() const {
    if (!uniform && !seed) throw std::invalid_argument("expected seed, stream and position, or uniform");
  }
};

// Whether all rows are fine; where not, their status says what is wrong.
bool fine(const Sampling& t) {
  for (int64_t i = 0; i < t.batch.size(); ++i)
    if (t.status[i]) return false;
  return true;
}

bool sample(Rows& rows, int64_t draws, bool replacement, const std::optional<Out>& tokens,
            const std::optional<Out>& probabilities, const std::optional<Out>& filtered) {
  if (draws < 1) throw std::invalid_argument("draws: expected 1 or more");
  Sampling t = rows.task(draws);
  t.replacement = replacement;
  if (tokens) rows.check_source();
  const int64_t n = t.batch.size();
  const size_t item = t.logits.dtype == DType::f64 ? 8 : 4;
  t.tokens = rows_out<int64_t>(tokens, "tokens", n * draws, 8);
  t.probabilities = rows_out<void>(probabilities, "probabilities", n * t.V, item);
  t.filtered = rows_out<void>(filtered, "filtered", n * t.V, rows.bias ? item : rows.logits.itemsize());
  run(kernels().sampling->sample, t);
  return fine(t);
}

bool trace(Rows& rows, const Out& counts, const Out& found, const std::optional<Out>& ids,
           const std::optional<Out>& logits, const std::optional<Out>& masses) {
  Sampling t = rows.task();
  if (t.batch.size() != 1) throw std::invalid_argument("rows: expected one");
  if (bool(ids) != bool(logits) || bool(ids) != bool(masses)) throw std::invalid_argument("ids: expected all or none");
  const int64_t n = t.step_count + 1;
  t.trace.count = rows_out<int64_t>(counts, "counts", n, 8);
  t.trace.found = rows_out<double>(found, "found", n, 8);
  t.trace.id = rows_out<int64_t>(ids, "ids", n * t.V, 8);
  t.trace.z = rows_out<float>(logits, "logits", n * t.V, 4);
  t.trace.mass = rows_out<int64_t>(masses, "masses", n * t.V, 8);
  run(kernels().sampling->sample, t);
  return fine(t);
}

void penalize(const In& logits, const RowHistories& histories, const In& repetition, const In& frequency,
              const In& presence, const In& dry_multiplier, const In& dry_base, const In& dry_allowed_length,
              const In& repetition_window, const In& frequency_window, const In& dry_window) {
  Penalties t{};
  t.batch = batch_of(logits, 1);
  t.V = int64_t(logits.shape(size_t(t.batch.axes)));
  t.logits = view(logits, "logits", t.batch, {t.V});
  const int64_t rows = t.batch.size();
  t.histories = histories.of(rows);
  t.window[kRepetition] = per_row<int64_t>(repetition_window, "repetition_window", rows);
  t.window[kFrequency] = per_row<int64_t>(frequency_window, "frequency_window", rows);
  t.window[kDry] = per_row<int64_t>(dry_window, "dry_window", rows);
  t.repetition = per_row<double>(repetition, "repetition", rows);
  t.frequency = per_row<double>(frequency, "frequency", rows);
  t.presence = per_row<double>(presence, "presence", rows);
  t.dry_multiplier = per_row<double>(dry_multiplier, "dry_multiplier", rows);
  t.dry_base = per_row<double>(dry_base, "dry_base", rows);
  t.dry_allowed_length = per_row<int64_t>(dry_allowed_length, "dry_allowed_length", rows);
  run(kernels().sampling->penalize, t);
}

bool rank(Rows& rows, const In& tokens, bool processed, const Out& ranks, const Out& logprob, const Out& top_id,
          const Out& top_key, const Out& top_logprob) {
  Ranking t{};
  t.rows = rows.task();
  const int64_t n = t.rows.batch.size();
  if (tokens.ndim() != 2 || int64_t(tokens.shape(0)) != n || tokens.itemsize() != 8)
    throw std::invalid_argument("tokens: wrong shape or dtype");
  if (top_id.ndim() != 2) throw std::invalid_argument("top_id: wrong shape");
  t.given = int64_t(tokens.shape(1)), t.top = int64_t(top_id.shape(1));
  t.tokens = static_cast<const int64_t*>(tokens.data());
  t.processed = processed;
  t.rank = rows_out<int64_t>(ranks, "ranks", n * t.given, 8);
  t.given_logprob = rows_out<double>(logprob, "logprob", n * t.given, 8);
  t.top_id = rows_out<int64_t>(top_id, "top_id", n * t.top, 8);
  t.top_key = rows_out<int64_t>(top_key, "top_key", n * t.top, 8);
  t.top_logprob = rows_out<double>(top_logprob, "top_logprob", n * t.top, 8);
  run(kernels().sampling->rank, t);
  return fine(t.rows);
}

bool verify(Rows& target, Rows* draft, const In& tokens, const In& lengths, const Out& status, const Out& accepted,
            const Out& next) {
  Verification t{};
  target.check_source();
  t.target = target.task();
  if (tokens.ndim() != 2 || tokens.itemsize() != 8) throw std::invalid_argument("tokens: wrong shape or dtype");
  t.rows = int64_t(tokens.shape(0)), t.n = int64_t(tokens.shape(1));
  t.places = t.rows ? t.target.batch.size() / t.rows : t.n;
  if (t.target.batch.size() != t.rows * t.places || (t.places != t.n && t.places != t.n + 1))
    throw std::invalid_argument("target: wrong number of rows");
  if (draft) t.draft = draft->task();
  if (draft && (t.draft.batch.size() != t.rows * t.n || t.draft.V != t.target.V))
    throw std::invalid_argument("draft: wrong shape");
  t.draft.status = rows_out<int64_t>(status, "status", t.rows * t.n, 8);
  t.tokens = static_cast<const int64_t*>(tokens.data());
  t.lengths = rows_in<int64_t>(lengths, "lengths", t.rows);
  for (int64_t i = 0; i < t.rows; ++i)
    if (t.lengths[i] < -1 || t.lengths[i] > t.n) throw std::invalid_argument("lengths: out of range");
  t.accepted = rows_out<int64_t>(accepted, "accepted", t.rows, 8);
  t.next = rows_out<int64_t>(next, "next", t.rows, 8);
  run(kernels().sampling->verify, t);
  for (int64_t i = 0; i < t.rows * t.n; ++i)
    if (t.draft.status[i]) return false;
  return fine(t.target);
}

// Each row of x in the type of y, times a power of two, rounded to nearest even whatever the caller's modes are.
void convert_rows(const In& x, const Out& y, int exponent) {
  if (x.ndim() != 2 || y.ndim() != 2) throw std::invalid_argument("convert: expected matrices");
  const int64_t rows = int64_t(x.shape(0)), columns = int64_t(x.shape(1));
  const View from = view(x, "x", {}, {rows, columns}), to = view(y, "y", {}, {rows, columns});
  const nb::gil_scoped_release released;
  const StandardFloats floats;
  std::vector<double> row(static_cast<size_t>(columns)); // holds every number of every type exactly
  for (int64_t i = 0; i < rows; ++i) {
    read_row(address(from, 0, i), from.dtype, from.stride[1], columns, row.data());
    if (exponent)
      for (double& number : row) number = std::ldexp(number, exponent);
    write_row(row.data(), columns, address(to, 0, i), to.dtype);
  }
}

// Each number of x rounded to so many decimals, half to even, in float64 whatever the caller's modes are.
void round_rows(const In& x, int64_t decimals, const Out& y) {
  if (x.ndim() != 2 || y.ndim() != 2) throw std::invalid_argument("round: expected matrices");
  const int64_t rows = int64_t(x.shape(0)), columns = int64_t(x.shape(1));
  const View from = view(x, "x", {}, {rows, columns}), to = view(y, "y", {}, {rows, columns});
  const nb::gil_scoped_release released;
  const StandardFloats floats;
  double unit = 1;
  for (int64_t i = 0; i < decimals; ++i) unit *= 10;
  constexpr double whole = 0x1p52; // from here on every number is an integer; below, adding it rounds to one
  std::vector<double> row(static_cast<size_t>(columns));
  for (int64_t i = 0; i < rows; ++i) {
    read_row(address(from, 0, i), from.dtype, from.stride[1], columns, row.data());
    for (double& number : row) {
      const double scaled = std::fabs(number) * unit;
      if (scaled < whole) number = std::copysign((scaled + whole - whole) / unit, number) + 0.0; // no -0
    }
    write_row(row.data(), columns, address(to, 0, i), to.dtype);
  }
}

// The same in every table of kernels: the choice of one can wait for the first call.
std::vector<std::string> stage_names() {
  const SamplingKernels& sampling = *supported_kernels().table[0]->sampling;
  std::vector<std::string> names;
  while (const char* name = sampling.stage_name(int64_t(names.size()))) names.emplace_back(name);
  return names;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < supported_kernels().size; ++i) names.emplace_back(supported_kernels().table[i]->name);
  return names;
}

// Operations on fixed arrays, which are recorded once and run many times without Python between them. `length` is the
// number of tokens in the caches of keys and values before a run.
class Program {
public:
  // The products of one x with several matrices: the units of all of them are shared among the threads at once.
  void linear(const In& x, const std::vector<In>& w, const std::vector<std::optional<In>>& b,
              const std::vector<Out>& y) {
    if (w.empty() || w.size() != b.size() || w.size() != y.size())
      throw std::invalid_argument("linear: expected as many w as b and y");
    std::vector<Linear> tasks;
    for (size_t i = 0; i < w.size(); ++i) tasks.push_back(linear_task(x, w[i], b[i], false, y[i]));
    add_step([tasks, kept = std::tuple{x, w, b, y}](int64_t, Interrupted poll) {
      return done(execute(kernels().linear, tasks, poll));
    });
  }
  void rotary(const In& x, const In& positions, const In& frequencies, const Out& y) {
    record(kernels().rotary, rotary_task(x, positions, frequencies, false, y), x, positions, frequencies, y);
  }
  void rms_norm(const In& x, const In& weight, double eps, const Out& y) {
    record(kernels().rms_norm, row_wise_task(x, weight, eps, false, y), x, weight, y);
  }
  void swiglu(const In& gate, const In& up, const Out& y) {
    record(kernels().swiglu, row_wise_task(gate, up, 0, false, y), gate, up, y);
  }
  // y += x, of float32 matrices.
  void add(const In& x, const Out& y) {
    const RowWise t = row_wise_task(x, In(x), 0, false, y);
    if (t.x.dtype != DType::f32 || t.y.dtype != DType::f32) throw std::invalid_argument("add: expected float32");
    add_step([t, kept = std::tuple{x, y}](int64_t, Interrupted) {
      const StandardFloats floats;
      for (int64_t r = 0; r < t.rows; ++r) {
        const auto* from = reinterpret_cast<const float*>(address(t.x, 0, r));
        auto* to = reinterpret_cast<float*>(address(t.y, 0, r));
        for (int64_t i = 0; i < t.columns; ++i) to[i * t.y.stride[1]] += from[i * t.x.stride[1]];
      }
      return Outcome::done;
    });
  }
  void append(const In& k, const In& v, const Out& panels, const Out& values) {
    add_step(
        [t = append_task(k, v, panels, values), kept = std::tuple{k, v, panels, values}](int64_t length, Interrupted) {
          t.run(length);
          return Outcome::done;
        });
  }
  // Attends to all that is in a cache, after the tokens of q were appended. options.total: for how many there is room.
  void attend(const In& q, const In& panels, const In& values, const Options& options, const Out& out) {
    Attention t = attention_task(q, panels, values, {}, {}, {}, {}, options);
    t.out = view(out, "out", t.batch, {t.H, t.L, t.E});
    add_step([t, kept = std::tuple{q, panels, values, out}](int64_t length, Interrupted poll) {
      Attention now = t;
      now.S = now.total = length + t.L;
      if (now.S > t.S) throw std::invalid_argument("length: no room in the cache");
      bool lost = false;
      now.lost = &lost;
      if (!execute(kernels().attention, now, poll)) return Outcome::interrupted;
      return lost ? Outcome::lost : Outcome::done;
    });
  }
  int64_t size() const { return int64_t(steps_.size()); }
  // Runs the steps from `first` on. Returns how many are done: where not all, the last of these has attended, and some
  // of its results are infinite or NaN.
  int64_t run(int64_t length, int64_t first) {
    if (first < 0 || first > size()) throw std::invalid_argument("first: no such step");
    const Interrupted poll = PyThread_get_thread_ident() == main_thread ? interrupted : nullptr;
    Outcome outcome = Outcome::done;
    int64_t step = first;
    {
      const nb::gil_scoped_release released;
      auto next_poll = std::chrono::steady_clock::now() + kPollInterval;
      while (step < size() && outcome == Outcome::done) {
        outcome = steps_[size_t(step++)](length, poll);
        if (!poll || outcome == Outcome::interrupted) continue;
        if (const auto now = std::chrono::steady_clock::now(); now >= next_poll) {
          if (interrupted()) outcome = Outcome::interrupted;
          next_poll = now + kPollInterval;
        }
      }
    }
    if (outcome == Outcome::interrupted) throw nb::python_error();
    return step;
  }

private:
  enum class Outcome { done, lost, interrupted };
  using Step = std::function<Outcome(int64_t length, Interrupted poll)>;
  static Outcome done(bool finished) { return finished ? Outcome::done : Outcome::interrupted; }
  void add_step(Step step) { steps_.push_back(std::move(step)); }
  template <class Task, class... Arrays>
  void record(const Kernel<Task>& kernel, const Task& task, const Arrays&... arrays) {
    add_step([&kernel, task, kept = std::tuple{arrays...}](int64_t, Interrupted poll) {
      return done(execute(kernel, task, poll));
    });
  }

  std::vector<Step> steps_;
};

} // namespace
} // namespace headway

NB_MODULE(_native, m) {
  using namespace headway;
  main_thread = nb::cast<unsigned long>(nb::module_::import_("threading").attr("main_thread")().attr("ident"));
  pthread_atfork(nullptr, nullptr, [] { main_thread = PyThread_get_thread_ident(); });
  nb::set_leak_warnings(false); // options stay in caches of Python's, some of which outlive the module
  m.doc() = "The kernels of headway behind plain arrays. Everything is checked by the Python layer; call that.";

  nb::class_<Options>(m, "Options")
      .def(nb::init<std::optional<double>, double, bool, bool, std::optional<int64_t>, std::optional<int64_t>, int64_t,
                    int64_t, bool, bool, bool>(),
           nb::kw_only(), "scale"_a.none(), "softcap"_a, "causal"_a, "bottom_right"_a, "window_left"_a.none(),
           "window_right"_a.none(), "total"_a, "key_offset"_a, "wide"_a, "k_in_panels"_a, "fast"_a)
      .def("wider", &Options::wider, "scale"_a);

  m.attr("CHUNK") = kChunk;
  m.attr("LANES") = kLanes;
  // Names, each at the place of its number.
  m.attr("SAMPLING_STAGES") = nb::tuple(nb::cast(stage_names()));
  m.attr("SAMPLING_TIES") = nb::tuple(nb::cast(std::vector<std::string>(std::begin(kTiesNames), std::end(kTiesNames))));
  m.attr("SAMPLING_FAULTS") =
      nb::tuple(nb::cast(std::vector<std::string>(std::begin(kFaultNames), std::end(kFaultNames))));
  m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "mask"_a.none(), "bias"_a.none(), "sinks"_a.none(),
        "kv_lengths"_a.none(), "rows"_a.none(), "options"_a, "out"_a, "lse"_a.none());
  m.def("attention_weights", &attention_weights, "q"_a, "k"_a, "mask"_a.none(), "bias"_a.none(), "sinks"_a.none(),
        "kv_lengths"_a.none(), "rows"_a.none(), "options"_a, "out"_a);
  m.def("node_chunks", &node_chunks, "first"_a, "end"_a);
  m.def("attention_nodes", &attention_nodes, "q"_a, "k"_a, "v"_a, "mask"_a.none(), "bias"_a.none(),
        "kv_lengths"_a.none(), "options"_a, "maximum"_a, "total_weight"_a, "weighted_sum"_a);
  m.def("attention_merge", &attention_merge, "chunks"_a, "maximum"_a, "total_weight"_a, "weighted_sum"_a,
        "sinks"_a.none(), "wide"_a, "out"_a, "lse"_a.none());
  m.def("linear", &linear, "x"_a, "w"_a, "b"_a.none(), "wide"_a, "fast"_a, "y"_a);
  m.def("pack", &pack, "w"_a, "panels"_a);
  m.def("rotary", &rotary, "x"_a, "positions"_a, "frequencies"_a, "wide"_a, "y"_a);
  m.def("rotary_frequencies", &rotary_frequencies, "base"_a, "frequencies"_a);
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "wide"_a, "y"_a);
  m.def("swiglu", &swiglu, "gate"_a, "up"_a, "wide"_a, "y"_a);
  m.def("append", &append, "k"_a, "v"_a, "panels"_a, "values"_a, "length"_a);
  nb::class_<Program>(m, "Program")
      .def(nb::init<>())
      .def("linear", &Program::linear, "x"_a, "w"_a, "b"_a, "y"_a)
      .def("rotary", &Program::rotary, "x"_a, "positions"_a, "frequencies"_a, "y"_a)
      .def("rms_norm", &Program::rms_norm, "x"_a, "weight"_a, "eps"_a, "y"_a)
      .def("swiglu", &Program::swiglu, "gate"_a, "up"_a, "y"_a)
      .def("add", &Program::add, "x"_a, "y"_a)
      .def("append", &Program::append, "k"_a, "v"_a, "panels"_a, "values"_a)
      .def("attend", &Program::attend, "q"_a, "panels"_a, "values"_a, "options"_a, "out"_a)
      .def("__len__", &Program::size)
      .def("run", &Program::run, "length"_a, "first"_a = 0);
  nb::class_<Stages>(m, "Stages").def(nb::init<std::vector<StepTuple>, In>(), nb::kw_only(), "steps"_a, "min_tokens"_a);
  nb::class_<RowHistories>(m, "Histories")
      .def(nb::init<In, In, In, In, In, In, Out, Out, Out, Out, Out, Out>(), nb::kw_only(), "slot"_a, "first"_a,
           "length"_a, "prompt"_a, "tokens"_a, "breakers"_a, "counted"_a, "distinct"_a, "id"_a, "times"_a, "same"_a,
           "logit"_a);
  nb::class_<Rows>(m, "Rows").def(
      nb::init<In, std::optional<In>, std::optional<In>, bool, Stages, In, std::optional<RowHistories>,
               std::optional<In>, std::optional<In>, std::optional<In>, std::optional<In>, Out>(),
      nb::kw_only(), "logits"_a, "bias"_a.none(), "allowed"_a.none(), "packed"_a, "stages"_a, "spared"_a,
      "histories"_a.none(), "seed"_a.none(), "stream"_a.none(), "position"_a.none(), "uniform"_a.none(), "status"_a);
  m.def("sample", &sample, "rows"_a, "draws"_a, "replacement"_a, "tokens"_a.none(), "probabilities"_a.none(),
        "filtered"_a.none());
  m.def("trace", &trace, "rows"_a, "counts"_a, "found"_a, "ids"_a.none(), "logits"_a.none(), "masses"_a.none());
  m.attr("PENALTY_KINDS") = int(kPenaltyKinds);
  m.def("penalize", &penalize, "logits"_a, "histories"_a, nb::kw_only(), "repetition"_a, "frequency"_a, "presence"_a,
        "dry_multiplier"_a, "dry_base"_a, "dry_allowed_length"_a, "repetition_window"_a, "frequency_window"_a,
        "dry_window"_a);
  m.def("rank", &rank, "rows"_a, "tokens"_a, "processed"_a, "ranks"_a, "logprob"_a, "top_id"_a, "top_key"_a,
        "top_logprob"_a);
  m.def("verify", &verify, "target"_a, "draft"_a.none(), "tokens"_a, "lengths"_a, "status"_a, "accepted"_a, "next"_a);
  m.def("convert", &convert_rows, "x"_a, "y"_a, "exponent"_a = 0);
  m.def("round", &round_rows, "x"_a, "decimals"_a, "y"_a);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("isas", &isas);
  m.def("fast", [] { return std::string(fast_kernels().name); });
  m.def("get_num_threads", &get_num_threads);
  m.def("processors", &processors);
  m.def("cpu_quota", &cpu_quota, "root"_a = "");
  m.def("set_num_threads", &set_num_threads, "n"_a, nb::call_guard<nb::gil_scoped_release>());
  // A bfloat16 tensor of another library, as its bits: NumPy has no name for the type and refuses it.
  m.def("bfloat16_bits", [](nb::ndarray<nb::ro, nb::device::cpu> x) {
    if (x.dtype() != nb::dlpack::dtype{uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1})
      throw std::invalid_argument("expected a bfloat16 array");
    std::vector<size_t> shape;
    std::vector<int64_t> strides;
    for (size_t i = 0; i < x.ndim(); ++i) shape.push_back(x.shape(i)), strides.push_back(x.stride(i));
    auto* owner = new nb::ndarray<nb::ro, nb::device::cpu>(x);
    nb::capsule keep(owner, [](void* p) noexcept { delete static_cast<nb::ndarray<nb::ro, nb::device::cpu>*>(p); });
    return nb::ndarray<nb::numpy, const uint16_t>(x.data(), x.ndim(), shape.data(), keep, strides.data());
  });
}
