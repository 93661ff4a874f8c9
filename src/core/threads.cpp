#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
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
  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64))));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_.get();
  }
  void keep_at_most(int64_t bytes) {
    if (size_ > bytes) memory_.reset(), size_ = 0;
  }

private:
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

struct Job {
  RunUnit run;
  const void* task;
  int64_t units, workspace_bytes, work;
  char* workspace;
  int participants;
  std::atomic<int64_t> next{0};

  void take_part(int participant) {
    const StandardFloats floats;
    char* mine = workspace + participant * workspace_bytes;
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) run(task, unit, mine);
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
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? int(n) : 1;
}

constexpr int64_t kKeptWorkspace = 16 << 20; // bytes kept between calls, so that short calls do not fault pages in

// Waking a thread takes some 10 microseconds, in which the caller alone does about as many multiply-adds as this.
constexpr int64_t kWorkPerThread = 1 << 18;

class Pool {
public:
  explicit Pool(int threads) : threads_(threads) {}

  int threads() const { return threads_; }

  void resize(int threads) {
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

  void run(Job& job) {
    std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
    const int64_t pays = 1 + job.work / kWorkPerThread;
    job.participants = int(std::min({int64_t(threads_), job.units, pays}));
    if (!mine || job.participants == 1) {
      if (mine) mine.unlock();
      static thread_local Workspace own;
      job.participants = 1;
      job.workspace = own.at_least(job.workspace_bytes);
      job.take_part(0);
      own.keep_at_most(kKeptWorkspace);
      return;
    }
    job.workspace = workspace_.at_least(job.workspace_bytes * job.participants);
    job.participants = std::min(job.participants, 1 + workers(job.participants - 1));
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      ++generation_;
    }
    wake_.notify_all();
    job.take_part(0);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      job_ = nullptr; // a worker that wakes only now finds nothing to do
      done_.wait(lock, [this] { return active_ == 0; });
    }
    workspace_.keep_at_most(kKeptWorkspace);
  }

private:
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
    uint64_t seen = generation_;
    workers_.emplace_back([this, participant, seen]() mutable {
      std::unique_lock<std::mutex> lock(mutex_);
      for (;;) {
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
        if (!job_ || participant >= job_->participants) continue;
        Job& job = *job_;
        ++active_;
        lock.unlock();
        job.take_part(participant);
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
  uint64_t generation_ = 0;
  int active_ = 0;
  bool stop_ = false;
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

void set_num_threads(int n) { pool().resize(n); }
int get_num_threads() { return pool().threads(); }

void run_units(const Plan& plan, RunUnit run, const void* task) {
  if (plan.units == 0) return;
  Job job;
  job.run = run;
  job.task = task;
  job.units = plan.units;
  job.work = plan.work;
  job.workspace_bytes = (plan.workspace + 63) / 64 * 64 + 64;
  pool().run(job);
}

} // namespace headway
