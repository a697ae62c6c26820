// The rate of the micro-kernels alone: what products could at best run at, for benchmarks to compare with.
#pragma once
#include "gemm.inl"

ULMFIT_BEGIN

// Multiplies one block of A with one of B, which stay in L2, `repeats` times. -> floating-point operations
// of the products, two for each multiplication: those of "high" count once, though they are three.
template <class Tile>
double multiply_in_cache(int64_t repeats) {
  constexpr int kRows = Tile::kBlockRows;
  constexpr int64_t kDepth = Tile::kBlockDepth;
  Scratch<typename Tile::Packed> a(Tile::a_elements(kRows, kDepth)), b(Tile::b_elements(kDepth));
  Scratch<typename Tile::Compute> c(kRows * Tile::kCols);
  std::memset(a.get(), 0, Tile::a_elements(kRows, kDepth) * sizeof(typename Tile::Packed));
  std::memset(b.get(), 0, Tile::b_elements(kDepth) * sizeof(typename Tile::Packed));
  std::memset(c.get(), 0, kRows * Tile::kCols * sizeof(typename Tile::Compute));
  [[maybe_unused]] typename Tile::Session session;
  for (int64_t i = 0; i < repeats; ++i) Tile::block_product(kDepth, a, kDepth, kRows, b, b, c, true);
  return 2.0 * kRows * kDepth * Tile::kCols * static_cast<double>(repeats);
}

ULMFIT_END
