// Products of bfloat16 pairs, for precision="fast": queries, keys, weights and values are rounded to bfloat16 and
// multiplied two at a time, sums are float32. The instructions (AVX512-BF16, and AMX, whose tiles hold 16 rows of 16
// pairs) round and flush in ways of their own, so none of this is under the contract of bits.
#pragma once
#include "operands.h"

#include <immintrin.h>

namespace headway {
namespace {

// Two bfloat16 numbers side by side, the earlier in the low half.
struct BFloat16Pair {
  uint32_t bits;
};
inline Vec<int32_t> load(const BFloat16Pair* p) { return Vec<int32_t>::load(reinterpret_cast<const int32_t*>(p)); }
inline Vec<int32_t> broadcast(BFloat16Pair x) { return int32_t(x.bits); }
// c + the dot products of pairs.
inline Vec<float> fma(Vec<int32_t> a, Vec<int32_t> b, Vec<float> c) {
  c.part[0] = (Vec<float>::Reg)_mm512_dpbf16_ps((__m512)c.part[0], (__m512bh)a.part[0], (__m512bh)b.part[0]);
  return c;
}
// Floats as bfloat16, to nearest even.
inline __m256i narrow(Vec<float> x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x.part[0]); }
// Of two rows of floats, the pairs that stand in one column.
inline void join_rows(const float* even, const float* odd, int64_t n, BFloat16Pair* to) {
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(load(even + i))),
                  high = _mm512_cvtepu16_epi32(narrow(load(odd + i)));
    _mm512_storeu_si512(to + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

#if defined(__AMX_BF16__)

constexpr int64_t kPairRows = 16, kPairStep = 16; // of a tile of A: rows, and pairs along k

// Eight tiles of 16 rows of 64 bytes. The thread's own configuration, if it has one, comes back in the end.
class Tiles {
public:
  Tiles() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Configuration all{};
    all.palette = 1;
    for (int i = 0; i < 8; ++i) all.bytes[i] = 64, all.rows[i] = 16;
    load(all);
  }
  ~Tiles() {
    if (before_.palette)
      load(before_);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;

private:
  struct Configuration {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  // Not _tile_loadconfig: GCC 12's says that it reads 8 bytes, and the rest may be dropped as never read.
  static void load(const Configuration& c) { asm volatile("ldtilecfg %0" : : "m"(c)); }
  Configuration before_;
};

// As multiply() in gemm.h: 16 rows at least are computed, k_count is a multiple of kPairStep. Four tiles of C wait for
// one of A, so that loading tiles takes less time than multiplying them.
[[gnu::noinline]] inline void multiply_pairs(int64_t rows, int64_t columns, int64_t k_count, const BFloat16Pair* a,
                                             int64_t a_row, const BFloat16Pair* b, int64_t b_row, int64_t b_block,
                                             float* c, int64_t c_row, bool accumulate) {
  asm volatile("" ::: "memory"); // GCC does not know that tile loads read memory
  const int64_t a_bytes = 4 * a_row, b_bytes = 4 * b_row, c_bytes = 4 * c_row;
  for (int64_t i = 0; i < rows; i += 16) {
    const BFloat16Pair* a_tile = a + i * a_row;
    int64_t j = 0;
    for (; j + 64 <= columns; j += 64) {
      float* to = c + i * c_row + j;
      if (accumulate) {
        _tile_loadd(0, to, c_bytes);
        _tile_loadd(1, to + 16, c_bytes);
        _tile_loadd(2, to + 32, c_bytes);
        _tile_loadd(3, to + 48, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < k_count; k += kPairStep) {
        const BFloat16Pair* from = b + j / 16 * b_block + k * b_row;
        _tile_loadd(4, a_tile + k, a_bytes);
        _tile_loadd(5, from, b_bytes);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, from + b_block, b_bytes);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, from + 2 * b_block, b_bytes);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, from + 3 * b_block, b_bytes);
        _tile_dpbf16ps(3, 4, 5);
      }
      _tile_stored(0, to, c_bytes);
      _tile_stored(1, to + 16, c_bytes);
      _tile_stored(2, to + 32, c_bytes);
      _tile_stored(3, to + 48, c_bytes);
    }
    for (; j < columns; j += 16) {
      float* to = c + i * c_row + j;
      if (accumulate)
        _tile_loadd(0, to, c_bytes);
      else
        _tile_zero(0);
      for (int64_t k = 0; k < k_count; k += kPairStep) {
        _tile_loadd(4, a_tile + k, a_bytes);
        _tile_loadd(5, b + j / 16 * b_block + k * b_row, b_bytes);
        _tile_dpbf16ps(0, 4, 5);
      }
      _tile_stored(0, to, c_bytes);
    }
  }
}

#else

constexpr int64_t kPairRows = kTileRows, kPairStep = 1;
struct Tiles {}; // nothing to configure

inline void multiply_pairs(int64_t rows, int64_t columns, int64_t k_count, const BFloat16Pair* a, int64_t a_row,
                           const BFloat16Pair* b, int64_t b_row, int64_t b_block, float* c, int64_t c_row,
                           bool accumulate) {
  multiply(rows, columns, k_count, a, a_row, b, b_row, b_block, c, c_row, accumulate);
}

#endif

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
      narrow_row(row_buffer, queries + r * steps);
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
  // D floats as pairs, and zeros.
  void narrow_row(float* row, BFloat16Pair* to) const {
    for (int64_t d = task.D; d < 2 * steps; ++d) row[d] = 0;
    write_row(row, 2 * steps, to, DType::bf16);
  }
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
    } else if (k.dtype == DType::bf16 && k.stride[2] == 1 && task.D == 2 * steps && k.stride[1] % 2 == 0) {
      const auto* rows = reinterpret_cast<const int32_t*>(address(k, k_offset, group, key));
      make_panel(rows, k.stride[1] / 2, count, steps, words);
    } else {
      auto* rows = reinterpret_cast<BFloat16Pair*>(row_buffer);
      float* row = row_buffer + 16 * steps; // behind 16 rows of pairs
      for (int64_t r = 0; r < count; ++r) {
        read_row(address(k, k_offset, group, key + r), k.dtype, k.stride[2], task.D, row);
        narrow_row(row, rows + r * steps);
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
