// A small pool of threads of our own.
//
// No OpenMP: its runtime clashes with other libraries' copies and dies after fork. This pool is remade in a forked
// child; where two Python threads call at once, the second does its work alone: threads never change a bit, so no call
// waits.
#pragma once
#include "kernels.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

namespace headway {

void set_num_threads(int n); // n >= 1; throws where a call of this very thread is under way
int get_num_threads();       // HEADWAY_NUM_THREADS, or as many as processors() and cpu_quota() allow
int processors();            // that this process may run on
// How many processors' time the control groups of this process allow; 0 where they set no limit. `root`: of the files.
double cpu_quota(const std::string& root = "");

// A kernel and its task, with their types forgotten.
struct Call {
  Plan (*plan)(const void* call, int64_t threads);
  void (*run)(const void* call, const Plan& plan, int64_t unit, const Memory& memory);
  const void* call;
};
// Plans the call and runs its units on up to get_num_threads() threads. The caller's floating-point modes are set aside
// while a unit runs. Every 50 milliseconds the calling thread calls `interrupted`, if it is given; where that returns
// true, the call ends unfinished and returns false. `interrupted` may itself make a call, which works alone. Throws
// std::bad_alloc where there is no memory for it.
using Interrupted = bool (*)();
constexpr std::chrono::milliseconds kPollInterval{50}; // between two polls of signals, which may wait for Python's lock
bool execute(const Call& call, Interrupted interrupted);

template <class Task> bool execute(const Kernel<Task>& kernel, const Task& task, Interrupted interrupted = nullptr) {
  struct Typed {
    const Kernel<Task>& kernel;
    const Task& task;
  } typed{kernel, task};
  const Call call{[](const void* c, int64_t threads) {
                    const Typed& call = *static_cast<const Typed*>(c);
                    return call.kernel.plan(call.task, threads);
                  },
                  [](const void* c, const Plan& plan, int64_t unit, const Memory& memory) {
                    const Typed& call = *static_cast<const Typed*>(c);
                    call.kernel.run(call.task, plan, unit, memory);
                  },
                  &typed};
  return execute(call, interrupted);
}
// The same for several tasks at once, of a kernel whose units see no memory of each other's.
template <class Task>
bool execute(const Kernel<Task>& kernel, const std::vector<Task>& tasks, Interrupted interrupted = nullptr) {
  struct Typed {
    const Kernel<Task>& kernel;
    const std::vector<Task>& tasks;
    std::vector<Plan>& plans;
  };
  std::vector<Plan> plans(tasks.size());
  const Typed typed{kernel, tasks, plans};
  const Call call{[](const void* c, int64_t threads) {
                    const Typed& call = *static_cast<const Typed*>(c);
                    Plan all{};
                    for (size_t i = 0; i < call.tasks.size(); ++i) {
                      const Plan& plan = call.plans[i] = call.kernel.plan(call.tasks[i], threads);
                      all.units += plan.units, all.work += plan.work;
                      all.workspace = std::max(all.workspace, plan.workspace);
                    }
                    return all;
                  },
                  [](const void* c, const Plan&, int64_t unit, const Memory& memory) {
                    const Typed& call = *static_cast<const Typed*>(c);
                    size_t i = 0;
                    for (; unit >= call.plans[i].units; ++i) unit -= call.plans[i].units;
                    call.kernel.run(call.tasks[i], call.plans[i], unit, memory);
                  },
                  &typed};
  return execute(call, interrupted);
}

// Sets rounding to nearest and gradual underflow for its lifetime, whatever the caller's thread had.
class StandardFloats {
public:
  StandardFloats();
  ~StandardFloats();
  StandardFloats(const StandardFloats&) = delete;

private:
  uint64_t saved_;
};

} // namespace headway
