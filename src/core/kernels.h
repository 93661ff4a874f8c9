// The plain structs that cross from bindings.cpp to the kernels, and the table of kernels.
//
// Shape alphabet: B batch, H query heads, G key/value heads, L queries, S keys, D head size of q and k,
// E head size of v, M and N rows and columns of a matrix product, V vocabulary. Strides count elements.
#pragma once
#include <cstddef>
#include <cstdint>

namespace headway {

enum class DType : int32_t { f64, f32, f16, bf16, boolean };

constexpr int kMaxBatchAxes = 8;

// The contract of bits names these numbers: changing one changes results.
constexpr int64_t kLanes = 16;        // every sum over lanes runs over 16 of them, whatever a register holds
constexpr int64_t kChunk = 512;       // keys that share one maximum; anchored at absolute position 0
constexpr int64_t kChain = 256;       // longest chain of fused multiply-adds over keys, or over linear's inner axis
constexpr int64_t kUnset = INT64_MIN; // "no bound" for an integer option

struct Batch {
  int axes = 0;
  int64_t shape[kMaxBatchAxes] = {};
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < axes; ++i) n *= shape[i];
    return n;
  }
};

// A (batch..., x, y, z) array, or a broadcast of one: stride 0 where it is broadcast. data == nullptr: absent.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch[kMaxBatchAxes] = {};
  int64_t stride[3] = {};
};

struct Attention {
  Batch batch;
  int64_t H, G, L, S, D, E;
  View q, k, v;          // (H, L, D), (G, S, D), (G, S, E)
  bool k_in_panels;      // k is (G, panels, D, 16 keys), as KVCache keeps it
  View mask, bias;       // (H, L, S): boolean, and of the computing type
  View sinks;            // (H): of the computing type
  View kv_lengths;       // (): int64, one number per batch item; absolute
  DType compute;         // f64 or f32
  double scale, softcap; // softcap 0: none
  bool causal;
  bool bottom_right;    // query i stands at i + n - L instead of i, n the absolute number of keys
  int64_t total;        // that n, where kv_lengths is absent
  int64_t window_left;  // kUnset: unbounded
  int64_t window_right; // kUnset: unbounded
  int64_t key_offset;   // absolute position of key 0, a multiple of kChunk
  View out;             // (H, L, E) of any dtype; for weights (H, L, S)
  View lse;             // (H, L) of float64 or float32, or absent
  View rows;            // (H, L): boolean, the rows that are computed, others are 0; or absent: all are
  bool* lost;           // becomes true where some number of a result is infinite or NaN; or absent
  // Nodes of the chunk tree, (nodes, batch, H, L) and (nodes, batch, H, L, E), contiguous, of the computing type.
  void *maximum, *total_weight, *weighted_sum;
  const int64_t* node_chunk; // first chunk of each node
  int64_t nodes;
};

struct Linear {
  int64_t M, K, N;
  View x, w, b;     // stride[0], stride[1]: rows and columns; b: stride[0]
  bool w_in_panels; // w is (panels, K, 16 columns), as `pack` leaves it
  View y;
  DType compute;
};

// The columns of a matrix in panels of 16: (panels, K, 16 columns), 0 where there is no column.
struct Packing {
  int64_t K, N;
  View w;       // (K, N)
  void* panels; // of w's type
};

struct Rotary {
  Batch batch;
  int64_t L, D;
  View x, y;                 // (L, D): stride[0], stride[1]
  View positions;            // (L): int64
  const double* frequencies; // (D / 2)
  DType compute;
};

struct RowWise { // rms_norm: x, weight -> y; swiglu: gate x, up other -> y
  int64_t rows, columns;
  View x, other, y;
  double eps;
  DType compute;
};

// A setting that is the same for all rows (step 0), or one per row in C order (step 1).
template <class T> struct PerRow {
  const T* data = nullptr;
  int64_t step = 0;
  const T& operator[](int64_t row) const { return data[row * step]; }
};

// Python reads the names of an enumeration from the array beside it.
template <class Enumeration, size_t n> constexpr bool all_named(const char* const (&)[n]) {
  return n == size_t(Enumeration::count);
}

// The fault of a row of logits. A status is 0, or token * SamplingFault::count + fault: the token that has the fault,
// or for `few` the number of tokens that are left.
enum class SamplingFault : int64_t { none, nan, infinite, overflow, empty, few, undrawn, count };
constexpr const char* kFaultNames[] = {"none", "nan", "infinite", "overflow", "empty", "few", "undrawn"};
static_assert(all_named<SamplingFault>(kFaultNames));
constexpr int64_t fault_of(int64_t token, SamplingFault fault) {
  return token * int64_t(SamplingFault::count) + int64_t(fault);
}

