// Philox4x64-10, a counter-based generator (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"): the
// block of a position and a draw is a function of (seed, stream, position, draw) and of nothing drawn before it, so
// rows and threads need no order. For draw 0 the same numbers as numpy.random.Philox(key=[seed, stream],
// counter=position - 1): NumPy counts up first.
#pragma once
#include <cstdint>

namespace headway {
namespace {

using Wide = unsigned __int128;

inline uint64_t multiply_high(uint64_t a, uint64_t b) { return uint64_t((Wide(a) * b) >> 64); }

struct RandomBlock {
  uint64_t word[4];
};

inline RandomBlock philox(uint64_t seed, uint64_t stream, uint64_t position, uint64_t draw = 0) {
  constexpr uint64_t a = 0xD2E7470EE14C6C93, b = 0xCA5A826395121157;
  RandomBlock block{{position, draw, 0, 0}};
  uint64_t* x = block.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t high0 = multiply_high(a, x[0]), low0 = a * x[0];
    const uint64_t high1 = multiply_high(b, x[2]), low1 = b * x[2];
    x[0] = high1 ^ x[1] ^ seed;
    x[1] = low1;
    x[2] = high0 ^ x[3] ^ stream;
    x[3] = low0;
    seed += 0x9E3779B97F4A7C15; // the golden ratio and sqrt(3) - 1, Weyl sequences over the key
    stream += 0xBB67AE8584CAA73B;
  }
  return block;
}

} // namespace
} // namespace headway
