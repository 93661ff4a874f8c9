// Prints a digest of what every kernel makes of the same numbers, one line for each table this machine can run. `make
// cross` builds it for x86-64 and, under emulation, for 64-bit Arm: all lines must agree. No Python: there may be none
// for the other machine.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../src/core/threads.h"

using namespace headway;

namespace {

struct Numbers { // the same on every machine: 24-bit integers, scaled exactly
  uint64_t state = 1;
  double next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(int64_t(state >> 40)) * 0x1p-22 - 2.0;
  }
};

struct Digest { // FNV-1a
  uint64_t hash = 14695981039346656037u;
  template <class T> void add(const std::vector<T>& values) {
    const auto* p = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ p[i]) * 1099511628211u;
  }
};

template <class T> std::vector<T> numbers(int64_t n, uint64_t seed, double scale = 1.0) {
  Numbers source{seed};
  std::vector<T> v(static_cast<size_t>(n));
  for (T& x : v) x = T(source.next() * scale);
  return v;
}
template <> std::vector<uint16_t> numbers(int64_t n, uint64_t seed, double) { // every finite 16-bit pattern
  Numbers source{seed};
  std::vector<uint16_t> v(static_cast<size_t>(n));
  for (uint16_t& x : v) x = uint16_t(uint64_t((source.next() + 2.0) * 0x1p22) & 0xbbff);
  return v;
}

View view(void* data, DType dtype, int64_t x, int64_t y, int64_t z = 1) {
  View v;
  v.data = data;
  v.dtype = dtype;
  v.stride[0] = x, v.stride[1] = y, v.stride[2] = z;
  return v;
}

template <class T> void attention(Digest& digest, const Kernels& table, DType in, DType compute) {
  const int64_t H = 4, G = 2, L = 37, S = 1300, D = 23, E = 19;
  auto q = numbers<T>(H * L * D, 1), k = numbers<T>(G * S * D, 2), v = numbers<T>(G * S * E, 3);
  std::vector<T> out(static_cast<size_t>(H * L * E)), weights(static_cast<size_t>(H * L * S));
  std::vector<double> lse(static_cast<size_t>(H * L));
  Attention t{};
  t.H = H, t.G = G, t.L = L, t.S = S, t.D = D, t.E = E;
  t.q = view(q.data(), in, L * D, D), t.k = view(k.data(), in, S * D, D), t.v = view(v.data(), in, S * E, E);
  t.compute = compute;
  t.scale = 0.3, t.softcap = 4.0;
  t.causal = t.bottom_right = true;
  t.total = S;
  t.window_left = 900, t.window_right = kUnset;
  t.out = view(out.data(), in, L * E, E);
  t.lse = view(lse.data(), compute, L, 1);
  execute(table.attention, t);
  digest.add(out), digest.add(lse);
  t.out = view(weights.data(), in, L * S, S);
  execute(table.attention_weights, t);
  digest.add(weights);
}

template <class T> void layers(Digest& digest, const Kernels& table, DType in, DType compute) {
  const int64_t M = 13, K = 700, N = 45;
  auto x = numbers<T>(M * K, 4), w = numbers<T>(K * N, 5), b = numbers<T>(N, 6);
  std::vector<T> y(static_cast<size_t>(M * N)), normal(static_cast<size_t>(M * K));
  Linear t{};
  t.M = M, t.K = K, t.N = N;
  t.x = view(x.data(), in, K, 1), t.w = view(w.data(), in, N, 1), t.b = view(b.data(), in, 1, 1);
  t.y = view(y.data(), in, N, 1);
  t.compute = compute;
  execute(table.linear, t);
  digest.add(y);
  if (compute == DType::f32) {
    std::vector<T> panels(static_cast<size_t>((N + 15) / 16 * 16 * K)), same(y.size());
    execute(table.pack, Packing{K, N, t.w, panels.data()});
    t.w = view(panels.data(), in, 16 * K, 16), t.w_in_panels = true;
    t.y = view(same.data(), in, N, 1);
    for (t.M = 1; t.M <= M; t.M += 4) execute(table.linear, t);
    digest.add(same), digest.add(panels);
  }

  RowWise r{};
  r.rows = M, r.columns = K, r.eps = 1e-6, r.compute = compute;
  r.x = view(x.data(), in, K, 1), r.other = view(x.data(), in, 0, 1), r.y = view(normal.data(), in, K, 1);
  execute(table.rms_norm, r);
  digest.add(normal);
  r.other = view(x.data(), in, K, 1);
  execute(table.swiglu, r);
  digest.add(normal);

  std::vector<int64_t> positions;
  for (int64_t i = 0; i < M; ++i) positions.push_back(i * i * 4321);
  std::vector<double> frequencies(static_cast<size_t>(K / 2));
  table.rotary_frequencies(500000.0, K / 2, frequencies.data());
  digest.add(frequencies);
  Rotary o{};
  o.L = M, o.D = K, o.compute = compute;
  o.x = view(x.data(), in, K, 1), o.y = view(normal.data(), in, K, 1);
  o.positions = view(positions.data(), DType::f64, 1, 1);
  o.frequencies = frequencies.data();
  execute(table.rotary, o);
  digest.add(normal);
}