// Which of the tokens that are equal to the last one a stage keeps. dialects.py says what ties, equal and floor settle.
enum class Ties : int32_t { lowest_id, highest_id, keep, count };
constexpr const char* kTiesNames[] = {"lowest_id", "highest_id", "keep"};
static_assert(all_named<Ties>(kTiesNames));

// One stage of sampling, with the values of its options for each row. sampling/stages.h says what the stages do.
constexpr int kStepValues = 3;
struct Step {
  int32_t stage; // its place in the table of stages: SamplingKernels::stage_name
  Ties ties;
  bool equal, floor;
  PerRow<double> value[kStepValues]; // temperature, range, exponent; or probability and threshold of xtc; or one
};

// The kinds of penalties, each with a window of its own. Presence shares the window of frequency.
enum PenaltyKind { kRepetition, kFrequency, kDry, kPenaltyKinds };

// The histories of rows: the tokens of each row, and the kernel's counts of them. A row has a slot. A slot has places
// in each of the long arrays, from the place `first` on: one for each token of its history.
struct Histories {
  const int64_t* slot = nullptr; // (rows): the slot of each row; absent: no row has a history
  const int64_t *first, *length; // (slots): the first place of a history, and its number of tokens
  const int64_t* prompt;         // (slots): the number of tokens, the first ones, that frequency does not count
  const int64_t* tokens;         // (places): ids from 0 to V - 1, the oldest first
  const uint8_t* breakers;       // (places): whether no repetition goes across this token
  // Counts, which the kernel keeps from call to call.
  int64_t* counted;  // (slots): the number of tokens that are counted; 0 has the kernel count anew
  int64_t* distinct; // (slots): the number of different tokens in the windows, whose ids come first in `id`
  int64_t* id;       // (places)
  int64_t* times;    // (places, kinds): the number of occurrences of this id in the window of each kind
  int64_t* same;     // (places): penalties.h, History::same
  double* logit;     // (places): the logit of this id after the penalties; a float32 number unless logits are float64
};

// The tokens of one row that are left before the first stage and after each stage, for `explain`.
struct Trace {
  int64_t* count = nullptr; // (steps + 1): the number of tokens; absent: no trace is asked for
  double* found;            // (steps + 1): Row::found after the stage
  // (steps + 1, V), of which the first `count` are filled in, in the order of ids. All three are absent, or none.
  int64_t* id;
  float* z; // logit + bias
  int64_t* mass;
};

struct Sampling {
  Batch batch; // a row each
  int64_t V;
  View logits;         // (V)
  View bias;           // (V): float32, or absent
  Histories histories; // their logits take the place of those of `logits` before all else
  View allowed;        // (V): boolean; packed: bytes, token 0 in the lowest bit of the first; or absent
  bool packed;
  const Step* steps; // in their order
  int64_t step_count;
  PerRow<int64_t> min_tokens; // how many tokens a stage with `floor` leaves at least
  const int64_t* spared;      // tokens, from 0 to V - 1, that xtc leaves in
  int64_t spared_count;
  PerRow<uint64_t> seed, stream, position;
  PerRow<double> uniform; // (rows, draws) instead of these three; all four are absent where no number is random
  int64_t draws;          // for each row
  bool replacement;
  // Each of these may be absent. (rows, draws), and (rows, V) contiguous: float64 for float64 logits, else float32;
  // filtered without a bias: as the logits.
  int64_t* tokens;
  void *probabilities, *filtered;
  int64_t* status; // (rows)
  Trace trace;     // instead of all other outputs
};

// The logits of the tokens of histories, after their penalties.
struct Penalties {
  Batch batch; // a row each
  int64_t V;
  View logits; // (V)
  PerRow<int64_t> window[kPenaltyKinds], dry_allowed_length;
  PerRow<double> repetition, frequency, presence, dry_multiplier, dry_base; // off: 1, 0, 0, 0
  Histories histories;                                                      // the kernel brings the counts up to date
};

