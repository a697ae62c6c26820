// LSTM backward: step by step from the last, dh = dgates(next) @ W_hh with the cell's backward on the hot
// tile; then the products that need no order: dx = dgates @ W_ih, dW_ih = dgates^T @ x, dW_hh = mask *
// dgates^T @ h_prev.
//
// The mask of W_hh is regenerated from the seed, both for the packed copy and for dW_hh.
#pragma once
#include "gemm_sparse.inl"
#include "lstm.inl"

ULMFIT_BEGIN

// HTile: of the recurrent product.
template <class Tile, class HTile>
class LstmBackwardPass {
  using T = typename Tile::Compute;
  using Packed = typename Tile::Packed;
  using HPacked = typename HTile::Packed;
  using Element = typename Tile::Element;
  using V = Vec<T>;
  static constexpr int L = lanes_of<T>;
  static constexpr int kCols = Tile::kCols;
  static constexpr bool kPlain = Tile::kPlain;

 public:
  LstmBackwardPass(const LstmBackward& args, const Parallel& parallel)
      : p(args),
        s(args.shape),
        batch(s),
        parallel(parallel),
        drop(args.shape.seed, args.shape.weight_p),
        G(4 * s.H),
        depth(padded_depth<Tile>(G)),
        blocks(unit_blocks<T>(s.H)),
        panels(ceil_div(s.H, HTile::kCols)),
        w_hh(panels * panel_elements<HTile>(G)),
        out_panels(ceil_div(G, kCols)),
        dgates(kPlain ? out_panels * batch.total() * kCols : Tile::a_elements(batch.total(), depth)),
        next_rows(in_place() ? 0 : 2 * HTile::a_elements(s.B, depth)),
        dh(state_size()),
        dc(state_size()),
        c_first(state_size()),
        y_mask(p.ddropped.data == nullptr ? 0 : state_size()) {}

  void run() {
    load_state(p.dh_n, batch, dh.get());
    load_state(p.dc_n, batch, dc.get());
    load_state(p.c0, batch, c_first.get());
    if (p.ddropped.data != nullptr) load_output_mask(batch, y_mask.get(), parallel);
    if (batch.total() > 0) {
      recurrence();
      if (p.dx.data != nullptr) input_gradient();
      if (p.db != nullptr) weight_gradients();
    } else if (p.db != nullptr) {
      std::memset(p.dw_ih, 0, G * s.I * size_of(p.w_ih.dtype));
      std::memset(p.dw_hh, 0, G * s.H * size_of(p.w_hh.dtype));
      std::memset(p.db, 0, G * size_of(p.w_ih.dtype));
    }
    if (p.dx.data != nullptr) clear_padding();
    store_state(dh.get(), p.h0.dtype, batch, p.dh0);
    store_state(dc.get(), p.c0.dtype, batch, p.dc0);
  }

 private:
  int64_t time_of(int64_t step) const { return s.reverse ? s.T - 1 - step : step; }
  int64_t state_size() const { return blocks * s.B * L; }
  const T* cell(int64_t step) const { return static_cast<const T*>(p.cells) + time_of(step) * state_size(); }
  // Whether a step's dgates are the operand of the step before where they lie anyway.
  bool in_place() const { return !kPlain && !batch.ragged && s.B % Tile::kRowGroup == 0; }
  HPacked* step_dgates(int64_t step) const {
    if (in_place()) return dgates + HTile::a_elements(time_of(step) * s.B, depth);
    return next_rows + step % 2 * HTile::a_elements(s.B, depth);
  }

  void recurrence() {
    // What pads the depth is multiplied by zeros, and must be a number. What pads the batch comes to nothing,
    // but chance values could be slow ones.
    if (depth != G) std::memset(dgates.get(), 0, Tile::a_elements(batch.total(), depth) * sizeof(Packed));
    if (!in_place() && (depth != G || HTile::kSparse))
      std::memset(next_rows.get(), 0, 2 * HTile::a_elements(s.B, depth) * sizeof(HPacked));
    pack_b_rows<HTile>(w_hh.get(), G, s.H, parallel, [&](int64_t k, int64_t col, int64_t n, Element* out) {
      load_dropped<HTile>(p.w_hh, s.H, drop, k, col, n, out);
    });
    run_steps<HTile>(
        batch, parallel, s.T + 1, panels,  // the last, step -1: what reaches h0
        [&](int64_t i) { return batch.rows(time_of(s.T - i)); },
        [&](int64_t i, int64_t panel0, int64_t panel1, int64_t row0, int64_t row1) {
          step_back(s.T - 1 - i, panel0, panel1, row0, row1);
        });
  }

