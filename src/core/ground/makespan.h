// How long threads take for units that they take one after another, so that a plan can choose among ways to cut a task.
#pragma once
#include "../kernels.h"

namespace headway {
namespace {

constexpr double kLate = 0.125; // of a unit: how much later than the others a thread ends by chance

// When the last thread ends, if each of some lines is cut into units of `size`; of what is left of a line, the units
// come last.
template <class Cost> double makespan(int64_t lines, int64_t length, int64_t size, int64_t threads, const Cost& cost) {
  const int64_t units = lines * (length / size), rest = length % size, rests = rest ? lines : 0;
  const int64_t idle = (threads - units % threads) % threads, late = rests > idle ? rests - idle : 0;
  return double((units + threads - 1) / threads) * cost(size) + double((late + threads - 1) / threads) * cost(rest);
}

// Of several ways to cut a task, one after another: whether the threads end sooner than with all before.
struct Soonest {
  double end = -1;
  bool than(double other) {
    if (end >= 0 && other >= end) return false;
    end = other;
    return true;
  }
};

} // namespace
} // namespace headway
