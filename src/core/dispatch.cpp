// Which table of kernels this process uses: chosen once, at the first call.
#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(HEADWAY_HAS_fast)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace headway {

extern const Kernels kernels_avx512, kernels_avx2, kernels_neon, kernels_portable;

#if defined(HEADWAY_HAS_fast)
extern const FastKernels fast_kernels_avx512bf16, fast_kernels_amx;

namespace {
// Linux gives a process the registers of AMX when it asks for them.
bool may_use_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!(d & bf16) || !(d & tile)) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
} // namespace
#endif

const KernelList& supported_kernels() {
  static const KernelList list = [] {
    KernelList found{};
#if defined(__x86_64__)
    __builtin_cpu_init();
    // F16C came before.
    [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(HEADWAY_HAS_avx512)
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found.table[found.size++] = &kernels_avx512;
#endif
#if defined(HEADWAY_HAS_avx2)
    if (avx2) found.table[found.size++] = &kernels_avx2;
#endif
#if defined(HEADWAY_HAS_neon)
    found.table[found.size++] = &kernels_neon;
#endif
#if defined(HEADWAY_HAS_portable)
    found.table[found.size++] = &kernels_portable;
#endif
    if (!found.size) throw std::runtime_error("headway was built without a table of kernels for this machine");
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

const FastKernels& fast_kernels() {
  static const FastKernels chosen = [] {
    const char* wanted = std::getenv("HEADWAY_FAST");
    const std::string name = wanted ? wanted : "";
    FastKernels found[3];
    int size = 0;
#if defined(HEADWAY_HAS_fast)
    if (std::string(kernels().name) == "avx512" && __builtin_cpu_supports("avx512bf16")) {
      if (name != "avx512bf16" && name != "none" && may_use_amx()) found[size++] = fast_kernels_amx;
      found[size++] = fast_kernels_avx512bf16;
    }
#endif
    found[size++] = {"none", kernels().attention, kernels().linear};
    if (name.empty()) return found[0];
    std::string names;
    for (int i = 0; i < size; ++i) {
      if (name == found[i].name) return found[i];
      names += std::string(i ? ", " : "") + found[i].name;
    }
    throw std::invalid_argument("HEADWAY_FAST: expected one of " + names + " on this machine, got '" + name + "'");
  }();
  return chosen;
}

} // namespace headway