  void step_back(int64_t step, int64_t panel_begin, int64_t panel_end, int64_t row_begin,
                 int64_t row_end) const {
    [[maybe_unused]] typename HTile::Session session;
    const int64_t count = panel_end - panel_begin;
    const HPacked* w = w_hh + panel_begin * panel_elements<HTile>(G);
    // with what pads the units: a sum of it is read
    const int64_t units = blocks * L - panel_begin * HTile::kCols,
                  columns = units < count * HTile::kCols ? units : count * HTile::kCols;
    Scratch<T> sums(count * HTile::kBlockRows * HTile::kCols);
    // Rows that the step after this one hands something down to, and those of this step. Of a row that only
    // the former have, this is where its h0 is reached.
    const int64_t given = batch.rows(time_of(step + 1)), reached = batch.rows(time_of(step));
    const int64_t most = given > reached ? given : reached, end = row_end < most ? row_end : most;
    for (int64_t b0 = row_begin; b0 < end; b0 += HTile::kBlockRows) {
      const int64_t b1 = end - b0 < HTile::kBlockRows ? end : b0 + HTile::kBlockRows;
      const int rows = static_cast<int>(given <= b0 ? 0 : (given < b1 ? given : b1) - b0);
      if (rows > 0) {
        const HPacked* next = step_dgates(step + 1) + HTile::a_elements(b0, depth);
        panel_product<HTile>(depth, next, rows, w, columns, w, sums.get(), false);
      }
      for (int64_t panel = 0; panel < count; ++panel)
        for (int v = 0; v < HTile::kVecs; ++v) {
          const int64_t block = (panel_begin + panel) * HTile::kVecs + v;
          if (block >= blocks) break;
          for (int64_t row = b0; row < b1; row += L)
            rows_back(step, block, row, b1, sums + (panel * rows + row - b0) * HTile::kCols + v * L,
                      b0 + rows);
        }
    }
  }

  // L hidden units of up to L rows. Rows before `summed` have a part of dh in sums[row][kCols].
  void rows_back(int64_t step, int64_t block, int64_t row0, int64_t end, const T* sums,
                 int64_t summed) const {
    const int64_t reached = batch.rows(time_of(step)), before = batch.rows(time_of(step - 1));
    V gates[4][L];
    int count = 0;  // of rows with gates, which are the first
    for (int64_t row = row0; row < row0 + L && row < end; ++row, sums += HTile::kCols) {
      const int64_t at = (block * s.B + row) * L;
      V dh_total = load(dh + at);
      if (row < summed) dh_total += load(sums);
      if (row >= reached) {
        store(dh + at, dh_total);
        continue;
      }
      const auto d = cell_back(step, row, block, dh_total, row >= before);
      gates[0][count] = d.a_i, gates[1][count] = d.a_f, gates[2][count] = d.a_g, gates[3][count] = d.a_o;
      ++count;
    }
    if (count == 0) return;
    for (int g = 0; g < 4; ++g)
      store_a_vectors<HTile>(step_dgates(step), depth, row0, count, g * s.H + block * L, gates[g],
                             units_there(s.H, block * L, L));
  }

