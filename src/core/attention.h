// Attention: softmax(scale q k^T + bias, masked) v, in chunks of keys, never as an L x S array.
//
// A unit of work is a block of rows that share one key/value head: the queries of a group's heads, row i * repeat + h;
// where such blocks are few (decoding with few heads), a block and an aligned span of the chunks. For each chunk of 512
// keys (anchored at absolute position 0) the block packs K and V once; then a few rows at a time
//   1. scores   one chain of fused multiply-adds over D                          gemm.h
//   2. softmax  scale, softcap, bias, mask; one maximum; exponentials; their sum   soften()
//   3. weighted sum of V, one chain over the chunk's keys                        gemm.h
// leave a state (maximum, total weight, weighted sum). The states meet in the fixed tree of tree.h. Nothing is rescaled
// within a chunk, and an absent chunk changes no bit, so a row is a function of the keys that it may attend to.
#pragma once
#include "exp.h"
#include "gemm.h"
#include "tree.h"

namespace headway {
namespace {

constexpr int64_t kRowBlock = 384; // most rows that share one packing of K and V, which then costs 1 %
// Rows whose scores are computed together, panel of keys by panel: a panel is then read into the first-level cache once
// for all of them, while their scores (48 KB) stay in the second.
constexpr int64_t kBandTiles = 4, kBandRows = kBandTiles * kTileRows;
constexpr int64_t kBandKeys = 64; // four panels: 16 KB at D = 64. What a mask leaves out as a whole is passed over.

// How many units each thread should find, so that all end together.
constexpr int64_t kUnitsPerThread = 4;

enum class Produce { output, nodes, weights };

// Products of numbers as they are, under the contract of bits; or, where the caller asks for speed, of bfloat16 pairs:
// queries, keys, weights and values rounded to bfloat16 and multiplied two at a time. All else is the same.
enum class Products { exact, pairs };

template <class T> constexpr T kMinusInfinity = -T(__builtin_inff());

// One state of the tree: what a run of keys contributes to `rows` rows. A row that attends to none of the keys has
// maximum -inf, and joins as nothing.
template <class T> struct States {
  T *maximum, *total; // (rows)
  T* sum;             // (rows, width)
  int64_t width;
};

// Folds state b into a, for one row. The smaller side is scaled to the larger's maximum and added with one rounding.
template <class T> void join_row(T& maximum, T& total, T* sum, T b_maximum, T b_total, const T* b_sum, int64_t width) {
  if (b_maximum == kMinusInfinity<T>) return;
  const bool take = maximum == kMinusInfinity<T>, keep_a = maximum >= b_maximum;
  const Vec<T> weight = exp(Vec<T>(keep_a ? b_maximum - maximum : maximum - b_maximum));
  const auto joined = [&](Vec<T> a, Vec<T> b) { return take ? b : keep_a ? fma(b, weight, a) : fma(a, weight, b); };
  T lane[16];
  joined(Vec<T>(total), Vec<T>(b_total)).store(lane);
  total = lane[0];
  for (int64_t e = 0; e < width; e += 16) joined(Vec<T>::load(sum + e), Vec<T>::load(b_sum + e)).store(sum + e);
  if (!keep_a) maximum = b_maximum;
}
template <class T> void join(const States<T>& a, const States<T>& b, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    join_row(a.maximum[r], a.total[r], a.sum + r * a.width, b.maximum[r], b.total[r], b.sum + r * b.width, a.width);
}

// Where one row's mask and bias lie, and the keys it may reach, all relative to a chunk's first key.
template <class T> struct RowRules {
  int64_t low, high;
  const uint8_t* mask;
  int64_t mask_stride;
  const T* bias;
  int64_t bias_stride;
};

template <class T> Vec<T> load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1 && n >= 16) return Vec<T>::load(p);
  T x[16] = {};
  for (int64_t i = 0; i < least(n, 16); ++i) x[i] = p[i * stride];
  return Vec<T>::load(x);
}

// Which of the keys j .. j + 15 the row may attend to. A bias of -inf forbids as a mask does.
template <class T> Mask<T> allowed(const RowRules<T>& row, int64_t j) {
  using Int = typename IntOf<T>::type;
  const bool inside = row.low <= j && j + 16 <= row.high;
  Mask<T> keep = Int(-1);
  if (!inside) {
    const Vec<Int> key = convert<Int>(lane_index()) + Vec<Int>(Int(j));
    keep = (key >= Vec<Int>(Int(row.low))) & (key < Vec<Int>(Int(row.high)));
  }
  if (row.mask && row.mask_stride == 1 && inside) {
    keep = load_integers<Int>(row.mask + j) != Vec<Int>(Int(0));
  } else if (row.mask) {
    Int x[16] = {};
    for (int64_t i = most(row.low - j, 0); i < least(row.high - j, 16); ++i) x[i] = row.mask[(j + i) * row.mask_stride];
    keep = keep & (Vec<Int>::load(x) != Vec<Int>(Int(0)));
  }
  if (row.bias)
    keep = keep &
           (load_strided(row.bias + j * row.bias_stride, row.bias_stride, row.high - j) != Vec<T>(kMinusInfinity<T>));
  return keep;
}

// Whether scores are products times a positive scale and nothing else. That keeps their order, so the maximum of the
// scaled is the scaled maximum, rounding included, and products are scaled on their way into the exponential.
template <class T> bool plain(const RowRules<T>& row, T scale, T softcap) {
  return !row.bias && softcap == 0 && scale > 0;
}

