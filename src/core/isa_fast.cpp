// Attention with the processor's own 16-bit dot products: precision="fast". Apart, because it is not under the contract
// of bits, and needs an instruction that few processors have.
#include "attention.h"

namespace headway {

extern const Kernel<Attention> attention_fast;
const Kernel<Attention> attention_fast = {
    plan_attention_as<float, Produce::output, Products::pairs>,
    [](const Attention& task, const Plan& plan, int64_t unit, Memory memory) {
      Arena arena{static_cast<char*>(memory.own)};
      AttentionBlock<float, Produce::output, Products::pairs>(task, plan, arena).run(unit, memory.shared);
    },
};

} // namespace headway