  // One row's L hidden units. first: of the sequence's steps. dh keeps what bypasses the recurrent product:
  // dh_n before a sequence's last step, then nothing, and what reaches h0 in the end.
  LstmCellGrad<V> cell_back(int64_t step, int64_t row, int64_t block, V dh_total, bool first) const {
    const int64_t t = time_of(step), unit = block * L, at = (block * s.B + row) * L;
    const int n = units_there(s.H, unit, L);
    const int64_t b = batch.sequence(row);
    if (p.dy.data != nullptr) dh_total += load_as<T>(p.dy.dtype, p.dy.row(t, b), unit, n);
    if (p.ddropped.data != nullptr)
      dh_total += load_as<T>(p.ddropped.dtype, p.ddropped.row(t, b), unit, n) * load(y_mask + at);
    const auto gate = [&](int g) {
      return load_as<T>(p.y.dtype, p.gates, 4 * (t * state_size() + at) + g * L, L);
    };
    const LstmCellGrad<V> d = lstm_cell_backward(gate(0), gate(1), gate(2), gate(3),
                                                 load((first ? c_first.get() : cell(step - 1)) + at),
                                                 load(cell(step) + at), dh_total, load(dc + at));
    store(dc + at, d.c_prev);
    store(dh + at, V{});
    int64_t k = unit;
    for (V v : {d.a_i, d.a_f, d.a_g, d.a_o}) {
      if constexpr (kPlain) {
        store_in_panel(batch.first(t) + row, k, v, n);
      } else if (!in_place()) {
        Tile::store_a_vector(dgates, depth, batch.first(t) + row, k, v, n);
      }
      k += s.H;
    }
    return d;
  }
  void store_in_panel(int64_t row, int64_t k, V v, int n) const {
    const int64_t rows = batch.total(), room = kCols - k % kCols;
    Packed* to = dgates + (k / kCols * rows + row) * kCols + k % kCols;
    if (n <= room) return store_n(to, v, n);
    alignas(64) T values[L];
    store(values, v);
    std::memcpy(to, values, room * sizeof(T));
    std::memcpy(to + (rows - 1) * kCols + room, values + room, (n - room) * sizeof(T));
  }
  void load_dgates(int64_t row, int64_t k, int64_t n, Element* out) const {
    if constexpr (kPlain) {
      load_from_panels<Tile>(dgates, batch.total(), row, k, n, out);
    } else {
      Tile::load_a(dgates, depth, row, k, n, out);
    }
  }

  void input_gradient() {
    const int64_t in_panels = ceil_div(s.I, kCols);
    Scratch<Packed> w_ih(in_panels * panel_elements<Tile>(G));
    pack_b_rows<Tile>(w_ih.get(), G, s.I, parallel, [&](int64_t k, int64_t col, int64_t n, Element* out) {
      load_elements<Tile>(p.w_ih.dtype, p.w_ih.row(k), col, n, out);
    });
    const auto multiply = [&](const auto& rows_of_dgates) {
      gemm<Tile>(batch.total(), G, s.I, w_ih.get(), parallel, rows_of_dgates,
                 [&](int64_t row0, int rows, int64_t panel, const T* tile) {
                   const int64_t col = panel * kCols, n = s.I - col < kCols ? s.I - col : kCols;
                   for (int64_t r = row0; r < row0 + rows; ++r, tile += kCols) {
                     const int64_t t = batch.time_of(r), b = batch.sequence(r - batch.first(t));
                     store_row(p.dx.dtype, p.dx.row(t, b), col, n, tile);
                   }
                 });
    };
    if constexpr (kPlain) {
      multiply([&](Packed* a, int64_t row0, int rows, int64_t k0, int64_t kc) {
        pack_a_rows<Tile>(a, row0, rows, k0, kc,
                          [&](int64_t r, int64_t k, int64_t n, Element* out) { load_dgates(r, k, n, out); });
      });
    } else {
      multiply(PackedRows<Tile>{dgates, depth});
    }
  }

