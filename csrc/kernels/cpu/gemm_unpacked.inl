// Products of few rows with a weight as it lies in memory. Packing reads and writes the weight once, which is
// several times what a product of a few rows takes, and one call of a text generator has one row.
//
// Each result is a dot product along a row of the weight: vectors run along the depth, and L vectors of sums
// become one vector of L results at the end.
#pragma once
#include "gemm.inl"

ULMFIT_BEGIN

// c[m][i] (+)= row m of A (M of them, packed) * row i of the weight, for L rows of the weight. Rows of the
// weight from `there` on do not exist; their results are 0.
template <class Tile, int M, DType kStored, class T = typename Tile::Compute>
inline void unpacked_dots(int64_t K, const typename Tile::Packed* a, int64_t lda, int64_t a_row,
                          const Matrix& w, int64_t w_row, int there, T* c, bool accumulate) {
  // L sums at a time, of M rows by W: half of AVX-512's registers, or of AVX2's.
  constexpr int L = lanes_of<T>, W = L / M, kRun = Tile::kRun;
  for (int first = 0; first < L; first += W, c += W) {
    const void* rows[W];
    for (int i = 0; i < W; ++i) rows[i] = w.row(w_row + (first + i < there ? first + i : there - 1));
    Vec<T> acc[L];
    for (Vec<T>& v : acc) v = Vec<T>{};
    const auto multiply = [&](int64_t k, int n) {
      decltype(Tile::load_packed_run(a, lda, a_row, k, n)) x[M];
      for (int m = 0; m < M; ++m) x[m] = Tile::load_packed_run(a, lda, a_row + m, k, n);
      for (int i = 0; i < W; ++i) {
        const auto run = Tile::load_run(kStored, rows[i], k, n);
        for (int m = 0; m < M; ++m) acc[m * W + i] = Tile::multiply_run(x[m], run, acc[m * W + i]);
      }
    };
    int64_t k = 0;
    for (; k + kRun <= K; k += kRun) multiply(k, kRun);
    if (k < K) multiply(k, static_cast<int>(K - k));
    alignas(64) T sums[L];
    store(sums, sum_of_each(acc));
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < W; ++i) {
        const T sum = first + i < there ? sums[m * W + i] : T(0);
        c[m * Tile::kCols + i] = accumulate ? c[m * Tile::kCols + i] + sum : sum;
      }
  }
}

// f(std::integral_constant<DType, dtype>()), of the types that are computed in T. With the weight's type
// known an inner loop stays so small that GCC keeps all of its sums in registers.
template <class T, class F>
inline void with_storage(DType dtype, F&& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(std::integral_constant<DType, DType::f64>());
  } else {
    if (dtype == DType::f32) return f(std::integral_constant<DType, DType::f32>());
    if (dtype == DType::bf16) return f(std::integral_constant<DType, DType::bf16>());
    f(std::integral_constant<DType, DType::f16>());
  }
}

// The product with one panel, c[rows][kCols], without a packed panel: columns v * L ... are the weight's rows
// from first_row(v) on, `there(v)` of which exist.
// Not inlined: the loops that call it have a product of their own, which is the one that must be fast there.
template <class Tile, class FirstRow, class There, class T = typename Tile::Compute>
__attribute__((noinline)) void unpacked_product(int64_t K, const typename Tile::Packed* a, int64_t lda,
                                                int64_t a_row, int rows, const Matrix& w,
                                                FirstRow&& first_row, There&& there, T* c, bool accumulate) {
  constexpr int L = lanes_of<T>, kMost = L < 4 ? L : 4;
  with_storage<T>(w.dtype, [&](auto stored) {
    for (int v = 0; v < Tile::kVecs; ++v, c += L) {
      const int n = there(v);
      if (n <= 0) {
        for (int r = 0; r < rows && !accumulate; ++r) std::memset(c + r * Tile::kCols, 0, L * sizeof(T));
        continue;
      }
      const auto dots = [&](auto m, int r) {
        unpacked_dots<Tile, m(), stored()>(K, a, lda, a_row + r, w, first_row(v), n, c + r * Tile::kCols,
                                           accumulate);
        return r + m();
      };
      int r = 0;
      while (rows - r >= kMost) r = dots(std::integral_constant<int, kMost>(), r);
      if (rows - r >= 2) r = dots(std::integral_constant<int, 2>(), r);
      if (rows - r >= 1) r = dots(std::integral_constant<int, 1>(), r);
    }
  });
}

ULMFIT_END