// The ranks and log-probabilities of given tokens, and of the best tokens.
struct Ranking {
  Sampling rows;         // without outputs, but with status
  int64_t given;         // the number of given tokens of each row
  const int64_t* tokens; // (rows, given)
  int64_t top;           // the number of best tokens of each row
  bool processed;        // log-probabilities of what the stages left; else of the softmax of the logits
  int64_t* rank;         // (rows, given): the place in the order, from 1
  double* given_logprob; // (rows, given): -inf for a token that a stage removed
  // The best tokens, in the order of ids: the keys rise with logit + bias. Where fewer are left: -1, 0 and -inf.
  int64_t *top_id, *top_key; // (rows, top)
  double* top_logprob;       // (rows, top)
};

// Speculative decoding: n drafted tokens of each row, accepted or replaced.
struct Verification {
  Sampling target; // `places` rows for each row of this; without outputs, but with status
  Sampling draft;  // n rows for each row of this; logits are absent where the draft has no choice
  int64_t rows, n;
  int64_t places;         // n, or n + 1: the last place draws a token after n accepted ones
  const int64_t* tokens;  // (rows, n): the drafted ids
  const int64_t* lengths; // (rows): the number of drafted ids that count, from 0 to n; -1 passes over the row
  int64_t* accepted;      // (rows): the number of accepted ids
  int64_t* next;          // (rows): the token after them; -1 where no place was left to draw it at
};

// How a kernel cuts its task, and the memory that it needs. Units may run in any order on any thread. The cut may
// depend on the number of threads, for balance; results never do.
struct Plan {
  int64_t units;
  int64_t workspace;          // bytes per thread, 64-byte aligned
  int64_t work;               // of all units, in multiply-adds, roughly: whether waking a thread pays
  int64_t shared = 0;         // bytes that all units see, 64-byte aligned, zero at the start
  bool team = false;          // the units run one after another, each shared among the threads
  int64_t rows = 0, span = 0; // for the kernel alone: the size of a unit,
  int64_t heads = 0;          // and of how many heads the units come together
};
// Waking a thread takes some 10 microseconds, in which the caller alone does about as much work as this.
constexpr int64_t kWorkPerThread = 1 << 18;

// The threads that a unit may share its work with; without `run`, none. It calls part(work, i) for each i below parts,
// in any order on any of the threads, and returns when all are done.
struct Team {
  void (*run)(void* threads, int64_t parts, void (*part)(const void* work, int64_t i), const void* work) = nullptr;
  void* threads = nullptr;
};
// A unit that takes long polls it: whether the call is to end at once. The unit then returns, and its results so far
// are thrown away.
constexpr int64_t kWorkPerPoll = 1 << 20; // between two polls: some 50 microseconds
struct Stop {
  bool (*requested)(void* context) = nullptr; // absent: never
  void* context = nullptr;
  int64_t work = 0;
  bool now = false;
  bool after(int64_t more) { // multiply-adds, roughly
    if ((work += more) >= kWorkPerPoll && requested) work = 0, now = requested(context);
    return now;
  }
};
struct Memory {
  void *own, *shared;
  Team team{};
  Stop* stop = nullptr; // never absent where a unit runs
};

template <class Task> struct Kernel {
  Plan (*plan)(const Task&, int64_t threads);
  void (*run)(const Task&, const Plan&, int64_t unit, const Memory&);
};

// A table of their own, because no multiplication and addition may fuse in them: isa_sampling.cpp.
struct SamplingKernels {
  const char* (*stage_name)(int64_t stage); // the name at this place of the table of stages; nullptr where it ends
  Kernel<Sampling> sample;
  Kernel<Penalties> penalize;
  Kernel<Ranking> rank;
  Kernel<Verification> verify;
};

struct Kernels {
  const char* name;
  Kernel<Attention> attention, attention_weights, attention_nodes, attention_merge;
  Kernel<Linear> linear;
  Kernel<Packing> pack;
  Kernel<Rotary> rotary;
  void (*rotary_frequencies)(double base, int64_t half, double* out);
  Kernel<RowWise> rms_norm, swiglu;
  const SamplingKernels* sampling;
};

// dispatch.cpp: the tables that this machine can run, best first, and the one chosen at the first call: the best, or
// the one that HEADWAY_ISA names. Throws std::invalid_argument where it names none of them.
struct KernelList {
  const Kernels* table[4];
  int size;
};
const KernelList& supported_kernels();
const Kernels& kernels();
// For precision="fast", chosen at the first such call: with "amx" or "avx512bf16" products where the machine has them
// and the table above is its best, else "none", the table's own; or what HEADWAY_FAST names. Throws as kernels().
struct FastKernels {
  const char* name;
  Kernel<Attention> attention;
  Kernel<Linear> linear;
};
const FastKernels& fast_kernels();

} // namespace headway