// Products of keys begin .. end (multiples of 16) become scores, but for a plain row's scale, and -inf where the row
// may not attend. Returns the maximum of the scores: -inf where nothing is allowed, else finite or +inf, so that the
// exponentials of -inf scores are 0. A NaN score does not decide the maximum; it reaches the row through its
// exponential.
template <class T> T score_row(T* s, int64_t begin, int64_t end, const RowRules<T>& row, T scale, T softcap) {
  using Int = typename IntOf<T>::type;
  const bool is_plain = plain(row, scale, softcap);
  Vec<T> top = kMinusInfinity<T>;
  Mask<T> seen = Int(0);
  const auto decide = [&](int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j += 16) {
      Vec<T> x = Vec<T>::load(s + j);
      if (!is_plain) {
        x = x * Vec<T>(scale);
        if (softcap > 0) x = Vec<T>(softcap) * tanh(x / Vec<T>(softcap));
        if (row.bias) x = x + load_strided(row.bias + j * row.bias_stride, row.bias_stride, row.high - j);
      }
      const Mask<T> keep = allowed(row, j);
      seen = seen | keep;
      x = select(keep, x, Vec<T>(kMinusInfinity<T>));
      x.store(s + j);
      top = larger(x, top);
    }
  };
  int64_t free_from = end, free_to = end; // what needs no deciding, and no writing
  if (is_plain && !row.mask && round_up(row.low, 16) < row.high / 16 * 16)
    free_from = round_up(row.low, 16), free_to = row.high / 16 * 16, seen = Mask<T>(Int(-1));
  decide(begin, free_from);
  for (int64_t j = free_from; j < free_to; j += 16) top = larger(Vec<T>::load(s + j), top);
  decide(free_to, end);
  if (!any(seen)) return kMinusInfinity<T>;
  const T m = is_plain ? maximum(top) * scale : maximum(top);
  return m > Constants<T>::lowest ? m : Constants<T>::lowest;
}

// Scores times scale become exp(score - m); returns their sum over 16 lanes and one tree.
template <class T> T soften(T* s, int64_t begin, int64_t end, T scale, T m) {
  Vec<T> total = T(0);
#pragma GCC unroll 2
  for (int64_t j = begin; j < end; j += 16) {
    const Vec<T> p = exp(Vec<T>::load(s + j) * Vec<T>(scale) - Vec<T>(m));
    p.store(s + j);
    total = total + p;
  }
  return sum(total);
}

// Whether some number of a (rows, width) array is infinite or NaN.
template <class T, class B> bool non_finite(const B* v, int64_t row, int64_t rows, int64_t width) {
  Vec<T> poison = T(0); // x * 0 is 0 for finite x alone
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t e = 0; e < width; e += 16) poison = poison + load(v + j * row + e) * Vec<T>(T(0));
  return any(poison != poison);
}

inline int64_t block_count(const Attention& task, const Plan& plan) {
  return (task.L * (task.H / task.G) + plan.rows - 1) / plan.rows;
}
inline int64_t span_count(const Attention& task, const Plan& plan) {
  return most((task.S + plan.span * kChunk - 1) / (plan.span * kChunk), 1);
}
inline int64_t span_state_size(const Attention& task, const Plan& plan) {
  return round_up(2 * plan.rows, 16) + plan.rows * round_up(task.E, 16);
}

