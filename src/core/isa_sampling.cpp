// The sampling kernels, once per instruction set, in an object of their own: a test disassembles it and finds no fused
// multiply-add, which isa.cpp's objects are full of.
#include "sampling/logprobs.h"
#include "sampling/penalties.h"
#include "sampling/sampling.h"
#include "sampling/speculative.h"

#define HEADWAY_CONCAT_(a, b) a##b
#define HEADWAY_CONCAT(a, b) HEADWAY_CONCAT_(a, b)

namespace headway {

extern const SamplingKernels HEADWAY_CONCAT(sampling_kernels_, HEADWAY_ISA);
const SamplingKernels HEADWAY_CONCAT(sampling_kernels_, HEADWAY_ISA) = {
    stage_name,
    {plan_sampling, run_sampling},
    {plan_penalties, run_penalties},
    {plan_ranking, run_ranking},
    {plan_verification, run_verification},
};

} // namespace headway