void sampling(Digest& digest, const Kernels& table) {
  const int64_t V = 5000, rows = 24;
  auto logits = numbers<float>(V * rows, 7, 4.0);
  std::vector<int64_t> tokens(static_cast<size_t>(rows)), status(static_cast<size_t>(rows));
  std::vector<float> probabilities(static_cast<size_t>(rows * V));
  std::vector<double> temperature, range, top_k, p, small;
  std::vector<int64_t> least(static_cast<size_t>(rows), 1);
  std::vector<uint64_t> seed, position;
  for (int64_t i = 0; i < rows; ++i) {
    temperature.push_back(0.25 * double(i % 5)), range.push_back(0.1 * double(i % 3));
    top_k.push_back(double(i % 4 ? 40 * i : V)), p.push_back(1.0 - 0.03 * double(i)),
        small.push_back(0.001 * double(i % 3));
    seed.push_back(uint64_t(i) << 40), position.push_back(uint64_t(i));
  }
  const double exponent = 0.7, sigmas = 3, threshold = 0.01;
  const uint64_t stream = 0;
  const PerRow<double> share{p.data(), 1}, little{small.data(), 1};
  const auto stage = [&](const char* name) {
    int32_t i = 0;
    while (std::strcmp(table.sampling->stage_name(i), name)) ++i;
    return i;
  };
  const Step steps[] = {
      {stage("temperature"),
       Ties::lowest_id,
       false,
       true,
       {{temperature.data(), 1}, {range.data(), 1}, {&exponent, 0}}},
      {stage("top_n_sigma"), Ties::lowest_id, false, true, {{&sigmas, 0}}},
      {stage("top_k"), Ties::lowest_id, false, true, {{top_k.data(), 1}}},
      {stage("top_p"), Ties::highest_id, true, true, {share}},
      {stage("min_p"), Ties::lowest_id, false, true, {little}},
      {stage("typical_p"), Ties::lowest_id, false, true, {share}},
      {stage("epsilon_cutoff"), Ties::lowest_id, false, true, {little}},
      {stage("eta_cutoff"), Ties::lowest_id, false, true, {little}},
      {stage("xtc_probability"), Ties::lowest_id, true, true, {share, {&threshold, 0}}},
  };
  Sampling t{};
  t.batch.axes = 1, t.batch.shape[0] = rows;
  t.V = V;
  t.logits = view(logits.data(), DType::f32, 1, 1);
  t.logits.batch[0] = V;
  t.steps = steps, t.step_count = sizeof steps / sizeof *steps;
  t.min_tokens = {least.data(), 1};
  t.seed = {seed.data(), 1}, t.stream = {&stream, 0}, t.position = {position.data(), 1};
  t.tokens = tokens.data(), t.probabilities = probabilities.data(), t.status = status.data();
  t.draws = 1;
  execute(table.sampling->sample, t);
  digest.add(tokens), digest.add(probabilities), digest.add(status);
}

} // namespace

int main() {
  for (int i = 0; i < supported_kernels().size; ++i) {
    const Kernels& table = *supported_kernels().table[i];
    Digest digest;
    attention<float>(digest, table, DType::f32, DType::f32);
    attention<double>(digest, table, DType::f64, DType::f64);
    attention<uint16_t>(digest, table, DType::f16, DType::f32);
    attention<uint16_t>(digest, table, DType::bf16, DType::f32);
    layers<float>(digest, table, DType::f32, DType::f32);
    layers<double>(digest, table, DType::f64, DType::f64);
    layers<uint16_t>(digest, table, DType::f16, DType::f32);
    layers<uint16_t>(digest, table, DType::bf16, DType::f32);
    sampling(digest, table);
    std::printf("%016llx %s\n", static_cast<unsigned long long>(digest.hash), table.name);
  }
}
