// Which table of kernels this process uses: chosen once, at the first call.
#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace headway {

#if defined(__x86_64__)
extern const Kernels kernels_avx512, kernels_avx2;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif
extern const Kernels kernels_portable;

#if defined(HEADWAY_FAST)
extern const Kernel<Attention> attention_fast;
#endif

const KernelList& supported_kernels() {
  static const KernelList list = [] {
    KernelList found{};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); // F16C came before
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found.table[found.size++] = &kernels_avx512;
    if (avx2) found.table[found.size++] = &kernels_avx2;
#elif defined(__aarch64__)
    found.table[found.size++] = &kernels_neon;
#endif
    found.table[found.size++] = &kernels_portable;
    return found;
  }();
  return list;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const KernelList& list = supported_kernels();
    const char* wanted = std::getenv("HEADWAY_ISA");
    if (!wanted || !*wanted) return *list.table[0];
    std::string names;
    for (int i = 0; i < list.size; ++i) {
      if (std::string(list.table[i]->name) == wanted) return *list.table[i];
      names += std::string(i ? ", " : "") + list.table[i]->name;
    }
    throw std::invalid_argument("HEADWAY_ISA: expected one of " + names + " on this machine, got '" + wanted + "'");
  }();
  return chosen;
}

const Kernel<Attention>& fast_attention() {
#if defined(HEADWAY_FAST)
  if (&kernels() == &kernels_avx512 && __builtin_cpu_supports("avx512bf16")) return attention_fast;
#endif
  return kernels().attention;
}

} // namespace headway
