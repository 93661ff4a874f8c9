// Attention for precision="fast". Apart from the tables, because it is not under the contract of bits and needs
// instructions that few processors have. The build compiles this file once for each of them, with HEADWAY_FAST naming
// the set.
#include "attention/attention.h"
#include "attention/pairs.h"

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

} // namespace

extern const Kernel<Attention> HEADWAY_CONCAT(attention_, HEADWAY_FAST);
const Kernel<Attention> HEADWAY_CONCAT(attention_, HEADWAY_FAST) = {plan_fast, run_fast};

} // namespace headway
