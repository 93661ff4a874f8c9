// Attention: softmax(scale q k^T + bias, masked) v, in chunks of keys, never as an L x S array.
//
// A unit of work is a block of rows that share one key/value head: the queries of a group's heads, row i * repeat + h;
// where such blocks are few (decoding with few heads), a block and an aligned span of the chunks. For each chunk of 512
// keys (anchored at absolute position 0) the block packs K and V once; then a few rows at a time
//   1. scores   one chain of fused multiply-adds over D                            gemm.h
//   2. softmax  scale, softcap, bias, mask; one maximum; exponentials; their sum   softmax.h
//   3. weighted sum of V, one chain over the chunk's keys                          gemm.h
// leave a state (maximum, total weight, weighted sum). The states meet in the fixed tree of tree.h. Nothing is rescaled
// within a chunk, and an absent chunk changes no bit, so a row is a function of the keys that it may attend to.
#pragma once
#include "../ground/makespan.h"
#include "../ground/tree.h"
#include "operands.h"
#include "softmax.h"

namespace headway {
namespace {

constexpr int64_t kUnitsPerThread = 4; // at most, where units are cut so that threads end together
constexpr double kJoinChunks = 0.06;   // joining two runs of keys takes as long as this part of a chunk
// The most bytes that the rows of a block take, unless they are a single band.
constexpr int64_t kRowsBytes = 64 << 20;

enum class Produce { output, nodes, weights };

// One state of the tree: what a run of keys contributes to `rows` rows. A row that attends to none of the keys has
// maximum -inf, and joins as nothing.
template <class T> struct States {
  T *maximum, *total; // (rows)
  T* sum;             // (rows, width)
  int64_t width;
};

// Folds state b into a, for one row. The smaller side is scaled to the larger's maximum and added with one rounding.
template <class T> void join_row(T& maximum, T& total, T* sum, T b_maximum, T b_total, const T* b_sum, int64_t width) {
  if (b_maximum == -T(kInfinity)) return;
  const bool take = maximum == -T(kInfinity), keep_a = maximum >= b_maximum;
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

// Where the results of one batch item go, and its sinks.
template <class T> struct Results {
  const Attention& task;
  int64_t out, lse, sinks; // offsets

  Results(const Attention& t, int64_t item)
      : task(t), out(batch_offset(t.batch, t.out, item)), lse(batch_offset(t.batch, t.lse, item)),
        sinks(batch_offset(t.batch, t.sinks, item)) {}

  // A sink is a score without a value: it joins the total alone. Returns what the weighted sum is to be scaled by.
  T add_sink(int64_t head, T& m, T& total) const {
    if (!task.sinks.data) return T(1);
    const T sink = *reinterpret_cast<const T*>(address(task.sinks, sinks, head));
    if (sink == -T(kInfinity) || m == -T(kInfinity)) return T(1);
    const T joint = m > sink ? m : sink, scale = exp(m - joint);
    total = total * scale + exp(sink - joint);
    m = joint;
    return scale;
  }
  // Numbers left the range of the type: the caller computes these rows again, in a wider type.
  void note_lost(bool lost) const {
    if (lost && task.lost) __atomic_store_n(task.lost, true, __ATOMIC_RELAXED);
  }
  // State to result: the sink, one division an element, the log-sum-exp over the keys alone.
  // `poison` becomes NaN in some lane where not all of these are finite.
  void finish(int64_t head, int64_t query, const States<T>& s, T* buffer, Vec<T>& poison) const {
    T m = s.maximum[0], total = s.total[0];
    if (task.lse.data) {
      const T sum = m == -T(kInfinity) ? m : m + log(total);
      write_row(&sum, 1, address(task.lse, lse, head, query), task.lse.dtype);
      if (m != -T(kInfinity)) poison = poison + Vec<T>(sum * T(0)); // x * 0 is 0 for finite x alone
    }
    const T scale = add_sink(head, m, total);
    for (int64_t e = 0; e < s.width; e += 16) {
      const Vec<T> sum = load(s.sum + e) * Vec<T>(scale);
      const Vec<T> y = m == -T(kInfinity) ? Vec<T>(T(0)) : sum / Vec<T>(total) + Vec<T>(T(0)); // -0 + 0 is 0
      y.store(buffer + e);
      poison = poison + y * Vec<T>(T(0));
    }
    write_row(buffer, task.E, address(task.out, out, head, query), task.out.dtype);
  }
};

inline int64_t block_count(const Attention& task, const Plan& plan) {
  return (task.L * (task.H / task.G) + plan.rows - 1) / plan.rows;
}
inline int64_t span_count(const Attention& task, const Plan& plan) {
  return max((task.S + plan.span * kChunk - 1) / (plan.span * kChunk), 1);
}
inline int64_t span_state_size(const Attention& task, const Plan& plan) {
  return round_up(2 * plan.rows, 16) + plan.rows * round_up(task.E, 16);
}

// The computation of one block of rows against its key/value head.
template <class T, Produce produce, class Operands = headway::Operands<T>> struct AttentionBlock {
  // Rows whose scores are computed together, panel of keys by panel: a panel is then read into the first-level cache
  // once for all of them, while their scores (48 KB) stay in the second.
  static constexpr int64_t kTile = Operands::kTile, kBandTiles = 4, kBandRows = kBandTiles * kTile;

  const Attention& task;
  const Plan& plan;           // rows: of a block, at most; span: chunks of a unit
  int64_t keys, width, slots; // E rounded up to 16; tree slots
  Operands operands;
  // scratch
  T *row_buffer, *scores, *later_sums;
  T *state_maximum, *state_total, *state_sum; // (slots, plan.rows [, width])
  // the block
  BlockRows rows;
  int64_t block, span, first_key, last_key; // the keys of the unit's span
  int64_t mask_offset, bias_offset;
  int64_t low[Operands::kRows], high[Operands::kRows]; // keys that a row may reach, relative to key 0 of the task
  ChunkStack stack;
  Stop* stop;

  AttentionBlock(const Attention& t, const Plan& p, Arena& arena) : task(t), plan(p), operands(t, p.rows, arena) {
    keys = task.S;
    width = round_up(task.E, 16);
    slots = stack_slots((task.key_offset + keys + kChunk - 1) / kChunk, produce == Produce::nodes);
    row_buffer = arena.take<T>(max(width, task.S * (produce == Produce::weights)));
    scores = arena.take<T>(kBandRows * kChunk);
    later_sums = arena.take<T>(kBandRows * width);
    state_maximum = arena.take<T>(slots * plan.rows);
    state_total = arena.take<T>(slots * plan.rows);
    state_sum = arena.take<T>(slots * plan.rows * width);
  }

  States<T> state(int64_t slot, int64_t row) const {
    const int64_t at = slot * plan.rows + row;
    return {state_maximum + at, state_total + at, state_sum + at * width, width};
  }

  void begin(int64_t unit) {
    const int64_t blocks = block_count(task, plan);
    span = unit % span_count(task, plan), block = unit / span_count(task, plan);
    first_key = span * plan.span * kChunk, last_key = min(keys, first_key + plan.span * kChunk);
    rows.repeat = task.H / task.G;
    // Some heads after others. Under a causal mask the last rows, which are the longest, come first, so that threads
    // end together.
    const int64_t first_head = block / (plan.heads * blocks) * plan.heads;
    const int64_t together = min(plan.heads, task.batch.size() * task.G - first_head);
    const int64_t place = block % (plan.heads * blocks), head = first_head + place % together;
    rows.first = (task.causal ? blocks - 1 - place / together : place / together) * plan.rows;
    rows.group = head % task.G;
    rows.item = head / task.G;
    rows.count = min(plan.rows, task.L * rows.repeat - rows.first);
    int64_t n = task.total;
    if (task.kv_lengths.data)
      n = *reinterpret_cast<const int64_t*>(static_cast<char*>(task.kv_lengths.data) +
                                            batch_offset(task.batch, task.kv_lengths, rows.item) * 8);
    const int64_t shift = task.bottom_right ? n - task.L : 0;
    const int64_t rows_offset = batch_offset(task.batch, task.rows, rows.item);
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t position = rows.query(r) + shift;
      int64_t from = task.window_left == kUnset ? 0 : position - task.window_left;
      int64_t to = task.causal ? min(n, position + 1) : n;
      if (task.window_right != kUnset) to = min(to, position + task.window_right + 1);
      low[r] = min(max(from - task.key_offset, first_key), last_key);
      high[r] = max(low[r], min(to - task.key_offset, last_key));
      if (task.rows.data && !*address(task.rows, rows_offset, rows.head(r), rows.query(r))) high[r] = low[r];
    }
    operands.begin(rows, rows.count <= kBandRows && produce != Produce::weights);
    mask_offset = batch_offset(task.batch, task.mask, rows.item);
    bias_offset = batch_offset(task.batch, task.bias, rows.item);
  }

  // Whether the caller computes a row again, in a wider range, if its result is infinite or NaN. The first attempt may
  // then give such a row up; the second attempt, which names its rows, may not.
  bool all_finite() const { return task.lost && !task.rows.data; }
  int64_t chunk() const { return operands.chunk.first; } // the first key of the current chunk

  RowRules<T> rules(int64_t r) const {
    RowRules<T> row{};
    row.low = min(max(low[r] - chunk(), 0), kChunk);
    row.high = min(max(high[r] - chunk(), 0), kChunk);
    row.mask_stride = task.mask.stride[2];
    row.bias_stride = task.bias.stride[2];
    if (task.mask.data)
      row.mask =
          reinterpret_cast<const uint8_t*>(address(task.mask, mask_offset, rows.head(r), rows.query(r), chunk()));
    if (task.bias.data)
      row.bias = reinterpret_cast<const T*>(address(task.bias, bias_offset, rows.head(r), rows.query(r), chunk()));
    return row;
  }

  // Up to kTile rows, and keys of the current chunk: those that at least one of the rows may attend to are in
  // from .. to, in the bands of kBandKeys whose bit is set; those that all of the rows may attend to, apart from the
  // mask, are all_from .. all_to.
  struct Tile {
    int64_t row, count, from, to, all_from, all_to;
    uint32_t bands;
    bool begun; // whether the current chain has keys already
    bool reaches(int64_t j) const { return bands >> j / kBandKeys & 1; }
  };
  Tile tile_at(int64_t row) const {
    Tile t{row, min(kTile, rows.count - row), kChunk, 0, 0, kChunk, ~0u, false};
    for (int64_t r = row; r < row + t.count; ++r) {
      const int64_t a = min(max(low[r] - chunk(), 0), kChunk), b = min(max(high[r] - chunk(), 0), kChunk);
      t.all_from = max(t.all_from, a), t.all_to = min(t.all_to, b);
      if (a < b) t.from = min(t.from, a), t.to = max(t.to, b);
    }
    if (task.mask.data) {
      for (int64_t j = t.from / kBandKeys * kBandKeys; j < t.to; j += kBandKeys)
        if (masked_out(t, max(j, t.from), min(j + kBandKeys, t.to))) t.bands &= ~(1u << j / kBandKeys);
      while (t.from < t.to && !t.reaches(t.from)) t.from = (t.from / kBandKeys + 1) * kBandKeys;
      while (t.from < t.to && !t.reaches(t.to - 1)) t.to = (t.to - 1) / kBandKeys * kBandKeys;
    }
    t.all_from = min(t.all_from, t.to), t.all_to = max(t.all_to, t.from);
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

  // Rows first .. first + kBandRows against the chunk: scores, their exponentials, the weighted sum; into `into`.
  void attend(int64_t first, const States<T>& into) {
    if (stop->after(kBandRows * kChunk)) return; // the work of masks and exponentials
    Band band;
    band.first = first;
    for (int64_t row = first; row < min(rows.count, first + kBandRows); row += kTile) {
      const Tile t = tile_at(row);
      for (int64_t r = row; r < row + t.count; ++r) into.maximum[r] = -T(kInfinity), into.total[r] = T(0);
      if (t.from >= t.to) continue;
      band.tiles[band.count++] = t;
      band.begin = min(band.begin, t.from / kBandKeys * kBandKeys), band.end = max(band.end, t.to);
    }
    score(band);
    const T scale = T(task.scale), softcap = T(task.softcap);
    for (int64_t i = 0; i < band.count; ++i) {
      Tile& t = band.tiles[i];
      T* s = scores + (t.row - first) * kChunk;
      const int64_t from = t.from / 16 * 16, to = round_up(t.to, 16);
      T *maximum = into.maximum + t.row, *total = into.total + t.row;
      // All maxima before all exponentials: a row's would wait for its own maximum.
      Vec<T> poison[kTile];
      for (int64_t r = 0; r < t.count; ++r)
        maximum[r] = score_row(s + r * kChunk, from, to, rules(t.row + r), scale, softcap, poison[r]);
      const bool scaled = plain(rules(t.row), scale, softcap); // the same for all rows
      for (int64_t r = 0; r < t.count; ++r)
        if (maximum[r] == -T(kInfinity))
          memset(s + r * kChunk + from, 0, size_t(to - from) * sizeof(T));
        else
          total[r] = exponentiate_and_sum(s + r * kChunk, from, to, scaled ? scale : T(1), maximum[r],
                                          all_finite() ? poison[r] : Vec<T>(T(0)));
      if (poisoned(t)) {
        select_values(t, s, into);
        t.bands = 0;
      } else {
        for (int64_t r = 0; r < t.count; ++r) operands.narrow(s + r * kChunk, t.from, t.to);
      }
    }
    if (width) sum_values(band, into);
  }

  // Panel by panel of keys, for all tiles.
  void score(const Band& band) {
    for (int64_t j = band.begin; j < band.end; j += kBandKeys)
      for (int64_t i = 0; i < band.count; ++i) {
        const Tile& t = band.tiles[i];
        const int64_t a = max(j, t.from / 16 * 16), b = min(j + kBandKeys, round_up(t.to, 16));
        if (a >= b || !t.reaches(j)) continue;
        if (stop->after(t.count * (b - a) * task.D)) return;
        operands.score(t.row, t.count, a, b, scores + (t.row - band.first) * kChunk + a);
      }
  }

  // A weighted sum is one chain for each kChain keys, and the chains' sum in order.
  void sum_values(Band& band, const States<T>& into) {
    for (int64_t link = band.begin / kChain * kChain; link < band.end; link += kChain) {
      for (int64_t i = 0; i < band.count; ++i) band.tiles[i].begun = false;
      // Read once, values go band by band, so that all tiles find them in the cache.
      const int64_t step = rows.count <= kBandRows ? kBandKeys : kChain;
      for (int64_t j = link; j < min(link + kChain, band.end); j += step)
        for (int64_t i = 0; i < band.count; ++i) {
          Tile& t = band.tiles[i];
          T* sum = t.from >= link ? into.sum + t.row * width : later_sums + (t.row - band.first) * width;
          const int64_t end = min(j + step, t.to);
          for (int64_t a = max(j, t.from), b; a < end; a = b) {
            const auto next = [&](int64_t key) { return min((key / kBandKeys + 1) * kBandKeys, end); };
            b = next(a);
            if (!t.reaches(a)) continue;
            while (b < end && t.reaches(b)) b = next(b);
            if (stop->after(t.count * (b - a) * width)) return;
            operands.weigh(t.count, scores + (t.row - band.first) * kChunk, a, b, sum, t.begun);
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
  // Whether V may hold NaN or infinity where some row of the tile must not see it: a mask may leave out any key, else
  // only those that not all rows reach.
  bool poisoned(const Tile& t) {
    if (task.mask.data || task.bias.data) return operands.poisoned(t.from, t.to, t.bands);
    return operands.poisoned(t.from, t.all_from, t.bands) || operands.poisoned(t.all_to, t.to, t.bands);
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
        for (int64_t j = max(link, t.from / 16 * 16); j < min(link + kChain, t.to); j += 16) {
          Int keep[16];
          allowed(row, j).store(keep);
          for (int64_t i = 0; i < 16; ++i) {
            if (!keep[i]) continue;
            if (stop->after(width)) return;
            const Vec<T> p = tile_scores[r * kChunk + j + i];
            operands.value(j + i, [&](auto* v) {
              for (int64_t e = 0; e < width; e += 16) fma(p, load(v + e), load(chain + e)).store(chain + e);
            });
          }
        }
        for (int64_t e = 0; e < width; e += 16) (load(sum + e) + load(chain + e)).store(sum + e);
      }
    }
  }

  // Enters each chunk of keys that some row of the block may reach, and calls visit.
  template <class Visit> void for_each_chunk(Visit visit) {
    int64_t from = keys, to = 0;
    for (int64_t r = 0; r < rows.count; ++r)
      if (low[r] < high[r]) from = min(from, low[r]), to = max(to, high[r]);
    if (produce == Produce::nodes) from = 0, to = keys; // a part hands on the same nodes for every row
    for (int64_t first = from / kChunk * kChunk; first < to && !stop->now; first += kChunk) {
      operands.enter({first, max(from, first) - first, min(to, first + kChunk) - first});
      visit();
    }
  }

  void run(int64_t unit, const Memory& memory) {
    stop = memory.stop;
    begin(unit);
    const int64_t first_chunk = task.key_offset / kChunk;
    stack.size = stack.frozen = 0;
    stack.before = produce == Produce::nodes ? first_chunk - 1 : -1;
    for_each_chunk([&] {
      const int slot = stack.push(first_chunk + chunk() / kChunk, joiner());
      for (int64_t band = 0; band < rows.count; band += kBandRows) attend(band, state(slot, 0));
    });
    if (stop->now) return;
    if (produce == Produce::nodes) {
      stack.settle(first_chunk + (keys + kChunk - 1) / kChunk, joiner());
      for (int64_t n = 0; n < task.nodes; ++n) write_node(n);
      return;
    }
    stack.finish(joiner());
    if (stack.size == 0)
      for (int64_t r = 0; r < rows.count; ++r) state_maximum[r] = -T(kInfinity), state_total[r] = T(0);
    if (span_count(task, plan) > 1 && !last_of_spans(memory.shared)) return;
    if (produce == Produce::weights) return write_weights();
    const Results<T> results(task, rows.item);
    Vec<T> poison = T(0);
    for (int64_t r = 0; r < rows.count; ++r)
      results.finish(rows.head(r), rows.query(r), state(0, r), row_buffer, poison);
    results.note_lost(any(poison != poison));
  }
  auto joiner() {
    return [this](int slot) { join(state(slot, 0), state(slot + 1, 0), rows.count); };
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
    memcpy(to.maximum, from.maximum, size_t(rows.count) * sizeof(T));
    memcpy(to.total, from.total, size_t(rows.count) * sizeof(T));
    memcpy(to.sum, from.sum, size_t(rows.count * width) * sizeof(T));
  }

  void write_node(int64_t node) {
    const States<T> s = state(node, 0);
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t row = ((node * task.batch.size() + rows.item) * task.H + rows.head(r)) * task.L + rows.query(r);
      const bool nothing = s.maximum[r] == -T(kInfinity);
      static_cast<T*>(task.maximum)[row] = s.maximum[r];
      static_cast<T*>(task.total_weight)[row] = canonical(s.total[r]);
      for (int64_t e = 0; e < task.E; ++e)
        static_cast<T*>(task.weighted_sum)[row * task.E + e] = nothing ? T(0) : canonical(s.sum[r * width + e]) + T(0);
    }
  }

  // The second walk over the keys, for attention_weights: exp(score - maximum) / total.
  void write_weights() {
    const Results<T> results(task, rows.item);
    for (int64_t r = 0; r < rows.count; ++r) {
      if (stop->after(keys)) return;
      memset(row_buffer, 0, size_t(keys) * sizeof(T));
      write_row(row_buffer, keys, address(task.out, results.out, rows.head(r), rows.query(r)), task.out.dtype);
      const States<T> s = state(0, r);
      results.add_sink(rows.head(r), s.maximum[0], s.total[0]);
      results.note_lost(s.maximum[0] != -T(kInfinity) && !(s.total[0] > 0 && s.total[0] < T(kInfinity)));
    }
    for_each_chunk([&] {
      for (int64_t r = 0; r < rows.count; ++r) {
        const RowRules<T> row = rules(r);
        const States<T> s = state(0, r);
        if (row.low >= row.high || s.maximum[0] == -T(kInfinity)) continue;
        const int64_t begin = row.low / 16 * 16, end = round_up(row.high, 16);
        for (int64_t j = begin, next; j < end; j = next) {
          if (stop->after(kBandKeys * task.D)) return;
          next = min((j / kBandKeys + 1) * kBandKeys, end);
          operands.score(r, 1, j, next, scores + j);
        }
        const T scale = T(task.scale), softcap = T(task.softcap);
        Vec<T> poison;
        score_row(scores, begin, end, row, scale, softcap, poison);
        exponentiate_and_sum(scores, begin, end, plain(row, scale, softcap) ? scale : T(1), s.maximum[0]);
        for (int64_t j = begin; j < end; j += 16) // a NaN total is no weight of a masked key
          select(allowed(row, j), load(scores + j) / Vec<T>(s.total[0]), Vec<T>(T(0))).store(scores + j);
        char* out = address(task.out, results.out, rows.head(r), rows.query(r), chunk() + row.low);
        write_row(scores + row.low, row.high - row.low, out, task.out.dtype);
      }
    });
  }
};

// Blocks of rows of equal size, so that the threads end soonest. A thread that is late by chance keeps the others
// waiting for a part of its last block.
template <class Block, class Operands>
void cut_rows(const Attention& task, int64_t rows, int64_t heads, int64_t row_bytes, int64_t threads, Plan& plan) {
  const int64_t band = Block::kBandRows;
  const int64_t largest =
      max(min(Operands::kRows, kRowsBytes / row_bytes / band * band), band); // fewer where very wide
  const int64_t least = max((rows + largest - 1) / largest, 1);
  const int64_t most = max(min((rows + 2 * band - 1) / (2 * band), least + kUnitsPerThread * threads), least);
  Soonest soonest;
  const auto cost = [](int64_t count) { return double(count + Operands::kPackRows); };
  for (int64_t blocks = least; blocks <= most; ++blocks) {
    const int64_t size = round_up(max((rows + blocks - 1) / blocks, 1), Block::kTile);
    double end = makespan(heads, rows, size, threads, cost) + kLate * cost(size);
    if (task.causal) { // units are half as long on average, and the longest come first
      end = makespan(heads, rows, size, 1, cost) / double(threads) / 2 + kLate * cost(size);
      if (end < cost(size)) end = cost(size);
    }
    if (soonest.than(end)) plan.rows = size;
  }
}
inline void cut_keys(int64_t blocks, int64_t chunks, int64_t threads, Plan& plan) {
  Soonest soonest;
  const auto cost = [](int64_t count) { return double(count) + kJoinChunks; };
  for (int64_t span = plan.span; span > 0; span /= 2)
    if (soonest.than(makespan(blocks, chunks, span, threads, cost) + kLate * cost(min(span, chunks)))) plan.span = span;
}

template <class T, Produce produce, class Operands = headway::Operands<T>>
Plan plan_attention_as(const Attention& task, int64_t threads) {
  const int64_t rows = task.L * (task.H / task.G), heads = task.batch.size() * task.G;
  const int64_t chunks = max((task.S + kChunk - 1) / kChunk, 1);
  Plan plan{};
  plan.work = saturating_product(task.batch.size(), task.H, task.L, task.S, task.D + task.E);
  threads = max(min(threads, plan.work / kWorkPerThread), 1);
  using Block = AttentionBlock<T, produce, Operands>;
  const int64_t slots = stack_slots((task.key_offset + task.S + kChunk - 1) / kChunk, produce == Produce::nodes);
  const int64_t row_bytes = (task.D + slots * round_up(task.E, 16)) * int64_t(sizeof(T));
  cut_rows<Block, Operands>(task, rows, heads, row_bytes, threads, plan);
  const int64_t enough = kUnitsPerThread * threads, blocks = heads * block_count(task, plan);
  // A few heads at a time use the caches best. Causal units differ: as many heads as the threads need to end together,
  // and no fewer at the end.
  const int64_t turns = task.causal ? max(blocks / enough, 1) : max(heads, 1);
  plan.heads = (heads + turns - 1) / turns;
  // The keys are cut where units are too few: into as many chunks as a node of the tree has, a power of two.
  for (plan.span = 1; plan.span < chunks;) plan.span *= 2;
  if (produce == Produce::output && blocks < enough) cut_keys(blocks, chunks, threads, plan);
  plan.units = heads * block_count(task, plan) * span_count(task, plan);
  Arena counting{nullptr};
  const Block block(task, plan, counting);
  plan.workspace = counting.used;
  if (span_count(task, plan) > 1)
    plan.shared = round_up(blocks * 8, 64) + plan.units * span_state_size(task, plan) * int64_t(sizeof(T));
  return plan;
}
template <Produce produce> Plan plan_attention(const Attention& task, int64_t threads) {
  return task.compute == DType::f64 ? plan_attention_as<double, produce>(task, threads)
                                    : plan_attention_as<float, produce>(task, threads);
}
template <Produce produce>
void run_attention(const Attention& task, const Plan& plan, int64_t unit, const Memory& memory) {
  Arena arena{static_cast<char*>(memory.own)};
  if (task.compute == DType::f64)
    AttentionBlock<double, produce>(task, plan, arena).run(unit, memory);
  else
    AttentionBlock<float, produce>(task, plan, arena).run(unit, memory);
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
  void run(int64_t unit, Stop* stop) {
    const int64_t item = unit / task.H, head = unit % task.H;
    const Results<T> results(task, item);
    Vec<T> poison = T(0); // unused: a number that left the range of the type did so in a part
    const auto joiner = [&](int i) {
      join_row(maximum[i], total[i], sums + i * width, maximum[i + 1], total[i + 1], sums + (i + 1) * width, width);
    };
    for (int64_t query = 0; query < task.L; ++query) {
      ChunkStack stack;
      maximum[0] = -T(kInfinity), total[0] = T(0);
      memset(sums, 0, size_t(width) * sizeof(T));
      for (int64_t n = 0; n < task.nodes; ++n) {
        if (stop->after(width)) return;
        const int64_t row = ((n * task.batch.size() + item) * task.H + head) * task.L + query;
        const int slot = stack.push(task.node_chunk[n], joiner);
        maximum[slot] = static_cast<T*>(task.maximum)[row];
        total[slot] = static_cast<T*>(task.total_weight)[row];
        T* sum = sums + slot * width;
        for (int64_t e = 0; e < width; ++e)
          sum[e] = e < task.E ? static_cast<T*>(task.weighted_sum)[row * task.E + e] : T(0);
      }
      stack.finish(joiner);
      results.finish(head, query, {maximum, total, sums, width}, buffer, poison);
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
  return {rows, counting.used, saturating_product(rows, task.L, task.E, task.nodes)};
}
inline void run_merge(const Attention& task, const Plan&, int64_t unit, const Memory& memory) {
  Arena arena{static_cast<char*>(memory.own)};
  if (task.compute == DType::f64)
    AttentionMerge<double>(task, arena).run(unit, memory.stop);
  else
    AttentionMerge<float>(task, arena).run(unit, memory.stop);
}

} // namespace
} // namespace headway
