// Variational dropout: one mask row per sequence, multiplied onto all its time steps. Its own gradient.
#pragma once
#include "dropout_mask.inl"

ULMFIT_BEGIN

template <class T>
inline void variational_dropout_as(const VariationalDropout& a, const Parallel& parallel) {
  // A work item is a block of features of one sequence over a block of time: the mask is generated once for
  // 256 rows, and a long document of batch 1 still has work for every thread.
  constexpr int64_t kFeatures = 1024, kTime = 256;
  constexpr int L = lanes_of<T>;
  const Dropout drop(a.seed, a.p);
  const int64_t feature_blocks = (a.F + kFeatures - 1) / kFeatures, time_blocks = (a.T + kTime - 1) / kTime;

  parallel(a.B * feature_blocks * time_blocks, [&](int64_t begin, int64_t end) {
    alignas(64) T mask[kFeatures];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t f0 = item % feature_blocks * kFeatures, b = item / feature_blocks / time_blocks;
      const int64_t t0 = item / feature_blocks % time_blocks * kTime;
      const int64_t t1 = t0 + kTime < a.T ? t0 + kTime : a.T;
      const int64_t n = a.F - f0 < kFeatures ? a.F - f0 : kFeatures;
      for (int64_t j = 0; j < n; ++j) mask[j] = T(1);
      apply_mask(drop, b * a.F + f0, n, mask);
      for (int64_t t = t0; t < t1; ++t) {
        const void* in = a.in.row(t, b);
        void* out = a.out.row(t, b);
        int64_t j = 0;
        for (; j + L <= n; j += L) {
          store_as<T>(a.out.dtype, out, f0 + j, load_as<T>(a.in.dtype, in, f0 + j, L) * load(mask + j), L);
        }
        if (const int rest = static_cast<int>(n - j)) {
          const Vec<T> value = load_as<T>(a.in.dtype, in, f0 + j, rest) * load_n(mask + j, rest);
          store_as<T>(a.out.dtype, out, f0 + j, value, rest);
        }
      }
    }
  });
}

inline void variational_dropout(const VariationalDropout& a, const Parallel& parallel) {
  if (a.in.dtype == DType::f64) return variational_dropout_as<double>(a, parallel);
  variational_dropout_as<float>(a, parallel);
}

ULMFIT_END
