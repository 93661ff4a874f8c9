// The queries, keys and values of one block of attention, as the matrix products read them: where they lie if they can
// be read there, else packed.
#pragma once
#include "../ground/gemm.h"
#include "../ground/rows.h"

namespace headway {
namespace {

constexpr int64_t kBandKeys = 64; // four panels: 16 KB at D = 64. What a mask leaves out as a whole is passed over.

// The rows of a block: the queries of the heads of one group, so that all of them read the same keys.
struct BlockRows {
  int64_t item, group, repeat, first, count; // batch item; heads per group; the first row and how many
  int64_t query(int64_t r) const { return repeat == 1 ? first + r : (first + r) / repeat; } // a division is slow
  int64_t head(int64_t r) const { return repeat == 1 ? group : group * repeat + (first + r) % repeat; }
  // One row of an array (H, L, n), as T.
  template <class T> void read(const View& from, const Batch& batch, int64_t r, int64_t n, T* to) const {
    read_row(address(from, batch_offset(batch, from, item), head(r), query(r)), from.dtype, from.stride[2], n, to);
  }
};

// The current chunk of keys. A set of its bands, of kBandKeys keys each, has a bit for each band.
struct Chunk {
  int64_t first;    // its first key
  int64_t from, to; // the keys that some row may attend to, relative to `first`
  uint32_t packed = 0, scanned = 0,
           poisoned = 0; // the bands that are packed, scanned for NaN and infinity, and hold any

