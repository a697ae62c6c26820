// The blocked matrix product on 128-bit vectors: packing, edges of every block, and threads. What other
// instruction sets change is the micro-kernel, which test_lstm.cpp runs for each.
#define ULMFIT_ISA gemm_test
#define ULMFIT_LANES 4
#include "kernels/cpu/std.h"  // first: the others take its headers for granted

#include "check.h"
#include "kernels/cpu/gemm.inl"

using namespace ulmfit_fast;
using namespace ulmfit_fast::gemm_test;

// How the operands come: as they are, from their transposes, or A packed already and C added to what is
// there.
enum Form { kRows, kColumns, kPlaced };

// C = A * B' with A (M, K), B (N, K).
template <class T>
std::vector<T> product(int64_t M, int64_t N, int64_t K, const std::vector<T>& A, const std::vector<T>& B,
                       Form form, int count) {
  using Tile = FmaTile<T>;
  const int64_t panels = ceil_div(N, Tile::kCols);
  std::vector<T> transposed_a(M * K), transposed_b(N * K), C(M * N, T(-1));
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t m = 0; m < M; ++m) transposed_a[k * M + m] = A[m * K + k];
    for (int64_t n = 0; n < N; ++n) transposed_b[k * N + n] = B[n * K + k];
  }
  Scratch<T> packed(panels * panel_elements<Tile>(K));
  if (form == kColumns) {
    pack_b_rows<Tile>(packed.get(), K, N, threads(count), [&](int64_t k, int64_t col, int64_t n, T* out) {
      for (int64_t c = 0; c < n; ++c) out[c] = transposed_b[k * N + col + c];
    });
  } else {
    for (int64_t p = 0; p < panels; ++p)
      pack_b_columns<Tile>(packed.get() + p * panel_elements<Tile>(K), K,
                           [&](int c, int64_t k0, int n, T* out) {
                             const int64_t row = p * Tile::kCols + c;
                             for (int k = 0; k < n; ++k) out[k] = row < N ? B[row * K + k0 + k] : T(0);
                           });
  }
  if (form == kPlaced) {
    std::vector<T> tiles(panels * M * Tile::kCols, T(1));
    gemm<Tile>(
        M, K, panels, packed.get(), threads(count), PackedRows<Tile>{A.data(), K},
        [](int64_t, int, int64_t, const T*) {},
        [&](int64_t row0, int64_t panel) { return tiles.data() + (panel * M + row0) * Tile::kCols; }, true);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n)
        C[m * N + n] = tiles[(n / Tile::kCols * M + m) * Tile::kCols + n % Tile::kCols] - 1;
    return C;
  }
  gemm<Tile>(
      M, K, panels, packed.get(), threads(count),
      [&](T* a, int64_t row0, int rows, int64_t k0, int64_t kc) {
        if (form == kColumns) {
          pack_a_columns<Tile>(a, row0, rows, k0, kc, [&](int64_t k, int64_t first, int n, T* out) {
            for (int r = 0; r < n; ++r) out[r] = transposed_a[k * M + first + r];
          });
        } else {
          pack_a_rows<Tile>(a, row0, rows, k0, kc, [&](int64_t row, int64_t k, int64_t n, T* out) {
            for (int64_t j = 0; j < n; ++j) out[j] = A[row * K + k + j];
          });
        }
      },
      [&](int64_t row0, int rows, int64_t panel, const T* c) {
        for (int r = 0; r < rows; ++r)
          for (int j = 0; j < Tile::kCols && panel * Tile::kCols + j < N; ++j)
            C[(row0 + r) * N + panel * Tile::kCols + j] = c[r * Tile::kCols + j];
      });
  return C;
}

template <class T>
void check(int64_t M, int64_t N, int64_t K) {
  const std::vector<T> A = random_values<T>(M * K, 1), B = random_values<T>(N * K, 2);
  // K rounded products of magnitude <= 1, summed one after the other: error below K * K/2 * epsilon, in
  // practice about K * epsilon; and 1 more, where C is added to
  const double tolerance = 2 * (K + 1) * std::numeric_limits<T>::epsilon();
  for (Form form : {kRows, kColumns, kPlaced}) {
    const std::vector<T> C = product<T>(M, N, K, A, B, form, 1);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) {
        double expected = 0;
        for (int64_t k = 0; k < K; ++k) expected += static_cast<double>(A[m * K + k]) * B[n * K + k];
        CHECK(std::abs(C[m * N + n] - expected) <= tolerance, "%lld x %lld x %lld at %lld, %lld: %g, not %g",
              static_cast<long long>(M), static_cast<long long>(N), static_cast<long long>(K),
              static_cast<long long>(m), static_cast<long long>(n), static_cast<double>(C[m * N + n]),
              expected);
      }
    CHECK(C == product<T>(M, N, K, A, B, form, 3), "3 threads give other bits than 1");
  }
}

int main() {
  for (int64_t M : {1, 2, 7, 25})
    for (int64_t N : {1, 16, 33})
      for (int64_t K : {1, 5, 64, 65}) {
        check<float>(M, N, K);
        check<double>(M, N, K);
      }
  check<float>(30, 300, 1300);  // several depth blocks, groups of panels and row blocks
  check<double>(30, 300, 1300);
}
