// A small pool of threads of our own.
//
// No OpenMP: its runtime clashes with other libraries' copies and dies after fork. This pool is remade in a forked
// child; where two Python threads call at once, the second does its work alone: threads never change a bit, so no call
// waits.
#pragma once
#include "kernels.h"

namespace headway {

void set_num_threads(int n); // n >= 1
int get_num_threads();       // HEADWAY_NUM_THREADS, or the processors that this process may use

using RunUnit = void (*)(const void* task, int64_t unit, void* workspace);
// Runs all units, on up to get_num_threads() threads. The caller's floating-point modes are set aside while a unit
// runs. Throws std::bad_alloc where there is no memory for the workspaces.
void run_units(const Plan& plan, RunUnit run, const void* task);

template <class Task> void execute(const Kernel<Task>& kernel, const Task& task) {
  struct Call {
    const Kernel<Task>& kernel;
    const Task& task;
  } call{kernel, task};
  run_units(
      kernel.plan(task),
      [](const void* c, int64_t unit, void* workspace) {
        const Call& call = *static_cast<const Call*>(c);
        call.kernel.run(call.task, unit, workspace);
      },
      &call);
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
