// Attention and linear for precision="fast". Apart from the tables, because it is not under the contract of bits and
// needs instructions that few processors have. The build compiles this file once for each of them, with HEADWAY_FAST
// naming the set.
#include "attention/attention.h"
#include "attention/pairs.h"
#include "layers/pairs.h"

#define HEADWAY_STRING_(a) #a
#define HEADWAY_STRING(a) HEADWAY_STRING_(a)
#define HEADWAY_CONCAT_(a, b) a##b
#define HEADWAY_CONCAT(a, b) HEADWAY_CONCAT_(a, b)

namespace headway {
namespace {

// Few rows wait for memory, not for products: they take 16-bit numbers as they are, without packing.
bool waits_for_memory(const Attention& task) { return task.L * (task.H / task.G) <= 2 * kPairRows; }

Plan plan_fast(const Attention& task, int64_t threads) {
  if (waits_for_memory(task)) return plan_attention_as<float, Produce::output>(task, threads);
  return plan_attention_as<float, Produce::output, PairOperands>(task, threads);
}
void run_fast(const Attention& task, const Plan& plan, int64_t unit, const Memory& memory) {
  Arena arena{static_cast<char*>(memory.own)};
  if (waits_for_memory(task)) return AttentionBlock<float, Produce::output>(task, plan, arena).run(unit, memory);
  const Tiles tiles;
  AttentionBlock<float, Produce::output, PairOperands>(task, plan, arena).run(unit, memory);
}

Plan plan_fast_linear(const Linear& task, int64_t threads) {
  if (task.M <= kFewRows) return plan_linear(task, threads);
  Plan plan{};
  plan.work = saturating_product(task.M, task.K, task.N);
  cut_many(task, min(threads, 1 + plan.work / kWorkPerThread), kPairCuts, plan);
  plan.units = linear_units(task, plan);
  Arena counting{nullptr}, counting_exact{nullptr};
  const PairLinear pairs(task, plan, counting);
  const LinearBlock<float> exact(task, plan, counting_exact);
  plan.workspace = max(counting.used, counting_exact.used);
  return plan;
}
void run_fast_linear(const Linear& task, const Plan& plan, int64_t unit, const Memory& memory) {
  if (task.M <= kFewRows) return run_linear(task, plan, unit, memory);
  const auto finite = [&] {
    const Tiles tiles;
    Arena arena{static_cast<char*>(memory.own)};
    return PairLinear(task, plan, arena).run(unit, memory.stop);
  };
  if (!finite()) run_linear(task, plan, unit, memory); // rounding to bfloat16 may have left its range
}

} // namespace

extern const FastKernels HEADWAY_CONCAT(fast_kernels_, HEADWAY_FAST);
const FastKernels HEADWAY_CONCAT(fast_kernels_, HEADWAY_FAST) = {
    HEADWAY_STRING(HEADWAY_FAST), {plan_fast, run_fast}, {plan_fast_linear, run_fast_linear}};

} // namespace headway
