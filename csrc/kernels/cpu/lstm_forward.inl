// LSTM forward: pack the dropped weights once, project the inputs chunk by chunk, then step by step
// h @ W_hh^T with the cell's pointwise part on the hot tile. Where much of W_hh is dropped, that product has
// a tile of its own, which leaves it out. Where only a few rows meet a weight that nothing is dropped of, it
// is not packed: the steps of a text generator, a short document.
//
// The work item of a step is a block of L hidden units x 4 gates: its panel of W_hh holds the four gates'
// columns side by side, so that one thread has everything a cell needs and only h crosses threads, once a
// step. The projected inputs lie as that product's sums do, which start from them.
#pragma once
#include "gemm_sparse.inl"
#include "gemm_unpacked.inl"
#include "lstm.inl"

ULMFIT_BEGIN

// HTile: of the recurrent product.
template <class Tile, class HTile>
class LstmForwardPass {
  static_assert(HTile::kCols == Tile::kCols, "a panel of either is a block's four gates");
  using T = typename Tile::Compute;
  using Packed = typename Tile::Packed;
  using HPacked = typename HTile::Packed;
  using V = Vec<T>;
  static constexpr int L = lanes_of<T>;
  static constexpr int kCols = Tile::kCols;   // 4 gates x L
  static constexpr int64_t kChunkRows = 512;  // rows projected at once: 512 x 4608 floats, 9 MB, stay in L3

 public:
  LstmForwardPass(const LstmForward& args, const Parallel& parallel)
      : p(args),
        s(args.shape),
        batch(s),
        parallel(parallel),
        drop(args.shape.seed, args.shape.weight_p),
        blocks(unit_blocks<T>(s.H)),
        depth(padded_depth<HTile>(s.H)),
        chunk_steps(s.B < kChunkRows ? kChunkRows / (s.B > 0 ? s.B : 1) : 1),
        chunk_rows((chunk_steps < s.T ? chunk_steps : s.T) * s.B),
        unpacked(!HTile::kSparse && !drop.active() && batch.total() <= Tile::kUnpackedRows),
        w_ih(unpacked ? 0 : blocks * panel_elements<Tile>(s.I)),
        w_hh(unpacked ? 0 : blocks * panel_elements<HTile>(s.H)),
        projected(blocks * chunk_rows * kCols),
        bias(blocks * kCols),
        y_mask(p.dropped.data == nullptr ? 0 : state_size()),
        h_even(HTile::a_elements(s.B, depth)),
        h_odd(HTile::a_elements(s.B, depth)),
        c_first(state_size()),
        c_rolling(p.cells == nullptr ? 2 * state_size() : 0) {}

  void run() {
    start_state();
    if (p.dropped.data != nullptr) load_output_mask(batch, y_mask.get(), parallel);
    if (s.T == 0 || s.B == 0) return;
    pack_weights();
    for (int64_t step0 = 0; step0 < s.T; step0 += chunk_steps) {
      const int64_t steps = s.T - step0 < chunk_steps ? s.T - step0 : chunk_steps;
      const int64_t t0 = s.reverse ? s.T - step0 - steps : step0, first = batch.first(t0);
      project(first, batch.first(t0 + steps) - first);
      run_steps<HTile>(
          batch, parallel, steps, blocks, [&](int64_t i) { return batch.rows(time_of(step0 + i)); },
          [&](int64_t i, int64_t block0, int64_t block1, int64_t row0, int64_t row1) {
            T* inputs = projected + (batch.first(time_of(step0 + i)) - first) * kCols;
            recur(step0 + i, inputs, block0, block1, row0, row1);
          });
    }
  }

 private:
  int64_t time_of(int64_t step) const { return s.reverse ? s.T - 1 - step : step; }
  int64_t state_size() const { return blocks * s.B * L; }
  static int there(int64_t n) { return static_cast<int>(n < L ? n : L); }
  T* cell(int64_t step) const {
    if (p.cells == nullptr) return c_rolling + step % 2 * state_size();
    return static_cast<T*>(p.cells) + time_of(step) * state_size();
  }

