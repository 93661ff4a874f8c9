// The operands of attention for precision="fast".
#pragma once
#include "../ground/pairs.h"
#include "operands.h"

namespace headway {
namespace {

// As Operands, but for numbers in pairs: of features in queries and in panels of keys, (D / 2, 16 keys); of keys in
// weights and in rows of values, (keys / 2, E). Steps of kPairStep pairs are filled up with zeros.
struct PairOperands {
  static constexpr int64_t kRows = 1024; // products are so fast that packing counts for more
  static constexpr int64_t kPackRows = 20;
  static constexpr int64_t kTile = kPairRows;
  static constexpr int64_t kKeyStep = 2 * kPairStep;
  const Attention& task;
  int64_t width, steps; // E rounded up to 16; pairs of features
  BFloat16Pair *queries, *panels, *values;
  float* row_buffer;
  int64_t group, k_offset, v_offset;
  Chunk chunk;

  PairOperands(const Attention& t, int64_t rows, Arena& arena) : task(t), width(round_up(t.E, 16)) {
    steps = round_up((task.D + 1) / 2, kPairStep);
    queries = arena.take<BFloat16Pair>(rows * steps);
    panels = arena.take<BFloat16Pair>(kChunk * steps);
    values = arena.take<BFloat16Pair>(kChunk / 2 * width);
    row_buffer = arena.take<float>(max(32 * steps, 2 * width));
  }

  void begin(const BlockRows& rows, bool) {
    group = rows.group;
    k_offset = batch_offset(task.batch, task.k, rows.item);
    v_offset = batch_offset(task.batch, task.v, rows.item);
    for (int64_t r = 0; r < rows.count; ++r) {
      rows.read(task.q, task.batch, r, task.D, row_buffer);
      narrow_row(row_buffer, task.D, steps, queries + r * steps);
    }
  }
  void enter(const Chunk& next) { chunk = next; }
  void score(int64_t first, int64_t count, int64_t a, int64_t b, float* s) {
    pack(a);
    multiply_pairs(count, b - a, steps, queries + first * steps, steps, panels + a * steps, 16, 16 * steps, s, kChunk,
                   false);
  }
  void narrow(float* weights, int64_t from, int64_t to) const { // what is written is half as long as what was read
    auto* to_write = reinterpret_cast<uint16_t*>(weights);
    const int64_t begin = from / kKeyStep * kKeyStep, end = round_up(to, kKeyStep);
    for (int64_t j = from / 16 * 16; j < to; j += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_write + j), headway::narrow(load(weights + j)));
    for (int64_t j = begin; j < from / 16 * 16; ++j) to_write[j] = 0;
    for (int64_t j = round_up(to, 16); j < end; ++j) to_write[j] = 0;
  }
  void weigh(int64_t count, const float* p, int64_t a, int64_t b, float* sum, bool accumulate) {
    a = a / kKeyStep * kKeyStep, b = round_up(b, kKeyStep);
    multiply_pairs(count, width, (b - a) / 2, reinterpret_cast<const BFloat16Pair*>(p) + a / 2, kChunk,
                   values + a / 2 * width, width, 16, sum, width, accumulate);
  }
  // Also where a step of pairs holds keys that no row reaches. What counts is what is multiplied: a large finite number
  // may have become infinite.
  bool poisoned(int64_t from, int64_t to, uint32_t bands) {
    return chunk.holds_poison(from / kKeyStep * kKeyStep, round_up(to, kKeyStep), bands,
                              [&](int64_t begin, int64_t end) {
                                const Vec<int32_t> low = 0x7f80, high = 0x7f800000; // the exponents of NaN and infinity
                                Mask<float> found = int32_t(0);
                                for (int64_t i = begin / 2 * width; i < (end + 1) / 2 * width; i += 16) {
                                  const Vec<int32_t> pairs = load(values + i);
                                  found = found | ((pairs & low) == low) | ((pairs & high) == high);
                                }
                                return any(found);
                              });
  }
  template <class Visit> void value(int64_t j, Visit visit) { visit(read_value(j, row_buffer)); }

private:
  // The values of one key as the caller gave them; zeros where the chunk has no such key.
  const float* read_value(int64_t j, float* to) const {
    const int64_t count = chunk.from <= j && j < chunk.to ? task.E : 0;
    if (count) read_row(address(task.v, v_offset, group, chunk.first + j), task.v.dtype, task.v.stride[2], count, to);
    for (int64_t e = count; e < width; ++e) to[e] = 0;
    return to;
  }
  // Packs the keys and values of band j / kBandKeys of the chunk, where they are not.
  void pack(int64_t j) {
    if (!Chunk::enters(chunk.packed, j)) return;
    j = j / kBandKeys * kBandKeys;
    const int64_t from = max(j, chunk.from), to = min(j + kBandKeys, chunk.to);
    for (int64_t i = from / 16 * 16; i < to; i += 16) pack_keys(i);
    for (int64_t i = from / kKeyStep * kKeyStep; i < round_up(to, kKeyStep); i += 2) pack_values(i);
  }
  void pack_keys(int64_t i) {
    const View& k = task.k;
    BFloat16Pair* panel = panels + i * steps;
    auto* words = reinterpret_cast<int32_t*>(panel);
    const int64_t key = chunk.first + i, count = min(16, task.S - key);
    if (task.k_in_panels) {
      read_row(address(k, k_offset, group, key / 16), k.dtype, 1, 16 * task.D, row_buffer);
      memset(row_buffer + 16 * task.D, 0, size_t(32 * steps - 16 * task.D) * sizeof(float));
      for (int64_t d = 0; d < steps; ++d) join_rows(row_buffer + 32 * d, row_buffer + 32 * d + 16, 16, panel + 16 * d);
    } else if (const auto* in_place =
                   as_pairs(address(k, k_offset, group, key), k.dtype, k.stride[2], k.stride[1], task.D, steps)) {
      make_panel(reinterpret_cast<const int32_t*>(in_place), k.stride[1] / 2, count, steps, words);
    } else {
      auto* rows = reinterpret_cast<BFloat16Pair*>(row_buffer);
      float* row = row_buffer + 16 * steps; // behind 16 rows of pairs
      for (int64_t r = 0; r < count; ++r) {
        read_row(address(k, k_offset, group, key + r), k.dtype, k.stride[2], task.D, row);
        narrow_row(row, task.D, steps, rows + r * steps);
      }
      make_panel(reinterpret_cast<int32_t*>(rows), steps, count, steps, words);
    }
  }
  void pack_values(int64_t i) {
    const View& v = task.v;
    BFloat16Pair* pairs = values + i / 2 * width;
    if (v.dtype == DType::bf16 && v.stride[2] == 1 && task.E == width && chunk.from <= i && i + 1 < chunk.to) {
      const auto* even = reinterpret_cast<const uint16_t*>(address(v, v_offset, group, chunk.first + i));
      const uint16_t* odd = even + v.stride[1];
      for (int64_t e = 0; e < width; e += 16)
        (load_integers<int32_t>(even + e) | load_integers<int32_t>(odd + e) << 16)
            .store(reinterpret_cast<int32_t*>(pairs) + e);
      return;
    }
    const float* even = read_value(i, row_buffer);
    join_rows(even, read_value(i + 1, row_buffer + width), width, pairs);
  }
};

} // namespace
} // namespace headway