// The computation of one block of rows against its key/value head.
template <class T, Produce produce, Products products = Products::exact> struct AttentionBlock {
  static constexpr bool pairs = products == Products::pairs;
  const Attention& task;
  const Plan& plan;                   // rows: of a block, at most; span: chunks of a unit
  int64_t repeat, keys, width, slots; // heads per group; E rounded up to 16; tree slots
  // scratch
  T *query_buffer, *panels, *values, *row_buffer, *scores, *later_sums; // with room for pairs, which are smaller
  T *state_maximum, *state_total, *state_sum; // (slots, plan.rows [, width])
  // the block
  int64_t block, item, group, first_row, rows, span, first_key, last_key; // the keys of the unit's span
  const T* queries;
  int64_t query_row, k_offset, v_offset, mask_offset, bias_offset;
  int64_t low[kRowBlock], high[kRowBlock]; // keys that a row may reach, relative to key 0 of the task
  ChunkStack stack;
  // A single band reads each key and value once, from memory: it packs keys just before it reads them, and takes 16-bit
  // numbers as they are.
  bool once;
  // the chunk at hand
  int64_t chunk, chunk_from, chunk_to; // its first key; the keys of it that some row may reach
  Stored stored_keys, stored_values;
  uint32_t packed;     // which bands of kBandKeys are, a bit each
  int values_poisoned; // -1: not looked at yet

  AttentionBlock(const Attention& t, const Plan& p, Arena& arena) : task(t), plan(p) {
    repeat = task.H / task.G;
    keys = task.S;
    width = round_up(task.E, 16);
    slots = stack_slots((task.key_offset + keys + kChunk - 1) / kChunk, produce == Produce::nodes);
    query_buffer = arena.take<T>(plan.rows * (task.D + 1));
    panels = arena.take<T>(kChunk * (task.D + 1));
    values = arena.take<T>(kChunk * width);
    row_buffer = arena.take<T>(most((task.D + 1) * 16, most(2 * width, task.S * (produce == Produce::weights))));
    scores = arena.take<T>(kBandRows * kChunk);
    later_sums = arena.take<T>(kBandRows * width);
    state_maximum = arena.take<T>(slots * plan.rows);
    state_total = arena.take<T>(slots * plan.rows);
    state_sum = arena.take<T>(slots * plan.rows * width);
  }

  int64_t query_of(int64_t r) const { return (first_row + r) / repeat; }
  int64_t head_of(int64_t r) const { return group * repeat + (first_row + r) % repeat; }
  States<T> state(int64_t slot, int64_t row) const {
    const int64_t at = slot * plan.rows + row;
    return {state_maximum + at, state_total + at, state_sum + at * width, width};
  }

  void begin(int64_t unit) {
    const int64_t blocks = block_count(task, plan);
    span = unit % span_count(task, plan), block = unit / span_count(task, plan);
    first_key = span * plan.span * kChunk, last_key = least(keys, first_key + plan.span * kChunk);
    // The last rows first: under a causal mask they are the longest, and threads end together.
    first_row = (blocks - 1 - block % blocks) * plan.rows;
    group = block / blocks % task.G;
    item = block / blocks / task.G;
    rows = least(plan.rows, task.L * repeat - first_row);
    int64_t n = task.total;
    if (task.kv_lengths.data)
      n = *reinterpret_cast<const int64_t*>(static_cast<char*>(task.kv_lengths.data) +
                                            batch_offset(task.batch, task.kv_lengths, item) * 8);
    const int64_t shift = task.bottom_right ? n - task.L : 0, q_offset = batch_offset(task.batch, task.q, item);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = query_of(r) + shift;
      int64_t from = task.window_left == kUnset ? 0 : position - task.window_left;
      int64_t to = task.causal ? least(n, position + 1) : n;
      if (task.window_right != kUnset) to = least(to, position + task.window_right + 1);
      low[r] = least(most(from - task.key_offset, first_key), last_key);
      high[r] = most(low[r], least(to - task.key_offset, last_key));
    }
    if (pairs) {
      const int64_t steps = (task.D + 1) / 2;
      for (int64_t r = 0; r < rows; ++r) {
        auto* to = reinterpret_cast<BFloat16Pair*>(query_buffer) + r * steps;
        to[steps - 1].bits = 0;
        read_row(address(task.q, q_offset, head_of(r), query_of(r)), task.q.dtype, task.q.stride[2], task.D, row_buffer);
        write_row(row_buffer, task.D, to, DType::bf16);
      }
      queries = query_buffer;
      query_row = steps;
    } else if (task.q.dtype == dtype_of<T> && task.q.stride[2] == 1 && (repeat == 1 || task.L == 1)) {
      queries = reinterpret_cast<const T*>(address(task.q, q_offset, head_of(0), query_of(0)));
      query_row = task.q.stride[repeat == 1];
    } else {
      for (int64_t r = 0; r < rows; ++r)
        read_row(address(task.q, q_offset, head_of(r), query_of(r)), task.q.dtype, task.q.stride[2], task.D,
                 query_buffer + r * task.D);
      queries = query_buffer;
      query_row = task.D;
    }
    once = rows <= kBandRows && produce != Produce::weights;
    k_offset = batch_offset(task.batch, task.k, item);
    v_offset = batch_offset(task.batch, task.v, item);
    mask_offset = batch_offset(task.batch, task.mask, item);
    bias_offset = batch_offset(task.batch, task.bias, item);
  }

  // Turns to keys from .. to, which lie in the chunk that starts at key `first` (all relative to key 0).
  void enter(int64_t first, int64_t from, int64_t to) {
    chunk = first, chunk_from = from - first, chunk_to = to - first;
    packed = 0, values_poisoned = -1;
    const View &k = task.k, &v = task.v;
    if (pairs) {
      stored_keys = {panels, dtype_of<T>, 16, (task.D + 1) / 2 * 16, 0};
      stored_values = {values, dtype_of<T>, width, 16, 0};
      return;
    }
    const auto readable = [&](DType dtype) { return dtype == dtype_of<T> || (once && Stored::kept<T>(dtype)); };
    if (task.k_in_panels && readable(k.dtype))
      stored_keys = {address(k, k_offset, group, chunk / 16), k.dtype, 16, k.stride[1], kBandKeys / 16 * k.stride[1]};
    else
      stored_keys = {panels, dtype_of<T>, 16, 16 * task.D, 0};
    if (readable(v.dtype) && v.stride[2] == 1 && task.E == width)
      stored_values = {address(v, v_offset, group, chunk), v.dtype, v.stride[1], 16, 16 * v.stride[1]};
    else
      stored_values = {values, dtype_of<T>, width, 16, 0};
  }

  // Where the panel of key j lies. Keys that are read once go through a small buffer, which stays in the cache.
  int64_t panel_of(int64_t j) const {
    return (stored_keys.data == panels && once ? j % kBandKeys : j) / 16 * stored_keys.block;
  }
  // Packs the keys and values of band j / kBandKeys of the chunk, where they are not and need to be.
  void pack(int64_t j) {
    if (packed >> j / kBandKeys & 1) return;
    packed |= 1u << j / kBandKeys;
    const View &k = task.k, &v = task.v;
    const int64_t from = most(j, chunk_from), to = least(j + kBandKeys, chunk_to);
    for (int64_t i = from / 16 * 16; i < to && stored_keys.data == panels; i += 16) {
      T* panel = panels + panel_of(i);
      const int64_t key = chunk + i, count = least(16, keys - key);
      if (task.k_in_panels) {
        read_row(address(k, k_offset, group, key / 16), k.dtype, 1, 16 * task.D, panel);
      } else if (k.stride[2] == 1 && Stored::kept<T>(k.dtype)) {
        Stored{address(k, k_offset, group, key), k.dtype, 0, 0, 0}.at<T>(0, [&](auto* rows_of_k) {
          make_panel(rows_of_k, k.stride[1], count, task.D, panel, rows_of_k + 16 * k.stride[1]);
        });
      } else {
        for (int64_t r = 0; r < count; ++r)
          read_row(address(k, k_offset, group, key + r), k.dtype, k.stride[2], task.D, row_buffer + r * task.D);
        make_panel(row_buffer, task.D, count, task.D, panel);
      }
    }
    for (int64_t i = from; i < to && stored_values.data == values; ++i) {
      T* row = values + i * width;
      read_row(address(v, v_offset, group, chunk + i), v.dtype, v.stride[2], task.E, row);
      for (int64_t e = task.E; e < width; ++e) row[e] = T(0);
    }
  }

  // The same as pairs: of features in panels of keys, (D / 2, 16 keys); of keys in rows of values, (keys / 2, E). What is
  // odd meets a zero.
  void pack_pairs(int64_t j) {
    if (packed >> j / kBandKeys & 1) return;
    packed |= 1u << j / kBandKeys;
    const View& k = task.k;
    const int64_t from = most(j, chunk_from), to = least(j + kBandKeys, chunk_to), steps = (task.D + 1) / 2;
    for (int64_t i = from / 16 * 16; i < to; i += 16) {
      auto* panel = reinterpret_cast<int32_t*>(panels) + panel_of(i);
      const int64_t key = chunk + i, count = least(16, keys - key);
      if (task.k_in_panels) {
        read_row(address(k, k_offset, group, key / 16), k.dtype, 1, 16 * task.D, row_buffer);
        memset(row_buffer + 16 * task.D, 0, 16 * sizeof(T));
        for (int64_t d = 0; d < task.D; d += 2)
          join_pairs(row_buffer + d * 16, row_buffer + (d + 1) * 16, 16, panel + d * 8);
      } else if (k.dtype == DType::bf16 && k.stride[2] == 1 && task.D % 2 == 0 && k.stride[1] % 2 == 0) {
        const auto* words = reinterpret_cast<const int32_t*>(address(k, k_offset, group, key));
        make_panel(words, k.stride[1] / 2, count, steps, panel, words + 8 * k.stride[1]);
      } else {
        auto* words = reinterpret_cast<int32_t*>(row_buffer);
        T* row = row_buffer + 16 * steps; // behind 16 rows of pairs
        for (int64_t r = 0; r < count; ++r) {
          words[r * steps + steps - 1] = 0;
          read_row(address(k, k_offset, group, key + r), k.dtype, k.stride[2], task.D, row);
          write_row(row, task.D, words + r * steps, DType::bf16);
        }
        make_panel(words, steps, count, steps, panel);
      }
    }
    const bool narrow_rows = task.v.dtype == DType::bf16 && task.v.stride[2] == 1 && task.E == width;
    for (int64_t i = from / 2 * 2; i < to; i += 2) {
      if (narrow_rows && i >= chunk_from && i + 1 < chunk_to) {
        const auto* even = reinterpret_cast<const uint16_t*>(address(task.v, v_offset, group, chunk + i));
        const uint16_t* odd = even + task.v.stride[1];
        auto* pair = reinterpret_cast<int32_t*>(values) + i / 2 * width;
        for (int64_t e = 0; e < width; e += 16)
          (load_integers<int32_t>(even + e) | load_integers<int32_t>(odd + e) << 16).store(pair + e);
        continue;
      }
      T *even = row_buffer, *odd = row_buffer + width;
      read_values(i >= chunk_from ? i : -1, even);
      read_values(i + 1 < chunk_to ? i + 1 : -1, odd);
      join_pairs(even, odd, width, reinterpret_cast<int32_t*>(values) + i / 2 * width);
    }
  }
  static void join_pairs(const T* even, const T* odd, int64_t n, int32_t* to) {
    for (int64_t i = 0; i < n; i += 16) (narrow(load(even + i)) | narrow(load(odd + i)) << 16).store(to + i);
  }
  // One row of V as the caller gave it, or zeros.
  void read_values(int64_t key, T* to) const {
    const int64_t count = key < 0 ? 0 : task.E;
    if (count) read_row(address(task.v, v_offset, group, chunk + key), task.v.dtype, task.v.stride[2], count, to);
    for (int64_t e = count; e < width; ++e) to[e] = T(0);
  }

  RowRules<T> rules(int64_t r) const {
    RowRules<T> row{};
    row.low = least(most(low[r] - chunk, 0), kChunk);
    row.high = least(most(high[r] - chunk, 0), kChunk);
    row.mask_stride = task.mask.stride[2];
    row.bias_stride = task.bias.stride[2];
    if (task.mask.data)
      row.mask = reinterpret_cast<const uint8_t*>(address(task.mask, mask_offset, head_of(r), query_of(r), chunk));
    if (task.bias.data)
      row.bias = reinterpret_cast<const T*>(address(task.bias, bias_offset, head_of(r), query_of(r), chunk));
    return row;
  }

  // A few rows, and the keys of the chunk that some of them may reach: from .. to, in the bands of kBandKeys whose bit
  // is set. What they may all reach, but for the mask, is a smaller part.
  struct Tile {
    int64_t row, count, from, to, all_from, all_to;
    uint32_t bands;
    bool begun; // whether the chain at hand has keys
    bool reaches(int64_t j) const { return bands >> j / kBandKeys & 1; }
  };
  Tile tile_at(int64_t row) const {
    Tile t{row, least(kTileRows, rows - row), kChunk, 0, 0, kChunk, ~0u, false};
    for (int64_t r = row; r < row + t.count; ++r) {
      const int64_t a = least(most(low[r] - chunk, 0), kChunk), b = least(most(high[r] - chunk, 0), kChunk);
      t.all_from = most(t.all_from, a), t.all_to = least(t.all_to, b);
      if (a < b) t.from = least(t.from, a), t.to = most(t.to, b);
    }
    if (task.mask.data) {
      for (int64_t j = t.from / kBandKeys * kBandKeys; j < t.to; j += kBandKeys)
        if (masked_out(t, most(j, t.from), least(j + kBandKeys, t.to))) t.bands &= ~(1u << j / kBandKeys);
      while (t.from < t.to && !t.reaches(t.from)) t.from = (t.from / kBandKeys + 1) * kBandKeys;
      while (t.from < t.to && !t.reaches(t.to - 1)) t.to = (t.to - 1) / kBandKeys * kBandKeys;
    }
    t.all_from = least(t.all_from, t.to), t.all_to = most(t.all_to, t.from);
    return t;
  }
  bool masked_out(const Tile& t, int64_t from, int64_t to) const {
    for (int64_t r = t.row; r < t.row + t.count; ++r) {
      const RowRules<T> row = rules(r);
      uint8_t any_allowed = 0;
      if (row.mask_stride == 1)
        for (int64_t j = from; j < to; ++j) any_allowed |= row.mask[j];
      else
        for (int64_t j = from; j < to; ++j) any_allowed |= row.mask[j * row.mask_stride];
      if (any_allowed) return false;
    }
    return true;
  }

  // Up to kBandRows rows, whose scores are computed together.
  struct Band {
    Tile tiles[kBandTiles];
    int64_t count = 0, first, begin = kChunk, end = 0; // tiles that reach anything; the first row; the keys
  };

  // Rows first .. first + kBandRows against the chunk: scores, softened, weighted sum, into `into`.
  void attend(int64_t first, const States<T>& into) {
    Band band;
    band.first = first;
    for (int64_t row = first; row < least(rows, first + kBandRows); row += kTileRows) {
      const Tile t = tile_at(row);
      for (int64_t r = row; r < row + t.count; ++r) into.maximum[r] = kMinusInfinity<T>, into.total[r] = T(0);
      if (t.from >= t.to) continue;
      band.tiles[band.count++] = t;
      band.begin = least(band.begin, t.from / kBandKeys * kBandKeys), band.end = most(band.end, t.to);
    }
    score(band);
    const T scale = T(task.scale), softcap = T(task.softcap);
    for (int64_t i = 0; i < band.count; ++i) {
      Tile& t = band.tiles[i];
      T* s = scores + (t.row - first) * kChunk;
      const int64_t from = t.from / 16 * 16, to = round_up(t.to, 16);
      T *maximum = into.maximum + t.row, *total = into.total + t.row;
      // All maxima before all exponentials: a row's would wait for its own maximum.
      for (int64_t r = 0; r < t.count; ++r)
        maximum[r] = score_row(s + r * kChunk, from, to, rules(t.row + r), scale, softcap);
      const bool scaled = plain(rules(t.row), scale, softcap); // the same for all rows
      for (int64_t r = 0; r < t.count; ++r)
        if (maximum[r] == kMinusInfinity<T>)
          memset(s + r * kChunk + from, 0, size_t(to - from) * sizeof(T));
        else
          total[r] = soften(s + r * kChunk, from, to, scaled ? scale : T(1), maximum[r]);
      if (poisoned(t)) {
        select_values(t, s, into);
        t.bands = 0;
      } else if constexpr (pairs) {
        for (int64_t r = 0; r < t.count; ++r)
          for (int64_t j = from; j < to; j += 16) // in place: what is written is half as long
            store_narrow(load(s + r * kChunk + j), reinterpret_cast<uint16_t*>(s + r * kChunk) + j);
      }
    }
    if (width) sum_values(band, into);
  }

  // Panel by panel of keys, for all tiles.
  void score(const Band& band) {
    for (int64_t j = band.begin; j < band.end; j += kBandKeys)
      for (int64_t i = 0; i < band.count; ++i) {
        const Tile& t = band.tiles[i];
        const int64_t a = most(j, t.from / 16 * 16), b = least(j + kBandKeys, round_up(t.to, 16));
        if (a >= b || !t.reaches(j)) continue;
        T* s = scores + (t.row - band.first) * kChunk + a;
        if constexpr (pairs) {
          pack_pairs(j);
          multiply(t.count, b - a, query_row, reinterpret_cast<const BFloat16Pair*>(queries) + t.row * query_row,
                   query_row, reinterpret_cast<const BFloat16Pair*>(panels) + panel_of(a), 16, stored_keys.block, s,
                   kChunk);
        } else {
          pack(j);
          times(t.count, b - a, task.D, queries + t.row * query_row, query_row, stored_keys, panel_of(a), s, kChunk);
        }
      }
  }

  // A weighted sum is one chain for each kChain keys, and the chains' sum in order.
  void sum_values(Band& band, const States<T>& into) {
    for (int64_t link = band.begin / kChain * kChain; link < band.end; link += kChain) {
      for (int64_t i = 0; i < band.count; ++i) band.tiles[i].begun = false;
      // Read once, values go band by band, so that all tiles find them in the cache.
      const int64_t step = once ? kBandKeys : kChain;
      for (int64_t j = link; j < least(link + kChain, band.end); j += step)
        for (int64_t i = 0; i < band.count; ++i) {
          Tile& t = band.tiles[i];
          T* sum = t.from >= link ? into.sum + t.row * width : later_sums + (t.row - band.first) * width;
          const int64_t stop = least(j + step, t.to);
          for (int64_t a = most(j, t.from), b; a < stop; a = b) {
            const auto next = [&](int64_t key) { return least((key / kBandKeys + 1) * kBandKeys, stop); };
            b = next(a);
            if (!t.reaches(a)) continue;
            while (b < stop && t.reaches(b)) b = next(b);
            weigh(t, band.first, a, b, sum);
            t.begun = true;
          }
        }
      for (int64_t i = 0; i < band.count; ++i) {
        const Tile& t = band.tiles[i];
        if (!t.begun || t.from >= link) continue;
        T* sum = into.sum + t.row * width;
        const T* later = later_sums + (t.row - band.first) * width;
        for (int64_t e = 0; e < t.count * width; e += 16) (load(sum + e) + load(later + e)).store(sum + e);
      }
    }
  }
  void weigh(const Tile& t, int64_t first, int64_t a, int64_t b, T* sum) {
    const T* p = scores + (t.row - first) * kChunk;
    if constexpr (pairs)
      multiply(t.count, width, (b + 1) / 2 - a / 2, reinterpret_cast<const BFloat16Pair*>(p) + a / 2, kChunk,
               reinterpret_cast<const BFloat16Pair*>(values) + a / 2 * width, width, 16, sum, width, t.begun);
    else
      times(t.count, width, b - a, p + a, kChunk, stored_values, a * stored_values.row, sum, width, t.begun);
  }

  void times(int64_t row_count, int64_t columns, int64_t k_count, const T* a, int64_t a_row, const Stored& b,
             int64_t offset, T* c, int64_t c_row, bool onto = false) {
    if (once)
      b.at<T>(offset, [&](auto* from) {
        multiply<Source::memory>(row_count, columns, k_count, a, a_row, from, b.row, b.block, c, c_row, onto, b.ahead);
      });
    else
      multiply(row_count, columns, k_count, a, a_row, static_cast<const T*>(b.data) + offset, b.row, b.block, c, c_row,
               onto);
  }

  // Whether V holds NaN or infinity where some row of the tile must not see it. A mask may leave out any key of the
  // chunk, so all are looked at, once; else only the keys that not all rows reach.
  bool poisoned(const Tile& t) {
    const auto among = [&](int64_t from, int64_t to) {
      if constexpr (pairs) {
        for (int64_t j = most(from / 2 * 2, chunk_from); j < least(round_up(to, 2), chunk_to); ++j) {
          read_values(j, row_buffer);
          if (non_finite<T>(row_buffer, width, 1, width)) return true;
        }
        return false;
      }
      if (from >= to) return false;
      return stored_values.at<T>(from * stored_values.row,
                                 [&](auto* v) { return non_finite<T>(v, stored_values.row, to - from, width); });
    };
    if (!task.mask.data && !task.bias.data) return among(t.from, t.all_from) || among(t.all_to, t.to);
    if (values_poisoned < 0) values_poisoned = among(chunk_from, chunk_to);
    return values_poisoned;
  }

  // The weighted sum where V holds NaN or infinity that some row must not see: 0 * NaN is NaN, so masked keys are
  // stepped over one by one. The chain over the other keys is the same as the tile's.
  void select_values(const Tile& t, const T* tile_scores, const States<T>& into) {
    using Int = typename IntOf<T>::type;
    for (int64_t r = 0; r < t.count; ++r) {
      const RowRules<T> row = rules(t.row + r);
      T *sum = into.sum + (t.row + r) * width, *chain = later_sums;
      memset(sum, 0, size_t(width) * sizeof(T));
      for (int64_t link = t.from / kChain * kChain; link < t.to; link += kChain) {
        memset(chain, 0, size_t(width) * sizeof(T));
        for (int64_t j = most(link, t.from / 16 * 16); j < least(link + kChain, t.to); j += 16) {
          Int keep[16];
          allowed(row, j).store(keep);
          for (int64_t i = 0; i < 16; ++i) {
            if (!keep[i]) continue;
            const Vec<T> p = tile_scores[r * kChunk + j + i];
            const auto add = [&](auto* v) {
              for (int64_t e = 0; e < width; e += 16) fma(p, load(v + e), load(chain + e)).store(chain + e);
            };
            if (pairs)
              read_values(j + i, row_buffer), add(row_buffer);
            else
              stored_values.at<T>((j + i) * stored_values.row, add);
          }
        }
        for (int64_t e = 0; e < width; e += 16) (load(sum + e) + load(chain + e)).store(sum + e);
      }
    }
  }

  // Enters each chunk of keys that some row of the block may reach, and calls visit.
  template <class Visit> void for_each_chunk(Visit visit) {
    int64_t from = keys, to = 0;
    for (int64_t r = 0; r < rows; ++r)
      if (low[r] < high[r]) from = least(from, low[r]), to = most(to, high[r]);
    if (produce == Produce::nodes) from = 0, to = keys; // a part hands on the same nodes for every row
    for (int64_t first = from / kChunk * kChunk; first < to; first += kChunk) {
      enter(first, most(from, first), least(to, first + kChunk));
      visit();
    }
  }

  void run(int64_t unit, void* shared) {
    begin(unit);
    const int64_t first_chunk = task.key_offset / kChunk;
    stack.size = stack.frozen = 0;
    stack.before = produce == Produce::nodes ? first_chunk - 1 : -1;
    for_each_chunk([&] {
      const int slot = stack.push(first_chunk + chunk / kChunk, joiner());
      for (int64_t band = 0; band < rows; band += kBandRows) attend(band, state(slot, 0));
    });
    if (produce == Produce::nodes) {
      stack.settle(first_chunk + (keys + kChunk - 1) / kChunk, joiner());
      for (int64_t n = 0; n < task.nodes; ++n) hand_on(n);
      return;
    }
    stack.finish(joiner());
    if (stack.size == 0)
      for (int64_t r = 0; r < rows; ++r) state_maximum[r] = kMinusInfinity<T>, state_total[r] = T(0);
    if (span_count(task, plan) > 1 && !last_of_spans(shared)) return;
    if (produce == Produce::output)
      for (int64_t r = 0; r < rows; ++r) finish_row(task, item, head_of(r), query_of(r), state(0, r), row_buffer);
    if (produce == Produce::weights) write_weights();
  }
  auto joiner() {
    return [this](int slot) { join(state(slot, 0), state(slot + 1, 0), rows); };
  }

  // Leaves the span's state, a node of the tree, where the block's other units see it. The unit that comes last joins
  // all of them; for any other it returns false.
  bool last_of_spans(void* shared) {
    const int64_t spans = span_count(task, plan);
    Arena arena{static_cast<char*>(shared)};
    int64_t* arrived = arena.take<int64_t>(plan.units / spans) + block;
    T* states = arena.take<T>(plan.units * span_state_size(task, plan));
    const auto slot_of = [&](int64_t i) {
      T* at = states + (block * spans + i) * span_state_size(task, plan);
      return States<T>{at, at + plan.rows, at + round_up(2 * plan.rows, 16), width};
    };
    copy(state(0, 0), slot_of(span));
    if (__atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL) != spans) return false;
    stack.size = stack.frozen = 0;
    for (int64_t i = 0; i < spans; ++i) copy(slot_of(i), state(stack.push(i * plan.span, joiner()), 0));
    stack.finish(joiner());
    return true;
  }
  void copy(const States<T>& from, const States<T>& to) {
    memcpy(to.maximum, from.maximum, size_t(rows) * sizeof(T));
    memcpy(to.total, from.total, size_t(rows) * sizeof(T));
    memcpy(to.sum, from.sum, size_t(rows * width) * sizeof(T));
  }

  void hand_on(int64_t node) {
    const States<T> s = state(node, 0);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = ((node * task.batch.size() + item) * task.H + head_of(r)) * task.L + query_of(r);
      const bool nothing = s.maximum[r] == kMinusInfinity<T>;
      static_cast<T*>(task.maximum)[row] = s.maximum[r];
      static_cast<T*>(task.total_weight)[row] = canonical(s.total[r]);
      for (int64_t e = 0; e < task.E; ++e)
        static_cast<T*>(task.weighted_sum)[row * task.E + e] = nothing ? T(0) : canonical(s.sum[r * width + e]) + T(0);
    }
  }

  // The second walk over the keys, for attention_weights: exp(score - maximum) / total.
  void write_weights() {
    const int64_t offset = batch_offset(task.batch, task.out, item);
    for (int64_t r = 0; r < rows; ++r) {
      memset(row_buffer, 0, size_t(keys) * sizeof(T));
      write_row(row_buffer, keys, address(task.out, offset, head_of(r), query_of(r)), task.out.dtype);
      const T sink = read_sink(task, item, head_of(r));
      const States<T> s = state(0, r);
      add_sink(sink, s.maximum[0], s.total[0]);
    }
    for_each_chunk([&] {
      for (int64_t j = 0; j < kChunk; j += kBandKeys) pack(j);
      for (int64_t r = 0; r < rows; ++r) {
        const RowRules<T> row = rules(r);
        const States<T> s = state(0, r);
        if (row.low >= row.high || s.maximum[0] == kMinusInfinity<T>) continue;
        const int64_t begin = row.low / 16 * 16, end = round_up(row.high, 16);
        times(1, end - begin, task.D, queries + r * query_row, query_row, stored_keys, panel_of(begin), scores + begin,
              kChunk);
        const T scale = T(task.scale), softcap = T(task.softcap);
        score_row(scores, begin, end, row, scale, softcap);
        soften(scores, begin, end, plain(row, scale, softcap) ? scale : T(1), s.maximum[0]);
        for (int64_t j = row.low; j < row.high; ++j) scores[j] /= s.total[0];
        char* out = address(task.out, offset, head_of(r), query_of(r), chunk + row.low);
        write_row(scores + row.low, row.high - row.low, out, task.out.dtype);
      }
    });
  }

  static T read_sink(const Attention& task, int64_t item, int64_t head) {
    if (!task.sinks.data) return kMinusInfinity<T>;
    return *reinterpret_cast<const T*>(address(task.sinks, batch_offset(task.batch, task.sinks, item), head));
  }
  // A sink is a score without a value: it joins the total alone. Returns what the weighted sum is to be scaled by.
  static T add_sink(T sink, T& m, T& total) {
    if (sink == kMinusInfinity<T> || m == kMinusInfinity<T>) return T(1);
    const T joint = m > sink ? m : sink, scale = exp(m - joint);
    total = total * scale + exp(sink - joint);
    m = joint;
    return scale;
  }

  // State to result: the sink, one division an element, the log-sum-exp over the keys alone.
  static void finish_row(const Attention& task, int64_t item, int64_t head, int64_t query, const States<T>& s,
                         T* buffer) {
    T m = s.maximum[0], total = s.total[0];
    if (task.lse.data) {
      const T lse = m == kMinusInfinity<T> ? m : m + log(total);
      write_row(&lse, 1, address(task.lse, batch_offset(task.batch, task.lse, item), head, query), task.lse.dtype);
    }
    const T scale = add_sink(read_sink(task, item, head), m, total);
    for (int64_t e = 0; e < s.width; e += 16) {
      const Vec<T> sum = Vec<T>::load(s.sum + e) * Vec<T>(scale);
      const Vec<T> out = m == kMinusInfinity<T> ? Vec<T>(T(0)) : sum / Vec<T>(total) + Vec<T>(T(0)); // -0 + 0 is 0
      out.store(buffer + e);
    }
    write_row(buffer, task.E, address(task.out, batch_offset(task.batch, task.out, item), head, query), task.out.dtype);
  }
};

