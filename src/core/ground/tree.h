// The fixed binary tree over absolute chunk indices.
//
// Chunk i is a leaf; node (level, j) joins the leaves [j 2^level, (j + 1) 2^level). A leaf that is absent counts as
// nothing, so a sum over the tree does not depend on how many chunks follow or precede. Two neighbours x < y in a
// sequence of present nodes meet at level bit_width(x ^ y), whichever of their leaves are taken as x and y. Walking
// left to right with a stack, the two topmost nodes may be joined as soon as they meet below the level at which the
// upper one meets what comes next.
#pragma once
#include "rows.h"

namespace headway {
namespace {

inline int meeting_level(int64_t x, int64_t y) { return x == y ? 0 : 64 - __builtin_clzll(uint64_t(x ^ y)); }

constexpr int kMaxSlots = 112; // stack_slots for 2^54 chunks

// The stack keeps indices only; slot i of the caller's storage belongs to entry i. `before` is a chunk to the left
// that is computed elsewhere (or -1): nodes that must join it first are frozen and handed on as they are.
struct ChunkStack {
  int64_t chunk[kMaxSlots];
  int size = 0, frozen = 0;
  int64_t before = -1;

  // Makes room for `next`: joins all that meet earlier. Calls join(i), which must fold slot i + 1 into slot i.
  template <class Join> void settle(int64_t next, Join join) {
    while (size > frozen) {
      const int64_t top = chunk[size - 1];
      const int64_t below = size > 1 ? chunk[size - 2] : before;
      if (below < 0 || meeting_level(below, top) >= meeting_level(top, next)) return;
      if (size - 1 == frozen) { // `below` is elsewhere, or waits for what is
        frozen = size;
        return;
      }
      join(size - 2);
      --size;
    }
  }
  // Slot for chunk `next`, which must come after all before it.
  template <class Join> int push(int64_t next, Join join) {
    settle(next, join);
    chunk[size] = next;
    return size++;
  }
  // Nothing follows: joins everything into slot 0.
  template <class Join> void finish(Join join) {
    for (; size > 1; --size) join(size - 2);
  }
};

// How many slots a stack over the chunks 0 .. n - 1 can need: neighbours meet at strictly falling levels; a part of the
// chunks may hold as many frozen ones again.
inline int64_t stack_slots(int64_t n, bool part) { return (part ? 2 : 1) * meeting_level(0, max(n, 1)) + 2; }

} // namespace
} // namespace headway
