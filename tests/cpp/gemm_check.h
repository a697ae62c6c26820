// The blocked product with one of the tiles against plain loops: packing, edges of every block, and threads.
// Included in the target region of the instruction set under test.
#pragma once
#include "check.h"
#include "kernels/cpu/gemm.inl"

ULMFIT_BEGIN

// How the operands come: as they are, from their transposes, or A packed already and C added to what is
// there.
enum Form { kRows, kColumns, kPlaced };

template <class Tile>
typename Tile::Element element(double value) {
  typename Tile::Element e{};
  store_as<typename Tile::Compute>(Tile::kElement, &e, 0,
                                   broadcast(static_cast<typename Tile::Compute>(value)), 1);
  return e;
}
// What of a value an operand holds.
template <class Tile>
double held(double value) {
  const typename Tile::Element e = element<Tile>(value);
  return load_as<typename Tile::Compute>(Tile::kElement, &e, 0, 1)[0];
}

// C = A * B' with A (M, K), B (N, K).
template <class Tile>
std::vector<typename Tile::Compute> product(int64_t M, int64_t N, int64_t K, const std::vector<double>& A,
                                            const std::vector<double>& B, Form form, int count) {
  using T = typename Tile::Compute;
  using Packed = typename Tile::Packed;
  using Element = typename Tile::Element;
  constexpr int64_t kCols = Tile::kCols;
  const int64_t panels = ceil_div(N, kCols);
  const auto run_of = [](const std::vector<double>& values, int64_t at, int64_t step, int64_t n,
                         Element* out) {
    for (int64_t j = 0; j < n; ++j) out[j] = element<Tile>(values[at + j * step]);
  };
  Scratch<Packed> b(panels * panel_elements<Tile>(K));
  if (form == kColumns) {
    pack_b_rows<Tile>(b.get(), K, N, threads(count), [&](int64_t k, int64_t col, int64_t n, Element* out) {
      run_of(B, col * K + k, K, n, out);
    });
  } else {
    for (int64_t p = 0; p < panels; ++p)
      pack_b_columns<Tile>(b.get() + p * panel_elements<Tile>(K), K,
                           [&](int c, int64_t k0, int n, Element* out) {
                             const int64_t row = p * kCols + c;
                             if (row < N) return run_of(B, row * K + k0, 1, n, out);
                             no_elements<Tile>(n, out);
                           });
  }
  const auto pack_rows = [&](Packed* a, int64_t row0, int rows, int64_t k0, int64_t kc) {
    pack_a_rows<Tile>(a, row0, rows, k0, kc, [&](int64_t row, int64_t k, int64_t n, Element* out) {
      run_of(A, row * K + k, 1, n, out);
    });
  };
  std::vector<T> C(M * N, T(-1));
  if (form == kPlaced) {
    const int64_t depth = padded_depth<Tile>(K);
    Scratch<Packed> a(Tile::a_elements(round_up(M, Tile::kRows), depth));
    pack_rows(a, 0, static_cast<int>(M), 0, K);
    std::vector<T> tiles(panels * M * kCols, T(1));
    gemm<Tile>(
        M, K, N, b.get(), threads(count), PackedRows<Tile>{a, depth}, [](int64_t, int, int64_t, const T*) {},
        [&](int64_t row0, int64_t panel) { return tiles.data() + (panel * M + row0) * kCols; }, true);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) C[m * N + n] = tiles[(n / kCols * M + m) * kCols + n % kCols] - 1;
    return C;
  }
  gemm<Tile>(
      M, K, N, b.get(), threads(count),
      [&](Packed* a, int64_t row0, int rows, int64_t k0, int64_t kc) {
        if (form == kRows) return pack_rows(a, row0, rows, k0, kc);
        pack_a_columns<Tile>(a, row0, rows, k0, kc, [&](int64_t k, int64_t first, int64_t n, Element* out) {
          run_of(A, first * K + k, K, n, out);
        });
      },
      [&](int64_t row0, int rows, int64_t panel, const T* c) {
        for (int r = 0; r < rows; ++r)
          for (int64_t j = 0; j < kCols && panel * kCols + j < N; ++j)
            C[(row0 + r) * N + panel * kCols + j] = c[r * kCols + j];
      });
  return C;
}

// left_out: what a tile leaves out of each product, relative to it.
template <class Tile>
void check_product(int64_t M, int64_t N, int64_t K, double left_out = 0) {
  std::vector<double> A = random_values<double>(M * K, 1), B = random_values<double>(N * K, 2);
  for (std::vector<double>* values : {&A, &B})
    for (double& value : *values) value = held<Tile>(value);
  // K rounded products of magnitude <= 1, summed one after the other: error below K * K/2 * epsilon, in
  // practice about K * epsilon; and 1 more, where C is added to
  const double epsilon = std::numeric_limits<typename Tile::Compute>::epsilon();
  const double tolerance = 2 * (K + 1) * epsilon + 4 * std::sqrt(K) * left_out;
  for (Form form : {kRows, kColumns, kPlaced}) {
    const auto C = product<Tile>(M, N, K, A, B, form, 1);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) {
        double expected = 0;
        for (int64_t k = 0; k < K; ++k) expected += A[m * K + k] * B[n * K + k];
        CHECK(std::abs(C[m * N + n] - expected) <= tolerance, "%lld x %lld x %lld at %lld, %lld: %g, not %g",
              static_cast<long long>(M), static_cast<long long>(N), static_cast<long long>(K),
              static_cast<long long>(m), static_cast<long long>(n), static_cast<double>(C[m * N + n]),
              expected);
      }
    CHECK((C == product<Tile>(M, N, K, A, B, form, 3)), "3 threads give other bits than 1");
  }
}

ULMFIT_END