template <class T, Produce produce, Products products = Products::exact>
Plan plan_attention_as(const Attention& task, int64_t threads) {
  const int64_t rows = task.L * (task.H / task.G), heads = task.batch.size() * task.G;
  const int64_t chunks = most((task.S + kChunk - 1) / kChunk, 1);
  Plan plan{};
  plan.work = rough_product(task.batch.size(), task.H, task.L, task.S, task.D + task.E);
  const int64_t enough = kUnitsPerThread * most(least(threads, plan.work / kWorkPerThread), 1);
  // Blocks of equal size; smaller ones where there are too few, but not so small that packing shows.
  plan.rows = kRowBlock;
  while (plan.rows > 2 * kBandRows && heads * ((rows + plan.rows - 1) / plan.rows) < enough) plan.rows -= kBandRows;
  const int64_t blocks = most((rows + plan.rows - 1) / plan.rows, 1);
  plan.rows = round_up(most((rows + blocks - 1) / blocks, 1), kTileRows);
  // The keys are cut where that is still too few: into as many chunks as a node of the tree has, a power of two.
  for (plan.span = 1; plan.span < chunks;) plan.span *= 2;
  if (produce == Produce::output)
    while (plan.span > 1 && heads * blocks * ((chunks + plan.span - 1) / plan.span) < enough) plan.span /= 2;
  plan.units = heads * block_count(task, plan) * span_count(task, plan);
  Arena counting{nullptr};
  const AttentionBlock<T, produce, products> block(task, plan, counting);
  plan.workspace = counting.used;
  if (span_count(task, plan) > 1)
    plan.shared = round_up(heads * blocks * 8, 64) + plan.units * span_state_size(task, plan) * int64_t(sizeof(T));
  return plan;
}
template <Produce produce> Plan plan_attention(const Attention& task, int64_t threads) {
  return task.compute == DType::f64 ? plan_attention_as<double, produce>(task, threads)
                                    : plan_attention_as<float, produce>(task, threads);
}
template <Produce produce> void run_attention(const Attention& task, const Plan& plan, int64_t unit, Memory memory) {
  Arena arena{static_cast<char*>(memory.own)};
  if (task.compute == DType::f64)
    AttentionBlock<double, produce>(task, plan, arena).run(unit, memory.shared);
  else
    AttentionBlock<float, produce>(task, plan, arena).run(unit, memory.shared);
}

