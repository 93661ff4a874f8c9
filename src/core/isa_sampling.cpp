// The sampling kernels, once per instruction set, in an object of their own: a test disassembles it and finds no fused
// multiply-add, which isa.cpp's objects are full of.
#include "sampling.h"

#define HEADWAY_JOIN_(a, b) a##b
#define HEADWAY_JOIN(a, b) HEADWAY_JOIN_(a, b)

namespace headway {

Plan HEADWAY_JOIN(plan_sampling_, HEADWAY_ISA)(const Sampling& task, int64_t threads) {
  return plan_sampling(task, threads);
}
void HEADWAY_JOIN(run_sampling_, HEADWAY_ISA)(const Sampling& task, const Plan& plan, int64_t row, Memory memory) {
  run_sampling(task, plan, row, memory);
}

} // namespace headway
