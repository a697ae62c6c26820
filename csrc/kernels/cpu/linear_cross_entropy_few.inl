// The loss of a few rows without a gradient: their logits are few enough to be held whole, and the weight is
// not packed for them (gemm_unpacked.inl).
#pragma once
#include "logits.inl"

ULMFIT_BEGIN

template <class Tile>
void linear_cross_entropy_of_few(const LinearCrossEntropy& p, const Parallel& parallel) {
  using T = typename Tile::Compute;
  using V = Vec<T>;
  constexpr int L = lanes_of<T>;
  const Scratch<T> z(p.N * p.V);
  logits<Tile>({p.N, p.E, p.V, p.h, p.weight, p.bias, p.high, kComputeType<T>, z.get()}, parallel);
  const T smooth = static_cast<T>(p.label_smoothing), infinity = std::numeric_limits<T>::infinity();
  parallel(p.N, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* loss = static_cast<T*>(p.loss) + r;
      *loss = 0;
      if (p.target[r] == p.ignore_index) continue;
      const T* row = z + r * p.V;
      T top = -infinity;
      for (int64_t v = 0; v < p.V; ++v) top = row[v] > top ? row[v] : top;
      // two levels: sums of a whole vocabulary keep their low bits
      V sum{}, total{}, part_sum{}, part_total{};
      for (int64_t v = 0; v < p.V; v += L) {
        const int n = static_cast<int>(p.V - v < L ? p.V - v : L);
        const V logit = load_n(row + v, n);
        part_sum += first_n(exp_(logit - top), n, V{});
        part_total += logit;
        if (v / L % 32 == 31 || v + L >= p.V) {
          sum += part_sum, total += part_total;
          part_sum = part_total = V{};
        }
      }
      T exp_sum = 0, logit_sum = 0;
      for (int l = 0; l < L; ++l) exp_sum += sum[l], logit_sum += total[l];
      *loss = top + std::log(exp_sum) - (1 - smooth) * row[p.target[r]];
      if (smooth != 0) *loss -= smooth * logit_sum / static_cast<T>(p.V);
    }
  });
}

ULMFIT_END
