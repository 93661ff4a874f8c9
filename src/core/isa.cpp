// One table of kernels. The build compiles this file once per instruction set, with HEADWAY_ISA naming the set and its
// compiler flags; everything that the headers define is internal to the object, so no copy can leak into another.
#include "attention/attention.h"
#include "kernels.h"
#include "layers/layers.h"
#include "layers/linear.h"

#define HEADWAY_CONCAT_(a, b) a##b
#define HEADWAY_CONCAT(a, b) HEADWAY_CONCAT_(a, b)
#define HEADWAY_STRINGIFY_(a) #a
#define HEADWAY_STRINGIFY(a) HEADWAY_STRINGIFY_(a)

namespace headway {

extern const SamplingKernels HEADWAY_CONCAT(sampling_kernels_, HEADWAY_ISA); // isa_sampling.cpp

extern const Kernels HEADWAY_CONCAT(kernels_, HEADWAY_ISA);
const Kernels HEADWAY_CONCAT(kernels_, HEADWAY_ISA) = {
    HEADWAY_STRINGIFY(HEADWAY_ISA),
    {plan_attention<Produce::output>, run_attention<Produce::output>},
    {plan_attention<Produce::weights>, run_attention<Produce::weights>},
    {plan_attention<Produce::nodes>, run_attention<Produce::nodes>},
    {plan_merge, run_merge},
    {plan_linear, run_linear},
    {plan_pack, run_pack},
    {plan_rotary, run_rotary},
    rotary_frequencies,
    {plan_row_wise, run_rms_norm},
    {plan_row_wise, run_swiglu},
    &HEADWAY_CONCAT(sampling_kernels_, HEADWAY_ISA),
};

} // namespace headway
