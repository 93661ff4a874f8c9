// The sampling kernels, once per instruction set, in an object of their own: a test disassembles it and finds no fused
// multiply-add, which isa.cpp's objects are full of.
#include "sampling.h"

#define HEADWAY_JOIN_(a, b) a##b
#define HEADWAY_JOIN(a, b) HEADWAY_JOIN_(a, b)

namespace headway {

Plan HEADWAY_JOIN(plan_sampling_, HEADWAY_ISA)(const Sampling& task) { return plan_sampling(task); }
void HEADWAY_JOIN(run_sampling_, HEADWAY_ISA)(const Sampling& task, int64_t row, void* workspace) {
  run_sampling(task, row, workspace);
}

} // namespace headway