  void clear_padding() const {
    parallel(s.T, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t row = batch.rows(t); row < s.B; ++row)
          std::memset(p.dx.row(t, batch.sequence(row)), 0, s.I * size_of(p.dx.dtype));
    });
  }

  // Both weight gradients are computed transposed, [x | h_prev]^T @ dgates: then the wide operand is packed
  // by rows, which is a copy, once for both, and only the narrow ones have to be transposed.
  void weight_gradients() {
    const int64_t rows = batch.total();
    Scratch<Packed> scratch(kPlain ? 0 : out_panels * panel_elements<Tile>(rows));
    Packed* packed = kPlain ? dgates.get() : scratch.get();
    Scratch<T> sums(ceil_div(rows, kRowsAtOnce) * G);  // of dgates' columns, for db
    if constexpr (kPlain) {
      parallel(ceil_div(rows, kRowsAtOnce), [&](int64_t begin, int64_t end) {
        alignas(64) Element line[kCols];
        const int64_t end_row = end * kRowsAtOnce < rows ? end * kRowsAtOnce : rows;
        for (int64_t col = 0; col < G; col += kCols)
          for (int64_t r = begin * kRowsAtOnce; r < end_row; ++r) {
            const int64_t n = G - col < kCols ? G - col : kCols;
            load_dgates(r, col, n, line);
            add_row(sums, r, col, n, line);
          }
      });
    } else {
      pack_b_rows<Tile>(packed, rows, G, parallel, [&](int64_t r, int64_t col, int64_t n, Element* out) {
        load_dgates(r, col, n, out);
        add_row(sums, r, col, n, out);
      });
    }
    bias_gradient(sums, ceil_div(rows, kRowsAtOnce));
    weight_gradient(s.I, packed, p.w_ih.dtype, p.dw_ih, Dropout(),
                    [&](int64_t r, int64_t col, int64_t n, Element* out) {
                      const int64_t t = batch.time_of(r), b = batch.sequence(r - batch.first(t));
                      load_elements<Tile>(p.x.dtype, p.x.row(t, b), col, n, out);
                    });
    weight_gradient(s.H, packed, p.w_hh.dtype, p.dw_hh, drop,
                    [&](int64_t r, int64_t col, int64_t n, Element* out) {
                      const int64_t t = batch.time_of(r), row = r - batch.first(t), b = batch.sequence(row);
                      const int64_t before = s.reverse ? t + 1 : t - 1;
                      const void* h = row >= batch.rows(before) ? p.h0.row(b) : p.y.row(before, b);
                      load_elements<Tile>(p.y.dtype, h, col, n, out);
                    });
  }

  template <class LoadInput>  // load_input(row, column, n, out): n elements of x or h_prev
  void weight_gradient(int64_t inputs, const Packed* packed, DType dtype, void* dw, const Dropout& mask,
                       LoadInput&& load_input) {
    gemm<Tile>(
        inputs, batch.total(), G, packed, parallel,
        [&](Packed* a, int64_t row0, int rows, int64_t k0, int64_t kc) {
          pack_a_columns<Tile>(a, row0, rows, k0, kc, load_input);
        },
        [&](int64_t row0, int rows, int64_t panel, const T* tile) {
          constexpr int ld = Tile::kMostRows;
          alignas(64) T lines[kCols * ld];
          const int64_t col = panel * kCols, n = G - col < kCols ? G - col : kCols;
          transpose(tile, kCols, rows, n, lines, ld);
          for (int64_t c = 0; c < n; ++c) {
            const int64_t first = (col + c) * inputs + row0;
            apply_mask(mask, first, rows, lines + c * ld);
            store_row(dtype, dw, first, rows, lines + c * ld);
          }
        });
  }

  // sums[r / 64] += a piece of row r. db adds those up: fp32 sums of thousands of rows keep their low bits.
  void add_row(T* sums, int64_t r, int64_t col, int64_t n, const Element* values) const {
    T* to = sums + r / kRowsAtOnce * G + col;
    const bool first = r % kRowsAtOnce == 0;
    for (int64_t j = 0; j < n; j += L) {
      const int there = static_cast<int>(n - j < L ? n - j : L);
      const V v = load_as<T>(Tile::kElement, values, j, there);
      store_n(to + j, first ? v : load_n(to + j, there) + v, there);
    }
  }
  void bias_gradient(T* sums, int64_t count) const {
    for (int64_t i = 1; i < count; ++i)
      for (int64_t j = 0; j < G; ++j) sums[j] += sums[i * G + j];
    store_row(p.w_ih.dtype, p.db, 0, G, sums);
  }

  const LstmBackward& p;
  const LstmShape& s;
  const Batch batch;
  const Parallel& parallel;
  const Dropout drop;
  const int64_t G, depth, blocks, panels;
  Scratch<HPacked> w_hh;
  const int64_t out_panels;  // of dgates
  Scratch<Packed> dgates;  // rows of all steps, depth 4H: packed as A, or in plain panels, which are packed B
  Scratch<HPacked> next_rows;  // those of two steps as A, where they do not lie so in dgates
  Scratch<T> dh, dc, c_first, y_mask;
};

template <class Tile, class HTile = Tile>
void lstm_backward(const LstmBackward& args, const Parallel& parallel) {
  LstmBackwardPass<Tile, HTile>(args, parallel).run();
}

ULMFIT_END
