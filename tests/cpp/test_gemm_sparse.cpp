// The product that leaves out zeros against plain loops: packing, edges of groups, blocks and batches.
#define ULMFIT_ISA gemm_sparse_test
#define ULMFIT_LANES 4
#include "kernels/cpu/std.h"  // first: the others take its headers for granted

#include "check.h"
#include "kernels/cpu/gemm_sparse.inl"

using namespace ulmfit_fast;
using namespace ulmfit_fast::gemm_sparse_test;

namespace {

// The panels of a weight (N, K), from its columns or from its rows.
template <class Tile>
void pack(const std::vector<float>& weight, int64_t N, int64_t K, bool by_rows, float* packed) {
  const auto run = [&](int64_t n, int64_t k, int64_t step, int64_t count, float* out) {
    for (int64_t j = 0; j < count; ++j) out[j] = weight[n * K + k + j * step];
  };
  if (by_rows)
    return pack_b_rows<Tile>(
        packed, K, N, threads(3),
        [&](int64_t k, int64_t col, int64_t count, float* out) { run(col, k, K, count, out); });
  constexpr int64_t kCols = Tile::kCols;
  for (int64_t panel = 0; panel * kCols < N; ++panel)
    pack_b_columns<Tile>(packed + panel * panel_elements<Tile>(K), K,
                         [&](int c, int64_t k0, int n, float* out) {
                           const int64_t row = panel * kCols + c;
                           if (row < N) return run(row, k0, 1, n, out);
                           no_elements<Tile>(n, out);
                         });
}

// kept: the share of the weights that are not zero. If not all, one depth has only zeros, and they meet NaNs.
template <class Tile>
void check(int64_t M, int64_t N, int64_t K, double kept, bool by_rows, bool accumulate) {
  std::vector<float> A = random_values<float>(M * K, 1), B = random_values<float>(N * K, 2);
  const std::vector<float> drawn = random_values<float>(N * K, 3, 0.5);
  for (int64_t i = 0; i < N * K; ++i)
    if (kept < 1 && (drawn[i] + 0.5 >= kept || i % K == 1)) B[i] = 0;
  for (int64_t m = 0; m < M && kept < 1; ++m) A[m * K + 1] = std::numeric_limits<float>::quiet_NaN();

  constexpr int64_t kCols = Tile::kCols;
  const int64_t panels = ceil_div(N, kCols);
  Scratch<float> a(Tile::a_elements(M, K)), b(panels * panel_elements<Tile>(K));
  for (int64_t m = 0; m < M; m += kLanes)
    for (int64_t k = 0; k < K; k += kLanes) {
      const int n = static_cast<int>(K - k < kLanes ? K - k : kLanes);
      const int count = static_cast<int>(M - m < kLanes ? M - m : kLanes);
      VF lines[kLanes];
      for (int i = 0; i < count; ++i) lines[i] = load_n(A.data() + (m + i) * K + k, n);
      store_a_vectors<Tile>(a.get(), K, m, count, k, lines, n);
    }
  pack<Tile>(B, N, K, by_rows, b);
  std::vector<float> C(panels * M * kCols, 0.5f);
  panel_product<Tile>(K, a.get(), static_cast<int>(M), b.get(), N, b.get(), C.data(), accumulate);

  const double tolerance = 2 * (K + 1) * std::numeric_limits<float>::epsilon();
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double expected = accumulate ? 0.5 : 0;
      for (int64_t k = 0; k < K; ++k)
        if (B[n * K + k] != 0) expected += static_cast<double>(A[m * K + k]) * B[n * K + k];
      const double found = C[(n / kCols * M + m) * kCols + n % kCols];
      CHECK(std::abs(found - expected) <= tolerance, "%lld x %lld x %lld, %g kept, at %lld, %lld: %g, not %g",
            static_cast<long long>(M), static_cast<long long>(N), static_cast<long long>(K), kept,
            static_cast<long long>(m), static_cast<long long>(n), found, expected);
    }
}

template <class Tile>
void check_sizes() {
  for (double kept : {0.0, 0.03, 0.5, 1.0})
    for (bool by_rows : {false, true}) {
      for (int64_t M : {1, 4, 5, 16, 17, 40})
        for (int64_t N : {1, 16, 33}) check<Tile>(M, N, 256, kept, by_rows, M % 2 == 0);
      check<Tile>(20, 20, 1300, kept, by_rows, true);  // two blocks of depth
    }
}

}  // namespace

int main() {
  check_sizes<SparseTile<4>>();
  check_sizes<SparseTile<2>>();
}