  void start_state() {
    load_state(p.c0, batch, c_first.get());
    store_state(c_first.get(), p.c0.dtype, batch, p.c_n);  // rows of length 0 keep these
    Scratch<T> h0(state_size());
    load_state(p.h0, batch, h0.get());
    store_state(h0.get(), p.h0.dtype, batch, p.h_n);
    // Both buffers start as h0: a reversed sequence that has not begun yet keeps it without being written.
    for (HPacked* h : {h_even.get(), h_odd.get()}) {
      std::memset(h, 0, HTile::a_elements(s.B, depth) * sizeof(HPacked));
      for (int64_t unit = 0; unit < s.H; unit += L)
        for (int64_t b = 0; b < s.B; b += L) {
          const int count = there(s.B - b);
          V lines[L];
          for (int i = 0; i < count; ++i) lines[i] = load(h0 + unit * s.B + (b + i) * L);
          store_a_vectors<HTile>(h, depth, b, count, unit, lines, units_there(s.H, unit, L));
        }
    }
  }

  void pack_weights() {
    for (int64_t block = 0; block < blocks; ++block)
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t at = gate * s.H + block * L;
        const int n = units_there(s.H, block * L, L);
        V sum = {};
        for (const void* b : {p.b_ih, p.b_hh})
          if (b != nullptr && n > 0) sum += load_as<T>(p.w_ih.dtype, b, at, n);
        store(bias + block * kCols + gate * L, sum);
      }
    if (unpacked) return;
    parallel(2 * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i % 2 == 0) {
          pack_block<Tile>(p.w_ih, s.I, Dropout(), i / 2, w_ih);
        } else {
          pack_block<HTile>(p.w_hh, s.H, drop, i / 2, w_hh);
        }
      }
    });
  }
  // Column c of a block's panel is gate c / L of the block's hidden unit c % L: a row of the weight.
  template <class PanelTile>
  void pack_block(const Matrix& w, int64_t K, const Dropout& dropped, int64_t block,
                  typename PanelTile::Packed* panels) const {
    pack_b_columns<PanelTile>(panels + block * panel_elements<PanelTile>(K), K,
                              [&](int c, int64_t k0, int n, auto* out) {
                                const int64_t unit = block * L + c % L, row = c / L * s.H + unit;
                                if (unit >= s.H) return no_elements<PanelTile>(n, out);
                                load_dropped<PanelTile>(w, K, dropped, row, k0, n, out);
                              });
  }

  // projected[block][row][gate][L] = x @ W_ih^T for the chunk's rows, all steps' one after the other
  void project(int64_t first, int64_t rows) {
    const auto pack_x = [&](Packed* a, int64_t row0, int rows, int64_t k0, int64_t kc) {
      pack_a_rows<Tile>(a, first + row0, rows, k0, kc, [&](int64_t r, int64_t k, int64_t n, auto* out) {
        const int64_t t = batch.time_of(r);
        load_elements<Tile>(p.x.dtype, p.x.row(t, batch.sequence(r - batch.first(t))), k, n, out);
      });
    };
    if (unpacked) {
      const int64_t x_depth = padded_depth<Tile>(s.I);
      Scratch<Packed> x(Tile::a_elements(rows, x_depth));
      pack_x(x, 0, static_cast<int>(rows), 0, s.I);
      return parallel(blocks, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block)
          unpacked_gates(s.I, x, x_depth, 0, static_cast<int>(rows), p.w_ih, block,
                         projected + block * chunk_rows * kCols, false);
      });
    }
    gemm<Tile>(
        rows, s.I, blocks * kCols, w_ih.get(), parallel, pack_x, [](int64_t, int, int64_t, const T*) {},
        [&](int64_t row0, int64_t block) { return projected + (block * chunk_rows + row0) * kCols; });
  }

  // What a panel's product would be: the four gates of a block of hidden units.
  void unpacked_gates(int64_t K, const Packed* a, int64_t lda, int64_t row0, int rows, const Matrix& w,
                      int64_t block, T* sums, bool accumulate) const {
    unpacked_product<Tile>(
        K, a, lda, row0, rows, w, [&](int gate) { return gate * s.H + block * L; },
        [&](int) { return units_there(s.H, block * L, L); }, sums, accumulate);
  }

  void recur(int64_t step, T* inputs, int64_t block_begin, int64_t block_end, int64_t row_begin,
             int64_t row_end) const {
    [[maybe_unused]] typename HTile::Session session;
    const HPacked* h = step % 2 == 0 ? h_even : h_odd;
    const int64_t reached = batch.rows(time_of(step)), end = row_end < reached ? row_end : reached;
    const int64_t before = batch.rows(time_of(step - 1)), after = batch.rows(time_of(step + 1));
    for (int64_t b0 = row_begin; b0 < end; b0 += HTile::kBlockRows) {
      const int rows = static_cast<int>(end - b0 < HTile::kBlockRows ? end - b0 : HTile::kBlockRows);
      for (int64_t block = block_begin; block < block_end; ++block) {
        T* sums = inputs + (block * chunk_rows + b0) * kCols;
        if (unpacked) {
          if constexpr (!HTile::kSparse) unpacked_gates(s.H, h, depth, b0, rows, p.w_hh, block, sums, true);
        } else {
          const HPacked* panel = w_hh + block * panel_elements<HTile>(s.H);
          const HPacked* next = block + 1 < block_end ? panel + panel_elements<HTile>(s.H) : panel;
          panel_product<HTile>(depth, h + HTile::a_elements(b0, depth), rows, panel, kCols, next, sums, true);
        }
        for (int64_t row = b0; row < b0 + rows; row += L) {
          const int count = there(b0 + rows - row);
          V lines[L];
          for (int i = 0; i < count; ++i, sums += kCols)
            lines[i] = update_cell(step, row + i, block, sums, row + i >= before, row + i >= after);
          store_a_vectors<HTile>(step % 2 == 0 ? h_odd : h_even, depth, row, count, block * L, lines,
                                 units_there(s.H, block * L, L));
        }
      }
    }
    for (int64_t row = reached > row_begin ? reached : row_begin; row < row_end; ++row)
      for (int64_t block = block_begin; block < block_end; ++block)
        store_cell(time_of(step), row, block, LstmCell<V>{});
  }

  // One row's L hidden units: pre-activations[gate][L] -> new state, y, and what backward needs. first, last:
  // of the sequence's steps. -> h
  V update_cell(int64_t step, int64_t row, int64_t block, const T* pre, bool first, bool last) const {
    const int64_t at = (block * s.B + row) * L, b = batch.sequence(row), unit = block * L;
    const int n = units_there(s.H, unit, L);
    const DType dtype = p.y.dtype;
    const auto input = [&](int gate) { return load(pre + gate * L) + load(bias + block * kCols + gate * L); };
    LstmCell<V> state = lstm_cell_forward(input(0), input(1), input(2), input(3),
                                          load((first ? c_first.get() : cell(step - 1)) + at));
    state.h = round_as<T>(dtype, state.h);  // the next step multiplies what y holds
    if (last) {
      store_as<T>(dtype, p.h_n, b * s.H + unit, state.h, n);
      store_as<T>(dtype, p.c_n, b * s.H + unit, state.c, n);
    }
    store_cell(time_of(step), row, block, state);
    return state.h;
  }
  ULMFIT_HD void store_cell(int64_t t, int64_t row, int64_t block, const LstmCell<V>& state) const {
    const int64_t at = (block * s.B + row) * L;
    const DType dtype = p.y.dtype;
    const int64_t b = batch.sequence(row), unit = block * L;
    const int n = units_there(s.H, unit, L);
    store_as<T>(dtype, p.y.row(t, b), unit, state.h, n);
    if (p.dropped.data != nullptr)
      store_as<T>(dtype, p.dropped.row(t, b), unit, state.h * load(y_mask + at), n);
    store(cell(time_of(t)) + at, state.c);
    if (p.gates == nullptr) return;
    int64_t gate_at = 4 * (t * state_size() + at);
    for (V gate : {state.i, state.f, state.g, state.o}) {
      store_as<T>(dtype, p.gates, gate_at, gate, L);
      gate_at += L;
    }
  }

  const LstmForward& p;
  const LstmShape& s;
  const Batch batch;
  const Parallel& parallel;
  const Dropout drop;
  const int64_t blocks, depth, chunk_steps, chunk_rows;
  const bool unpacked;
  Scratch<Packed> w_ih;
  Scratch<HPacked> w_hh;
  Scratch<T> projected, bias, y_mask;
  Scratch<HPacked> h_even, h_odd;  // h of the step before, in A-block form, and the one being written
  Scratch<T> c_first, c_rolling;
};

template <class Tile, class HTile = Tile>
void lstm_forward(const LstmForward& args, const Parallel& parallel) {
  LstmForwardPass<Tile, HTile>(args, parallel).run();
}

ULMFIT_END
