// Counts units of work and their sizes, as the plans cut them for 2 to 64 threads, without doing any of the work.
// Prints a line for each task and number of threads:
//   name | threads | when the last thread ends | the mean of the threads | the smallest unit that a plan makes
// Threads take units one after another, as threads.cpp hands them out. A unit costs its multiply-adds and its packing,
// in some measure of the task's own.
#include "attention/attention.h"
#include "kernels.h"
#include "layers/linear.h"
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <queue>
#include <string>
#include <vector>

using namespace headway;

namespace {

void report(const std::string& name, int64_t threads, const Plan& plan, const std::vector<double>& costs,
            double least) {
  const int64_t used = std::min(threads, 1 + plan.work / kWorkPerThread);
  std::priority_queue<double, std::vector<double>, std::greater<>> ends(std::greater<>{}, std::vector<double>(used));
  double last = 0;
  for (const double cost : costs) {
    last = std::max(last, ends.top() + cost);
    ends.push(ends.top() + cost);
    ends.pop();
  }
  const double mean = std::accumulate(costs.begin(), costs.end(), 0.0) / double(used);
  std::printf("%s|%lld|%.0f|%.0f|%.0f\n", name.c_str(), static_cast<long long>(threads), last, mean, least);
}

void linear(int64_t M, int64_t K, int64_t N, bool transposed, int64_t threads) {
  Linear task{};
  task.M = M, task.K = K, task.N = N, task.compute = DType::f32;
  task.w.stride[0] = transposed ? 1 : N, task.w.stride[1] = transposed ? K : 1;
  const Plan plan = plan_linear(task, threads);
  const int64_t pack = M > kFewRows ? kManyCuts.pack_rows : 0;
  std::vector<double> costs;
  for (int64_t i = 0; i < plan.units; ++i) {
    const LinearUnit unit(task, plan, i);
    costs.push_back(double(unit.rows + pack) * double(unit.columns));
  }
  const double least =
      M > kFewRows ? double((M / std::max(M / kSplitRows, int64_t(1)) + pack) * kSplitColumns) : double(M * 16);
  report("linear " + std::to_string(M) + " x " + std::to_string(K) + " x " + std::to_string(N) +
             (transposed ? ", transposed" : ""),
         threads, plan, costs, least);
}

void attention(int64_t H, int64_t G, int64_t L, int64_t S, int64_t D, bool causal, int64_t threads) {
  Attention task{};
  task.H = H, task.G = G, task.L = L, task.S = task.total = S, task.D = task.E = D, task.compute = DType::f32;
  task.causal = task.bottom_right = causal, task.window_left = task.window_right = kUnset;
  // All heads and rows share these: only the sizes of units are asked for.
  std::vector<float> row(size_t(D + 16));
  for (View* view : {&task.q, &task.k, &task.v}) view->data = reinterpret_cast<char*>(row.data());
  const Plan plan = plan_attention<Produce::output>(task, threads);
  std::vector<char> memory(size_t(plan.workspace + 64));
  Arena arena{memory.data() + 64 - reinterpret_cast<uintptr_t>(memory.data()) % 64};
  AttentionBlock<float, Produce::output> block(task, plan, arena);
  const int64_t pack = L * (H / G) > block.kBandRows ? Operands<float>::kPackRows : 0;
  std::vector<double> costs;
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    block.begin(unit);
    double pairs = 0;
    int64_t furthest = block.first_key;
    for (int64_t r = 0; r < block.rows.count; ++r) {
      pairs += double(block.high[r] - block.low[r]);
      furthest = std::max(furthest, block.high[r]);
    }
    costs.push_back(pairs + double(pack) * double(furthest - block.first_key));
  }
  report("attention, " + std::to_string(H) + " over " + std::to_string(G) + " heads, L=" + std::to_string(L) +
             ", S=" + std::to_string(S) + ", D=" + std::to_string(D) + (causal ? ", causal" : ""),
         threads, plan, costs, double(std::min(2 * block.kBandRows, L * (H / G)) + pack) * double(std::min(kChunk, S)));
}

} // namespace

int main() {
  for (const int64_t threads : {2, 4, 8, 16, 64}) {
    for (const int64_t rows : {1, 2, 4, 8, 24, 32, 64, 100, 300, 512, 2048})
      for (const auto& [K, N] : {std::pair{576, 576},
                                 {576, 192},
                                 {576, 1536},
                                 {1536, 576},
                                 {576, 49152},
                                 {2048, 512},
                                 {2048, 2048},
                                 {2048, 8192},
                                 {8192, 2048},
                                 {4096, 12288},
                                 {4096, 14336},
                                 {1000, 777}})
        for (const bool transposed : {false, true}) linear(rows, K, N, transposed, threads);
    for (const auto& [H, G] : {std::pair{12, 12}, {9, 3}, {32, 8}, {14, 2}, {8, 1}, {2, 2}})
      for (const int64_t D : {64, 128}) {
        for (const int64_t L : {16, 128, 300, 512, 2048, 5000})
          for (const bool causal : {false, true}) attention(H, G, L, L, D, causal, threads);
        for (const int64_t S : {1024, 2048, 5000, 32768})
          for (const int64_t L : {1, 4}) attention(H, G, L, S, D, true, threads);
      }
  }
}
