// What the LSTM's two directions share: which rows a step has, where states lie, the dropped weight.
#pragma once
#include "dropout_mask.inl"
#include "gemm.inl"
// The cell needs sigmoid_ and tanh_ of simd.h declared before it.
#include "../lstm_cell.h"

ULMFIT_BEGIN

// Where rows and steps are. Sequences of various lengths are taken longest first, so that those which reach a
// step are its first rows: padding is never multiplied, in any product. Rows of all steps follow each other,
// step by step, with nothing between them.
class Batch {
 public:
  explicit Batch(const LstmShape& shape)
      : s(shape),
        ragged(is_ragged(s)),
        reach(ragged ? s.T + 1 : 0),
        first_row(ragged ? s.T + 1 : 0),
        order(ragged ? s.B : 0),
        time(ragged ? sum_of_lengths(s) : 0) {
    if (!ragged) return;
    std::memset(reach.get(), 0, (s.T + 1) * sizeof(int64_t));
    for (int64_t b = 0; b < s.B; ++b)
      if (s.lengths[b] > 0) ++reach[s.lengths[b] - 1];
    for (int64_t t = s.T - 1; t-- > 0;) reach[t] += reach[t + 1];
    // For a moment first_row[n] is where the next sequence of length n goes: behind the longer ones.
    std::memcpy(first_row.get(), reach.get(), (s.T + 1) * sizeof(int64_t));
    for (int64_t b = 0; b < s.B; ++b) order[first_row[s.lengths[b]]++] = b;
    first_row[0] = 0;
    for (int64_t t = 0; t < s.T; ++t) {
      first_row[t + 1] = first_row[t] + reach[t];
      for (int64_t r = first_row[t]; r < first_row[t + 1]; ++r) time[r] = t;
    }
  }

  const LstmShape& s;
  const bool ragged;

  // The rows of step t; none before the first step and after the last.
  int64_t rows(int64_t t) const { return t < 0 || t >= s.T ? 0 : ragged ? reach[t] : s.B; }
  int64_t first(int64_t t) const { return ragged ? first_row[t] : t * s.B; }  // of step t, among all
  int64_t total() const { return first(s.T); }
  int64_t time_of(int64_t r) const { return ragged ? time[r] : r / s.B; }  // r: among all
  // The place in the caller's batch of a step's row.
  int64_t sequence(int64_t row) const { return ragged ? order[row] : row; }

 private:
  static bool is_ragged(const LstmShape& s) {
    for (int64_t b = 0; s.lengths != nullptr && b < s.B; ++b)
      if (s.lengths[b] < s.T) return true;
    return false;
  }
  static int64_t sum_of_lengths(const LstmShape& s) {
    int64_t sum = 0;
    for (int64_t b = 0; b < s.B; ++b) sum += s.lengths[b];
    return sum;
  }

  Scratch<int64_t> reach, first_row, order, time;
};

// n <= 64 elements of a row of a weight with K columns, from column k0 on, dropped and scaled: the published
// DropConnect, W * mask / (1 - p).
template <class Tile>
inline void load_dropped(const Matrix& w, int64_t K, const Dropout& drop, int64_t row, int64_t k0, int64_t n,
                         typename Tile::Element* out) {
  if (!drop.active()) return load_elements<Tile>(w.dtype, w.row(row), k0, n, out);
  alignas(64) typename Tile::Compute values[64];
  load_piece(w.dtype, w.row(row), k0, n, values);
  apply_mask(drop, static_cast<uint64_t>(row) * K + k0, n, values);
  store_row(Tile::kElement, out, 0, n, values);
}

// Whether threads share out the batch for a whole run of steps, or the hidden units of every single step.
// By batch they never wait for each other, but each reads all of W_hh every step: that pays where W_hh stays
// in a core's L2, or where each thread has rows enough to hide the reading. Both ways give the same bits.
template <class Tile>
inline bool split_by_batch(const Batch& batch, int threads) {
  const LstmShape& s = batch.s;
  if (batch.ragged) return false;   // the last rows have less to do
  constexpr int64_t kL2 = 1 << 20;  // of a core: Skylake-SP's and Zen 4's; later ones have more
  const int64_t bytes = 4 * s.H * s.H * static_cast<int64_t>(sizeof(typename Tile::Packed));
  // most: the rows of the busiest thread, in whole groups. The mean must be three quarters of it, or seven
  // eighths for the sparse tile, whose groups are of 64 rows.
  const int64_t groups = ceil_div(s.B, Tile::kRowGroup), rows = ceil_div(groups, threads) * Tile::kRowGroup;
  const int64_t most = rows < s.B ? rows : s.B;
  return 2 * s.B >= Tile::kRows * threads && 8 * s.B >= (Tile::kSparse ? 7 : 6) * most * threads &&
         (bytes <= kL2 || s.B >= Tile::kRowsToHide * threads);
}

