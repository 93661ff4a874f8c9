// Calls of every kind from several threads at once while another one changes the number of threads. `make sanitize`
// builds it with ThreadSanitizer, which watches the pool; the sums are checked too.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "../../src/core/threads.h"

using namespace headway;

namespace {

std::atomic<int> wrong{0};

// Adds up 0 .. units - 1, each unit in a place of its own; a unit that has a team shares its addition.
struct Count {
  int64_t units;
  bool team;
  int64_t* found; // (units)
};

Plan plan_count(const Count& task, int64_t) {
  Plan plan{task.units, 256, kWorkPerThread * 8};
  plan.shared = 64;
  plan.team = task.team;
  return plan;
}

void run_count(const Count& task, const Plan& plan, int64_t unit, const Memory& memory) {
  // The whole of a thread's own memory is written without a lock: two threads that share it would be seen.
  auto* own = static_cast<int64_t*>(memory.own);
  for (int64_t i = 0; i < plan.workspace / 8; ++i) own[i] = unit;
  static_cast<std::atomic<int64_t>*>(memory.shared)->fetch_add(unit, std::memory_order_relaxed);
  if (!memory.team.run) {
    task.found[unit] = own[plan.workspace / 8 - 1];
    return;
  }
  constexpr int64_t kParts = 7;
  int64_t part[kParts] = {};
  int64_t* const parts = part;
  memory.team.run(
      memory.team.threads, kParts, [](const void* work, int64_t i) { (*static_cast<int64_t* const*>(work))[i] = i; },
      &parts);
  int64_t sum = 0;
  for (int64_t i = 0; i < kParts; ++i) sum += part[i];
  task.found[unit] = sum == kParts * (kParts - 1) / 2 ? unit : -1;
}

void call(int64_t units, bool team) {
  std::vector<int64_t> found(static_cast<size_t>(units), -1);
  const Kernel<Count> kernel{plan_count, run_count};
  execute(kernel, Count{units, team, found.data()});
  for (int64_t i = 0; i < units; ++i)
    if (found[size_t(i)] != i) ++wrong;
}

} // namespace

int main() {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  const auto running = [end] { return std::chrono::steady_clock::now() < end; };
  std::atomic<int64_t> calls{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      for (int64_t n = 0; running(); ++n, ++calls) call(n % 23 + (t == 0), n % 5 == t);
    });
  for (int n = 0; running(); ++n) {
    set_num_threads(n % 4 + 1);
    if (get_num_threads() < 1) ++wrong;
    std::this_thread::sleep_for(std::chrono::milliseconds(n % 3)); // sleepers and those that look on
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("%lld calls, %d wrong\n", static_cast<long long>(calls), int(wrong));
  return wrong != 0 || calls == 0;
}