  // Adds the band of key j to a set; returns whether it was not there yet.
  static bool enters(uint32_t& set, int64_t j) {
    const uint32_t bit = 1u << j / kBandKeys, before = set;
    set |= bit;
    return !(before & bit);
  }
  // Whether scan(from, to) finds poison in one of these bands that lies in from .. to. All of a band is scanned, once,
  // so the answer does not depend on which rows ask first.
  template <class Scan> bool holds_poison(int64_t begin, int64_t end, uint32_t bands, Scan scan) {
    bool found = false;
    for (int64_t j = begin / kBandKeys * kBandKeys; j < end; j += kBandKeys) {
      if (!(bands >> j / kBandKeys & 1)) continue;
      if (enters(scanned, j) && scan(max(j, from), min(j + kBandKeys, to))) poisoned |= 1u << j / kBandKeys;
      found |= poisoned >> j / kBandKeys & 1;
    }
    return found;
  }
};

// Whether some number of a (rows, width) array is infinite or NaN.
template <class T, class B> bool non_finite(const B* v, int64_t row, int64_t rows, int64_t width) {
  Vec<T> poison = T(0); // x * 0 is 0 for finite x alone
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t e = 0; e < width; e += 16) poison = poison + load(v + j * row + e) * Vec<T>(T(0));
  return any(poison != poison);
}

// Numbers as they are, under the contract of bits. (PairOperands, in pairs.h, has the same members.)
template <class T> struct Operands {
  static constexpr int64_t kRows = 384;        // most rows that share one packing of K and V, which then costs 2 %
  static constexpr int64_t kPackRows = 8;      // as long as so many rows
  static constexpr int64_t kAlignedRows = 128; // rows that are worth a copy of values that lie badly
  static constexpr int64_t kTile = kTileRows;  // rows whose products are computed at once
  const Attention& task;
  int64_t width; // E rounded up to 16
  T *query_buffer, *panels, *values, *row_buffer;
  // the block
  const T* queries;
  int64_t query_row, group, k_offset, v_offset;
  bool aligns; // whether values that straddle the cache's lines are copied: each is read often enough to pay for it
  bool once; // the block reads each key and value once: it packs keys just before, and takes 16-bit numbers as they are
  Chunk chunk;
  Stored stored_keys, stored_values;

  Operands(const Attention& t, int64_t rows, Arena& arena) : task(t), width(round_up(t.E, 16)) {
    query_buffer = arena.take<T>(rows * task.D);
    panels = arena.take<T>(kChunk * task.D);
    values = arena.take<T>(kChunk * width);
    row_buffer = arena.take<T>(16 * task.D);
  }

  void begin(const BlockRows& rows, bool reads_once) {
    once = reads_once, aligns = rows.count >= kAlignedRows, group = rows.group;
    k_offset = batch_offset(task.batch, task.k, rows.item);
    v_offset = batch_offset(task.batch, task.v, rows.item);
    if (task.q.dtype == dtype_of<T> && task.q.stride[2] == 1 && (rows.repeat == 1 || task.L == 1)) {
      const int64_t offset = batch_offset(task.batch, task.q, rows.item);
      queries = reinterpret_cast<const T*>(address(task.q, offset, rows.head(0), rows.query(0)));
      query_row = task.q.stride[rows.repeat == 1];
      return;
    }
    for (int64_t r = 0; r < rows.count; ++r) rows.read(task.q, task.batch, r, task.D, query_buffer + r * task.D);
    queries = query_buffer;
    query_row = task.D;
  }

  void enter(const Chunk& next) {
    chunk = next;
    const View &k = task.k, &v = task.v;
    const auto readable = [&](DType dtype) { return dtype == dtype_of<T> || (once && Stored::kept<T>(dtype)); };
    if (task.k_in_panels && readable(k.dtype))
      stored_keys = {address(k, k_offset, group, chunk.first / 16), k.dtype, 16, k.stride[1]};
    else
      stored_keys = {panels, dtype_of<T>, 16, 16 * task.D};
    const bool in_place = readable(v.dtype) && v.stride[2] == 1 && task.E == width;
    if (in_place && (!aligns || starts_lines(v)))
      stored_values = {address(v, v_offset, group, chunk.first), v.dtype, v.stride[1], 16};
    else
      stored_values = {values, dtype_of<T>, width, 16};
  }

  // Scores of rows first .. first + count with keys a .. b, multiples of 16 within one band.
  void score(int64_t first, int64_t count, int64_t a, int64_t b, T* s) {
    pack(a);
    const Ahead next = stored_keys.data == panels ? Ahead{} : keys_after(a);
    times(count, b - a, task.D, queries + first * query_row, query_row, stored_keys, panel_of(a), s, kChunk, false,
          next);
  }
  // Weights from .. to of one row, as the products of weigh() want them; in place.
  void narrow(T*, int64_t, int64_t) const {}
  // Adds weights p[a .. b] times values to `sum`, or begins with it. The keys have been scored.
  void weigh(int64_t count, const T* p, int64_t a, int64_t b, T* sum, bool accumulate) {
    times(count, width, b - a, p + a, kChunk, stored_values, a * stored_values.row, sum, width, accumulate,
          values_after(a));
  }
  // Whether some value that weigh() reads for keys from .. to, in these bands, is NaN or infinite. They have been
  // scored.
  bool poisoned(int64_t from, int64_t to, uint32_t bands) {
    return chunk.holds_poison(from, to, bands, [&](int64_t begin, int64_t end) {
      return stored_values.at<T>(begin * stored_values.row,
                                 [&](auto* v) { return non_finite<T>(v, stored_values.row, end - begin, width); });
    });
  }
  // Calls visit with the values of one key, numbers that load() understands.
  template <class Visit> void value(int64_t j, Visit visit) { stored_values.at<T>(j * stored_values.row, visit); }

private:
  // Whether each row of v in this chunk starts a line of the cache, so that no vector lies in two.
  bool starts_lines(const View& v) const {
    const auto start = reinterpret_cast<uintptr_t>(address(v, v_offset, group, chunk.first));
    return start % 64 == 0 && v.stride[1] * item_size(v.dtype) % 64 == 0;
  }
  // Where the panel of key j lies. Keys that are read once go through a small buffer, which stays in the cache.
  int64_t panel_of(int64_t j) const {
    return (stored_keys.data == panels && once ? j % kBandKeys : j) / 16 * stored_keys.block;
  }
  // Packs the keys and values of band j / kBandKeys of the chunk, where they are not and need to be.
  void pack(int64_t j) {
    if (!Chunk::enters(chunk.packed, j)) return;
    const View &k = task.k, &v = task.v;
    j = j / kBandKeys * kBandKeys;
    const int64_t from = max(j, chunk.from), to = min(j + kBandKeys, chunk.to);
    Ahead next_keys = once ? keys_after(j) : Ahead{};
    for (int64_t i = from / 16 * 16; i < to && stored_keys.data == panels; i += 16) {
      T* panel = panels + panel_of(i);
      const int64_t key = chunk.first + i, count = min(16, task.S - key);
      if (task.k_in_panels) {
        read_row(address(k, k_offset, group, key / 16), k.dtype, 1, 16 * task.D, panel);
      } else if (k.stride[2] == 1 && Stored::kept<T>(k.dtype)) {
        Stored{address(k, k_offset, group, key), k.dtype, 0, 0}.at<T>(
            0, [&](auto* rows_of_k) { make_panel(rows_of_k, k.stride[1], count, task.D, panel, &next_keys); });
      } else {
        for (int64_t r = 0; r < count; ++r)
          read_row(address(k, k_offset, group, key + r), k.dtype, k.stride[2], task.D, row_buffer + r * task.D);
        make_panel(row_buffer, task.D, count, task.D, panel);
      }
    }
    for (int64_t i = from; i < to && stored_values.data == values; ++i) {
      T* row = values + i * width;
      read_row(address(v, v_offset, group, chunk.first + i), v.dtype, v.stride[2], task.E, row);
      for (int64_t e = task.E; e < width; ++e) row[e] = T(0);
    }
  }
  // What is read after the keys, or the values, of the band that holds key j: the next band; then the first values of
  // the chunk, then the first keys of the next chunk.
  Ahead keys_after(int64_t j) const {
    const int64_t next = (j / kBandKeys + 1) * kBandKeys;
    return next < chunk.to ? keys_at(next) : values_at(chunk.from / kBandKeys * kBandKeys);
  }
  Ahead values_after(int64_t j) const {
    const int64_t next = (j / kBandKeys + 1) * kBandKeys;
    return next < chunk.to ? values_at(next) : keys_at(kChunk);
  }
  Ahead keys_at(int64_t j) const {
    const View& k = task.k;
    const int64_t key = chunk.first + j, count = min(kBandKeys, task.S - key), item = item_size(k.dtype);
    if (task.k_in_panels)
      return {address(k, k_offset, group, key / 16), k.stride[1] * item, 16 * task.D * item, (count + 15) / 16};
    return {address(k, k_offset, group, key), k.stride[1] * item, k.stride[2] == 1 ? task.D * item : 0, count};
  }
  Ahead values_at(int64_t j) const {
    const View& v = task.v;
    const int64_t key = chunk.first + j, count = min(kBandKeys, task.S - key), item = item_size(v.dtype);
    return {address(v, v_offset, group, key), v.stride[1] * item, v.stride[2] == 1 ? task.E * item : 0, count};
  }
  void times(int64_t rows, int64_t columns, int64_t k_count, const T* a, int64_t a_row, const Stored& b, int64_t offset,
             T* c, int64_t c_row, bool accumulate, const Ahead& next) const {
    if (once)
      b.at<T>(offset, [&](auto* from) {
        multiply(rows, columns, k_count, a, a_row, from, b.row, b.block, c, c_row, accumulate, next);
      });
    else
      multiply(rows, columns, k_count, a, a_row, static_cast<const T*>(b.data) + offset, b.row, b.block, c, c_row,
               accumulate);
  }
};

} // namespace
} // namespace headway
