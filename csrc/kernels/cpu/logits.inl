// Logits, h @ weight^T + bias, where they themselves are wanted.
#pragma once
#include "gemm_unpacked.inl"

ULMFIT_BEGIN

template <class Tile>
void logits(const Logits& p, const Parallel& parallel) {
  using T = typename Tile::Compute;
  using Packed = typename Tile::Packed;
  constexpr int L = lanes_of<T>, kCols = Tile::kCols;
  const int64_t panels = ceil_div(p.V, kCols), depth = padded_depth<Tile>(p.E);
  const auto width = [&](int64_t panel) { return columns_there<Tile>(p.V, panel); };
  const auto pack_h = [&](Packed* a, int64_t row0, int rows, int64_t k0, int64_t kc) {
    pack_a_matrix<Tile>(p.h, a, row0, rows, k0, kc);
  };
  const auto store_tile = [&](int64_t row0, int rows, int64_t panel, const T* tile) {
    const int words = width(panel);
    alignas(64) T bias[kCols] = {};
    if (p.bias != nullptr) load_row(p.weight.dtype, p.bias, panel * kCols, words, bias);
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < words; j += L)
        store_as<T>(p.out_type, p.out, (row0 + r) * p.V + panel * kCols + j,
                    load(tile + r * kCols + j) + load(bias + j), words - j < L ? words - j : L);
  };

  if (p.N <= Tile::kUnpackedRows) {
    const int rows = static_cast<int>(p.N);
    Scratch<Packed> h(Tile::a_elements(rows, depth));
    pack_h(h, 0, rows, 0, p.E);
    return parallel(panels, [&](int64_t begin, int64_t end) {
      Scratch<T> tile(rows * kCols);
      for (int64_t panel = begin; panel < end; ++panel) {
        unpacked_product<Tile>(
            p.E, h.get(), depth, 0, rows, p.weight, [&](int v) { return panel * kCols + v * L; },
            [&](int v) { return width(panel) - v * L; }, tile.get(), false);
        store_tile(0, rows, panel, tile);
      }
    });
  }
  Scratch<Packed> weight(panels * panel_elements<Tile>(p.E));
  parallel(panels, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      pack_b_matrix<Tile>(p.weight, weight + panel * panel_elements<Tile>(p.E), p.E, panel * kCols,
                          width(panel));
  });
  gemm<Tile>(p.N, p.E, p.V, weight.get(), parallel, pack_h, store_tile);
}

ULMFIT_END
