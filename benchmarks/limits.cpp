// What this machine can do at most: fused multiply-adds and reading memory. Compiled and called by limits.py.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kRegister = 64, kChains = 24;
#elif defined(__AVX__)
constexpr int kRegister = 32, kChains = 12; // 16 registers, and room for the factors
#else
constexpr int kRegister = 16, kChains = 24;
#endif
typedef float Floats __attribute__((vector_size(kRegister)));
typedef int64_t Words __attribute__((vector_size(kRegister)));

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs work(thread) on all threads at once, again and again, and returns the shortest time of them all.
template <class Work> double shortest(int threads, double seconds, Work work) {
  double best = 1e9;
  for (const double end = now() + seconds; now() < end;) {
    std::atomic<int> waiting{threads};
    std::vector<double> start(threads), stop(threads);
    auto part = [&](int thread) {
      for (--waiting; waiting > 0;) std::this_thread::yield();
      start[thread] = now();
      work(thread);
      stop[thread] = now();
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(part, thread);
    part(0);
    for (auto& other : others) other.join();
    const double first = *std::min_element(start.begin(), start.end());
    best = std::min(best, *std::max_element(stop.begin(), stop.end()) - first);
  }
  return best;
}

} // namespace

// float32 operations per second: chains of fused multiply-adds that never leave the registers.
extern "C" double fma_peak(int threads, double seconds) {
  constexpr int kSteps = 1 << 18;
  const double best = shortest(threads, seconds, [](int) {
    Floats chain[kChains] = {}, factor = Floats{} + 0.5f, term = Floats{} + 1.0f;
    asm volatile("" : "+m"(factor), "+m"(term));
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 32
      for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * factor + term;
    }
    for (auto& c : chain) asm volatile("" : : "m"(c));
  });
  return 2.0 * threads * kSteps * kChains * (kRegister / sizeof(float)) / best;
}

// Bytes per second: every thread reads memory of its own, far more than caches hold.
extern "C" double read_bandwidth(int threads, double seconds) {
  constexpr size_t kBytes = size_t(256) << 20, kStreams = 8;
  std::vector<void*> memory(threads);
  for (auto& block : memory) {
    block = std::aligned_alloc(size_t(2) << 20, kBytes);
    if (!block) return 0;
#if defined(__linux__)
    madvise(block, kBytes, MADV_HUGEPAGE); // as NumPy asks for its large arrays
#endif
    std::memset(block, 1, kBytes);
  }
  const double best = shortest(threads, seconds, [&](int thread) {
    const Words* p = static_cast<const Words*>(memory[thread]);
    const Words* const end = p + kBytes / sizeof(Words);
    Words sum[kStreams] = {};
    for (; p < end; p += kStreams) {
      for (size_t i = 0; i < kStreams; ++i) sum[i] += p[i];
    }
    for (auto& s : sum) asm volatile("" : : "m"(s));
  });
  for (void* block : memory) std::free(block);
  return double(threads) * kBytes / best;
}
