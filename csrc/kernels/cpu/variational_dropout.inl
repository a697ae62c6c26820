// Variational dropout: one mask row per sequence, multiplied onto all its time steps. Its own gradient.
#pragma once
#include "dropout_mask.inl"

ULMFIT_BEGIN

template <class T>
inline void variational_dropout_as(const VariationalDropout& a, const Parallel& parallel) {
  constexpr int L = lanes_of<T>;
  Scratch<T> mask(a.B * a.F);  // generated once and read T times
  dropout_mask(a.seed, a.p, a.B * a.F, kComputeType<T>, mask.get(), parallel);
  // Rows in the order in which `out` lies in memory, so that it is written from one end to the other.
  const bool time_first = a.out.stride_t >= a.out.stride_b;
  parallel(a.T * a.B, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t t = time_first ? row / a.B : row % a.T, b = time_first ? row % a.B : row / a.T;
      const void* in = a.in.row(t, b);
      void* out = a.out.row(t, b);
      const T* factor = mask + b * a.F;
      const int64_t F = a.F;  // in registers, as the stores below might be to `a` for all the compiler knows
      const DType in_type = a.in.dtype, out_type = a.out.dtype;
      int64_t j = 0;
      for (; j + L <= F; j += L)
        store_as<T>(out_type, out, j, load_as<T>(in_type, in, j, L) * load(factor + j), L);
      if (const int rest = static_cast<int>(F - j)) {
        const Vec<T> value = load_as<T>(in_type, in, j, rest) * load_n(factor + j, rest);
        store_as<T>(out_type, out, j, value, rest);
      }
    }
  });
}

inline void variational_dropout(const VariationalDropout& a, const Parallel& parallel) {
  if (a.in.dtype == DType::f64) return variational_dropout_as<double>(a, parallel);
  variational_dropout_as<float>(a, parallel);
}

ULMFIT_END