// Joining states that were computed apart: nodes (nodes, batch, H, L) in order of their chunks. A unit is one head.
template <class T> struct AttentionMerge {
  const Attention& task;
  int64_t width;
  T *maximum, *total, *sums, *buffer; // (slots), (slots), (slots, width), (width)

  AttentionMerge(const Attention& t, Arena& arena) : task(t) {
    const int64_t slots = stack_slots(task.nodes ? task.node_chunk[task.nodes - 1] + 1 : 1, false);
    width = round_up(task.E, 16);
    maximum = arena.take<T>(slots);
    total = arena.take<T>(slots);
    sums = arena.take<T>(slots * width);
    buffer = arena.take<T>(width);
  }
  void run(int64_t unit) {
    const int64_t item = unit / task.H, head = unit % task.H;
    const auto joiner = [&](int i) {
      join_row(maximum[i], total[i], sums + i * width, maximum[i + 1], total[i + 1], sums + (i + 1) * width, width);
    };
    for (int64_t query = 0; query < task.L; ++query) {
      ChunkStack stack;
      maximum[0] = kMinusInfinity<T>, total[0] = T(0);
      memset(sums, 0, size_t(width) * sizeof(T));
      for (int64_t n = 0; n < task.nodes; ++n) {
        const int64_t row = ((n * task.batch.size() + item) * task.H + head) * task.L + query;
        const int slot = stack.push(task.node_chunk[n], joiner);
        maximum[slot] = static_cast<T*>(task.maximum)[row];
        total[slot] = static_cast<T*>(task.total_weight)[row];
        T* sum = sums + slot * width;
        for (int64_t e = 0; e < width; ++e)
          sum[e] = e < task.E ? static_cast<T*>(task.weighted_sum)[row * task.E + e] : T(0);
      }
      stack.finish(joiner);
      AttentionBlock<T, Produce::output>::finish_row(task, item, head, query, {maximum, total, sums, width}, buffer);
    }
  }
};

inline Plan plan_merge(const Attention& task, int64_t) {
  Arena counting{nullptr};
  if (task.compute == DType::f64)
    AttentionMerge<double>(task, counting);
  else
    AttentionMerge<float>(task, counting);
  const int64_t rows = task.batch.size() * task.H;
  return {rows, counting.used, rough_product(rows, task.L, task.E, task.nodes)};
}
inline void run_merge(const Attention& task, const Plan&, int64_t unit, Memory memory) {
  Arena arena{static_cast<char*>(memory.own)};
  if (task.compute == DType::f64)
    AttentionMerge<double>(task, arena).run(unit);
  else
    AttentionMerge<float>(task, arena).run(unit);
}

} // namespace
} // namespace headway
