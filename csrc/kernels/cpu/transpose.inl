// Matrix transposition in registers: what packing costs where an operand lies across its panels.
#pragma once
#include "simd.h"

ULMFIT_BEGIN

// One of the two results of a butterfly: row i (kUpper: row i + S) after it and its partner, a and b, have
// swapped their off-diagonal S x S blocks. Of the shuffle's numbers those below L are lanes of a, the others
// lanes of b.
template <class V, int S, bool kUpper, int... I>
ULMFIT_HD V swap_lanes(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  return shuffle<(kUpper ? (I & S ? L + I : I + S) : (I & S ? L + I - S : I))...>(a, b);
}
template <class V, int S, int L>
ULMFIT_HD void transpose_stage(V* rows) {
  if constexpr (S < L) {
    for (int i = 0; i < L; ++i) {
      if (i & S) continue;
      const V a = rows[i], b = rows[i + S];
      rows[i] = swap_lanes<V, S, false>(a, b, std::make_integer_sequence<int, L>());
      rows[i + S] = swap_lanes<V, S, true>(a, b, std::make_integer_sequence<int, L>());
    }
    transpose_stage<V, 2 * S, L>(rows);
  }
}

// out[c][r] = in[r][c] for L x L elements.
template <class T>
ULMFIT_HD void transpose_block(const T* in, int64_t ld_in, T* out, int64_t ld_out) {
  constexpr int L = lanes_of<T>;
  Vec<T> rows[L];
  for (int r = 0; r < L; ++r) rows[r] = load(in + r * ld_in);
  transpose_stage<Vec<T>, 1, L>(rows);
  for (int c = 0; c < L; ++c) store(out + c * ld_out, rows[c]);
}
// The same for any size.
template <class T>
inline void transpose(const T* in, int64_t ld_in, int64_t rows, int64_t cols, T* out, int64_t ld_out) {
  constexpr int L = lanes_of<T>;
  const int64_t whole_rows = rows / L * L, whole_cols = cols / L * L;
  for (int64_t r = 0; r < whole_rows; r += L)
    for (int64_t c = 0; c < whole_cols; c += L)
      transpose_block(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_cols : 0; c < cols; ++c) out[c * ld_out + r] = in[r * ld_in + c];
}

ULMFIT_END
