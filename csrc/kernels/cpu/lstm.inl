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
