#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headway {

#if defined(__x86_64__)
StandardFloats::StandardFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
StandardFloats::~StandardFloats() { _mm_setcsr(unsigned(saved_)); }
#elif defined(__aarch64__)
StandardFloats::StandardFloats() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
}
StandardFloats::~StandardFloats() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
StandardFloats::StandardFloats() : saved_(0) {}
StandardFloats::~StandardFloats() {}
#endif

namespace {

struct Free {
  void operator()(char* p) const { std::free(p); }
};
class Workspace {
public:
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64))));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_.get();
  }
  void release_above(int64_t bytes) {
    if (size_ > bytes) memory_.reset(), size_ = 0;
  }

private:
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

using Clock = std::chrono::steady_clock;

struct Job {
  const Call& call;
  Plan plan;
  int64_t participants;
  Memory memory; // own: of participant 0
  Interrupted interrupted = nullptr;
  std::atomic<int64_t> next{0};
  std::atomic<bool> stopped{false};
  Clock::time_point next_poll{};

  // Where all of it lies in one workspace: the shared part first, then a piece for each participant.
  int64_t shared_bytes() const { return (plan.shared + 63) / 64 * 64; }
  int64_t own_bytes() const { return (plan.workspace + 63) / 64 * 64 + 64; }
  int64_t bytes() const { return shared_bytes() + own_bytes() * participants; }
  void place(char* workspace) {
    memory = {workspace + shared_bytes(), workspace};
    if (plan.shared) std::memset(workspace, 0, size_t(plan.shared));
  }

  // Participant 0 is the thread that made the call.
  void run_units(int64_t participant) {
    const StandardFloats floats;
    Stop stop{};
    if (interrupted) stop = {participant ? has_stopped : poll, this};
    const Memory mine{static_cast<char*>(memory.own) + participant * own_bytes(), memory.shared, memory.team, &stop};
    const int64_t work = plan.work / plan.units;
    for (int64_t unit; !stop.now && (unit = next.fetch_add(1, std::memory_order_relaxed)) < plan.units;) {
      call.run(call.call, plan, unit, mine);
      stop.after(work);
    }
  }
  static bool has_stopped(void* job) { return static_cast<Job*>(job)->stopped.load(std::memory_order_relaxed); }
  static bool poll(void* context) {
    Job& job = *static_cast<Job*>(context);
    if (has_stopped(context)) return true;
    const Clock::time_point now = Clock::now();
    if (now < job.next_poll) return false;
    if (job.interrupted()) job.stopped = true;
    job.next_poll = Clock::now() + kPollInterval;
    return has_stopped(context);
  }
};

int default_threads() {
  if (const char* text = std::getenv("HEADWAY_NUM_THREADS"); text && *text) {
    char* end;
    const long n = std::strtol(text, &end, 10);
    if (*end || n < 1 || n > 1024)
      throw std::invalid_argument("HEADWAY_NUM_THREADS: expected an integer from 1 to 1024, got '" + std::string(text) +
                                  "'");
    return int(n);
  }
  // More threads than a quota pays for would be stopped together, and wait for each other.
  const double quota = cpu_quota();
  return quota > 0 ? std::max(std::min(processors(), int(std::ceil(quota))), 1) : processors();
}

constexpr int64_t kKeptWorkspace = 16 << 20; // bytes kept between calls, so that short calls do not fault pages in

// How long a waiting thread spins before it sleeps. Waking it costs 10 to 50 microseconds, more on a virtual
// machine, as much as a short call takes; a program that calls again within that time finds the workers awake.
constexpr std::chrono::microseconds kSpinTime{100};

template <class Condition> void spin_until(Condition met) {
  const auto end = Clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 32; ++i) {
      if (met()) return;
#if defined(__x86_64__)
      _mm_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  } while (Clock::now() < end);
}

class Pool {
public:
  explicit Pool(int threads) : threads_(threads) {}

  int threads() const { return threads_; }

