// What the LSTM's two directions share: where steps, rows and packed weights lie.
#pragma once
#include "dropout_mask.inl"
#include "gemm.inl"
// The cell needs sigmoid_ and tanh_ of simd.h declared before it.
#include "../lstm_cell.h"

ULMFIT_BEGIN

inline bool active(const LstmShape& s, int64_t t, int64_t b) {
  return s.lengths == nullptr || t < s.lengths[b];
}
// The step whose state is h_n, and the one that starts from h0.
inline int64_t last_step(const LstmShape& s, int64_t b) {
  const int64_t length = s.lengths == nullptr ? s.T : s.lengths[b];
  return s.reverse ? 0 : length - 1;
}
inline int64_t first_step(const LstmShape& s, int64_t b) {
  const int64_t length = s.lengths == nullptr ? s.T : s.lengths[b];
  return s.reverse ? length - 1 : 0;
}

// One row of the recurrent weight, from column k0 on, dropped and scaled: the published DropConnect, W * mask
// / (1 - p).
template <class T>
inline void load_dropped_row(const Matrix& w_hh, int64_t H, const Dropout& drop, int64_t row, int64_t k0,
                             int64_t n, T* out) {
  load_row(w_hh.dtype, w_hh.row(row), k0, n, out);
  apply_mask(drop, static_cast<uint64_t>(row) * H + k0, n, out);
}

// Whether threads share out the batch for a whole run of steps, or the hidden units of every single step.
// By batch they never wait for each other, but each reads all of W_hh every step: that pays where W_hh stays
// in a core's L2, or where each thread has rows enough to hide the reading. Both ways give the same bits.
template <class Tile>
inline bool split_by_batch(const LstmShape& s, int threads) {
  constexpr int64_t kL2 = 1 << 20, kRowsToHide = 24;
  const int64_t bytes = 4 * s.H * s.H * static_cast<int64_t>(sizeof(typename Tile::Packed));
  return ceil_div(s.B, Tile::kRows) >= threads && (bytes <= kL2 || s.B >= kRowsToHide * threads);
}

// Calls step(i, items_begin, items_end, row_begin, row_end) for i = 0..steps-1 in order, for all items and
// rows.
template <class Tile, class Step>
inline void run_steps(const LstmShape& s, const Parallel& parallel, int64_t steps, int64_t items,
                      Step&& step) {
  if (split_by_batch<Tile>(s, parallel.threads)) {
    parallel(ceil_div(s.B, Tile::kRows), [&](int64_t begin, int64_t end) {
      const int64_t row_end = end * Tile::kRows < s.B ? end * Tile::kRows : s.B;
      for (int64_t i = 0; i < steps; ++i) step(i, int64_t{0}, items, begin * Tile::kRows, row_end);
    });
  } else {
    for (int64_t i = 0; i < steps; ++i)
      parallel(items, [&](int64_t begin, int64_t end) { step(i, begin, end, int64_t{0}, s.B); });
  }
}

// Copies a (B, H) state into compute type; nullptr gives zeros.
template <class T>
inline void load_state(const Matrix& m, int64_t B, int64_t H, T* out) {
  for (int64_t b = 0; b < B; ++b) {
    if (m.data == nullptr) {
      std::memset(out + b * H, 0, H * sizeof(T));
    } else {
      load_row(m.dtype, m.row(b), 0, H, out + b * H);
    }
  }
}
template <class T>
inline void store_state(const T* in, DType dtype, int64_t B, int64_t H, void* out) {
  store_row(dtype, out, 0, B * H, in);
}

ULMFIT_END