// How high the pieces are that a step's rows are cut into, so that many threads have items enough. Example:
// 18 panels, 64 rows, 16 threads. Uncut, the busiest threads multiply two panels by 64 rows, 128 in all. Cut
// into pieces of 16 rows there are 72 items, at most 5 to a thread: 80 rows. But low pieces read W_hh more
// often, so a cut must gain more than a tenth.
template <class Tile>
inline int64_t piece_height(int64_t items, int64_t rows, int threads) {
  int64_t best = rows, least = rows * ceil_div(items, threads);
  for (int64_t parts = 2; 4 * rows >= parts * Tile::kRowsToHide; ++parts) {
    const int64_t height = round_up(ceil_div(rows, parts), Tile::kRowGroup);
    const int64_t work = height * ceil_div(items * ceil_div(rows, height), threads);
    if (10 * work < 9 * least) best = height, least = work;
  }
  return best;
}

// Calls step(i, items_begin, items_end, row_begin, row_end) for i = 0..steps-1 in order, for all items and
// rows. busy(i): the rows, from the first on, that have something to multiply in it.
template <class Tile, class Busy, class Step>
inline void run_steps(const Batch& batch, const Parallel& parallel, int64_t steps, int64_t items, Busy&& busy,
                      Step&& step) {
  const LstmShape& s = batch.s;
  if (split_by_batch<Tile>(batch, parallel.threads)) {
    constexpr int64_t group = Tile::kRowGroup;
    parallel(ceil_div(s.B, group), [&](int64_t begin, int64_t end) {
      const int64_t row_end = end * group < s.B ? end * group : s.B;
      for (int64_t i = 0; i < steps; ++i) step(i, int64_t{0}, items, begin * group, row_end);
    });
  } else {
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t rows = busy(i), height = piece_height<Tile>(items, rows, parallel.threads);
      const int64_t pieces = rows > 0 ? ceil_div(rows, height) : 1;
      parallel(items * pieces, [&](int64_t begin, int64_t end) {
        for (int64_t n; begin < end; begin += n) {  // the items that are left of a piece
          const int64_t piece = begin / items, item = begin % items;
          n = end - begin < items - item ? end - begin : items - item;
          step(i, item, item + n, piece * height, piece + 1 < pieces ? (piece + 1) * height : s.B);
        }
      });
    }
  }
}

// States lie in blocks of L hidden units, [block][b][L], gates as [block][b][gate][L], and each step of
// either after the other: what one work item reads and writes is one piece of memory. Rows of (B, H) and (B,
// 4H) would put every vector on a page of its own, and the pointwise part would wait for addresses.
template <class T>
inline int64_t unit_blocks(int64_t H) {
  return padded_units(H) / lanes_of<T>;
}
inline int units_there(int64_t H, int64_t unit, int lanes) {
  return static_cast<int>(H - unit < lanes ? (H > unit ? H - unit : 0) : lanes);
}
// A (B, H) state into blocks, zeros past H; nullptr gives zeros.
template <class T>
inline void load_state(const Matrix& m, const Batch& batch, T* out) {
  constexpr int L = lanes_of<T>;
  const int64_t B = batch.s.B, H = batch.s.H;
  for (int64_t block = 0; block < unit_blocks<T>(H); ++block)
    for (int64_t b = 0; b < B; ++b) {
      const int n = m.data == nullptr ? 0 : units_there(H, block * L, L);
      store(out + (block * B + b) * L,
            n > 0 ? load_as<T>(m.dtype, m.row(batch.sequence(b)), block * L, n) : Vec<T>{});
    }
}
template <class T>
inline void store_state(const T* in, DType dtype, const Batch& batch, void* out) {
  constexpr int L = lanes_of<T>;
  const int64_t B = batch.s.B, H = batch.s.H;
  for (int64_t block = 0; block * L < H; ++block)
    for (int64_t b = 0; b < B; ++b)
      store_as<T>(dtype, out, batch.sequence(b) * H + block * L, load(in + (block * B + b) * L),
                  units_there(H, block * L, L));
}

// The mask of y's variational dropout, (B, H) factors, as a state lies.
template <class T>
inline void load_output_mask(const Batch& batch, T* out, const Parallel& parallel) {
  const LstmShape& s = batch.s;
  Scratch<T> mask(s.B * s.H);
  dropout_mask(s.dropout_seed, s.dropout_p, s.B * s.H, kComputeType<T>, mask.get(), parallel);
  load_state({mask.get(), kComputeType<T>, s.H}, batch, out);
}

ULMFIT_END