  void resize(int threads) {
    if (in_call_) throw std::runtime_error("n: a signal's handler cannot change the number of threads during a call");
    const std::lock_guard<std::mutex> alone(busy_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_ = false;
    threads_ = threads;
  }

  bool run(const Call& call, Interrupted interrupted) {
    std::unique_lock<std::mutex> mine(busy_, std::defer_lock);
    if (!in_call_) mine.try_lock();
    int64_t threads = mine ? threads_.load() : 1;
    Job job{call, call.plan(call.call, threads), 1, {}, interrupted};
    if (job.plan.units == 0) return true;
    job.next_poll = Clock::now() + kPollInterval;
    threads = std::min(threads, 1 + job.plan.work / kWorkPerThread);
    const bool team = job.plan.team && threads > 1;
    if (!team) threads = std::min(threads, job.plan.units);
    job.participants = team ? 1 : threads;
    if (threads == 1 && mine) mine.unlock();
    const InCall in_call; // a call within this one, from a signal's handler, must use none of the memory below
    static thread_local Workspace kept;
    Workspace own;
    if (!mine) std::swap(own, kept);
    Workspace& workspace = mine ? workspace_ : own;
    job.place(workspace.reserve(job.bytes()));
    if (threads > 1) threads = std::min(threads, int64_t(1 + workers(int(threads - 1))));
    if (team && threads > 1) {
      job.memory.team = {[](void* pool, int64_t parts, Part part, const void* work) {
                           static_cast<Pool*>(pool)->run_parts(parts, part, work);
                         },
                         this};
      job.run_units(0);
    } else {
      job.participants = threads;
      run(job);
    }
    workspace.release_above(kKeptWorkspace);
    if (&workspace == &own) std::swap(own, kept);
    return !job.stopped;
  }

private:
  struct InCall { // whether this thread is in a call
    const bool before = std::exchange(in_call_, true);
    ~InCall() { in_call_ = before; }
  };
  static inline thread_local bool in_call_ = false;

  void run(Job& job) {
    if (job.participants > 1) share(&job);
    job.run_units(0);
    if (job.participants > 1) finish(job);
  }
  // On behalf of a unit that runs alone, while its caller holds busy_.
  using Part = void (*)(const void* work, int64_t i);
  void run_parts(int64_t parts, Part part, const void* work) {
    const std::pair<Part, const void*> both{part, work};
    const Call call{nullptr,
                    [](const void* c, const Plan&, int64_t i, const Memory&) {
                      const auto& [part, work] = *static_cast<const std::pair<Part, const void*>*>(c);
                      part(work, i);
                    },
                    &both};
    Job job{call, Plan{parts, 0, 0}, threads_, {}}; // it cannot be stopped: the unit needs the results of all parts
    run(job);
  }

  void share(Job* job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      ++generation_;
    }
    if (sleepers_) wake_.notify_all();
  }
  void finish(Job& job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr; // a worker that wakes only now finds nothing to do
    }
    spin_until([this] { return active_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    while (!done_.wait_for(lock, kPollInterval, [this] { return active_ == 0; })) {
      lock.unlock();
      if (job.interrupted) Job::poll(&job);
      lock.lock();
    }
  }

  // Starts workers up to this number, or as many as the system allows: no result depends on how many there are.
  int workers(int wanted) {
    try {
      while (int(workers_.size()) < wanted) start_worker();
    } catch (const std::system_error&) {
    }
    return int(workers_.size());
  }
  void start_worker() {
    const int participant = int(workers_.size()) + 1;
    workers_.emplace_back([this, participant, seen = generation_.load()]() mutable {
      for (;;) {
        const auto called = [&] { return stop_ || generation_ != seen; };
        spin_until(called);
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, called);
        --sleepers_;
        if (stop_) return;
        seen = generation_;
        if (!job_ || participant >= job_->participants) continue;
        Job& job = *job_;
        ++active_;
        lock.unlock();
        job.run_units(participant);
        lock.lock();
        if (--active_ == 0) done_.notify_one();
      }
    });
  }

  std::mutex busy_; // held by the caller whose work the workers share
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Workspace workspace_;
  Job* job_ = nullptr;
  // Written under mutex_, and looked at without it.
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0}, sleepers_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> threads_;
};

// Never destroyed: workers may still wait in it when the process ends. A forked child has none of the parent's threads,
// and its locks may be held by threads that are gone, so it abandons the old pool for a new one.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static const bool once = [] {
    the_pool = new Pool(default_threads());
    pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool(the_pool.load()->threads()); });
    return true;
  }();
  (void)once;
  return *the_pool;
}

} // namespace

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? int(n) : 1;
}

// The groups that hold this process, and those that hold these: the least of what they allow.
double cpu_quota([[maybe_unused]] const std::string& root) {
  double least = 0;
#if defined(__linux__)
  const auto allow = [&](double quota, double period) {
    if (quota > 0 && period > 0) least = least > 0 ? std::min(least, quota / period) : quota / period;
  };
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) { // number:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",cpu,") == std::string::npos) continue;
    const std::string base = root + "/sys/fs/cgroup" + (unified ? "" : "/cpu");
    for (std::string path = '/' + line.substr(second + 1);; path.resize(path.rfind('/'))) {
      while (!path.empty() && path.back() == '/') path.pop_back();
      double quota = 0, period = 0;
      if (unified) {
        std::ifstream(base + path + "/cpu.max") >> quota >> period; // "max" is no number
      } else {
        std::ifstream(base + path + "/cpu.cfs_quota_us") >> quota; // -1: none
        std::ifstream(base + path + "/cpu.cfs_period_us") >> period;
      }
      allow(quota, period);
      if (path.empty()) break;
    }
  }
#endif
  return least;
}

void set_num_threads(int n) { pool().resize(n); }
int get_num_threads() { return pool().threads(); }

bool execute(const Call& call, Interrupted interrupted) { return pool().run(call, interrupted); }

} // namespace headway
