// The sampling kernels, once per instruction set, in an object of their own: a test disassembles it and finds no fused
// multiply-add, which isa.cpp's objects are full of.
#include "logprobs.h"
#include "penalties.h"
#include "sampling.h"
#include "speculative.h"

#define HEADWAY_JOIN_(a, b) a##b
#define HEADWAY_JOIN(a, b) HEADWAY_JOIN_(a, b)

namespace headway {

extern const SamplingKernels HEADWAY_JOIN(sampling_kernels_, HEADWAY_ISA);
const SamplingKernels HEADWAY_JOIN(sampling_kernels_, HEADWAY_ISA) = {
    {plan_sampling, run_sampling},
    {plan_penalties, run_penalties},
    {plan_ranking, run_ranking},
    {plan_verification, run_verification},
};

} // namespace headway
