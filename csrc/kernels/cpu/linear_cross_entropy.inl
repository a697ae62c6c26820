// Linear layer + cross-entropy over a vocabulary, a chunk of rows at a time: logits are never whole in
// memory, and turn into their own gradient in place.
//
// A chunk's logits lie in panels, [panel][row][kCols]: that is what the product writes, and, for the FMA
// tile, already the packed operand that dW = dlogits^T @ h multiplies by.
#pragma once
#include "dropout_mask.inl"
#include "gemm.inl"

ULMFIT_BEGIN

template <class Tile>
class LinearCrossEntropyPass {
  using T = typename Tile::Compute;
  using Packed = typename Tile::Packed;
  using Element = typename Tile::Element;
  using V = Vec<T>;
  static constexpr int L = lanes_of<T>;
  static constexpr int kCols = Tile::kCols;
  static constexpr bool kPlain = std::is_same_v<T, Packed>;  // a chunk of logits needs no repacking
  static constexpr int64_t kBundle = 16;                     // rows whose softmax is computed together
  // 32 MB of logits at most, but enough rows to pay for a pass over the gradient of the weight.
  static constexpr int64_t kChunkBytes = 32 << 20, kMinRows = 4 * Tile::kBlockRows, kMaxRows = 512;

 public:
  LinearCrossEntropyPass(const LinearCrossEntropy& args, const Parallel& parallel)
      : p(args),
        parallel(parallel),
        panels(ceil_div(p.V, kCols)),
        gradient(p.row_gradient != nullptr),
        chunk(chunk_rows(p.N, p.V)),
        w_forward(panels * panel_elements<Tile>(p.E)),
        w_backward(gradient ? ceil_div(p.E, kCols) * panel_elements<Tile>(p.V) : 0),
        logits(panels * chunk * kCols),
        packed(gradient && !kPlain ? panels * panel_elements<Tile>(chunk) : 0),
        dw(gradient ? panels * p.E * kCols : 0),
        bias(panels * kCols),
        db(gradient ? panels * kCols : 0) {}

  void run() {
    pack_weights();
    for (int64_t row0 = 0; row0 < p.N; row0 += chunk) {
      const int64_t rows = p.N - row0 < chunk ? p.N - row0 : chunk;
      forward(row0, rows);
      if (!gradient) continue;
      hidden_gradient(row0, rows);
      weight_gradient(row0, rows);
    }
    if (gradient) store_weight_gradient();
  }

 private:
  static int64_t chunk_rows(int64_t N, int64_t vocabulary) {
    int64_t rows = kChunkBytes / (vocabulary * static_cast<int64_t>(sizeof(T)));
    rows = rows < kMinRows ? kMinRows : rows > kMaxRows ? kMaxRows : rows;
    rows = rows / Tile::kBlockRows * Tile::kBlockRows;
    return N < rows ? N : rows;
  }
  T* run_of(int64_t panel, int64_t row, int64_t rows) const { return logits + (panel * rows + row) * kCols; }
  int64_t width(int64_t panel) const { return p.V - panel * kCols < kCols ? p.V - panel * kCols : kCols; }

  void pack_weights() {
    parallel(panels, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        pack_b_columns<Tile>(w_forward + panel * panel_elements<Tile>(p.E), p.E,
                             [&](int c, int64_t k0, int n, Element* out) {
                               if (c >= width(panel)) return no_elements<Tile>(n, out);
                               const void* row = p.weight.row(panel * kCols + c);
                               load_elements<Tile>(p.weight.dtype, row, k0, n, out);
                             });
        T* b = bias + panel * kCols;
        std::memset(b, 0, kCols * sizeof(T));
        if (p.bias != nullptr) load_row(p.weight.dtype, p.bias, panel * kCols, width(panel), b);
        if (!gradient) continue;
        std::memset(dw + panel * p.E * kCols, 0, p.E * kCols * sizeof(T));
        std::memset(db + panel * kCols, 0, kCols * sizeof(T));
      }
    });
    if (!gradient) return;
    parallel(ceil_div(p.E, kCols), [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t col = panel * kCols, n = p.E - col < kCols ? p.E - col : kCols;
        pack_b_rows<Tile>(w_backward + panel * panel_elements<Tile>(p.V), p.V, n,
                          [&](int64_t k, Element* out) {
                            load_elements<Tile>(p.weight.dtype, p.weight.row(k), col, n, out);
                          });
      }
    });
  }

  void forward(int64_t row0, int64_t rows) {
    gemm<Tile>(
        rows, p.E, panels, w_forward.get(), parallel,
        [&](Packed* a, int64_t r0, int n_rows, int64_t k0, int64_t kc) {
          pack_a_rows<Tile>(a, row0 + r0, n_rows, k0, kc, [&](int64_t r, int64_t k, int64_t n, Element* out) {
            load_elements<Tile>(p.h.dtype, p.h.row(r), k, n, out);
          });
        },
        [&](int64_t r0, int n_rows, int64_t panel, const T* tile) {
          for (int r = 0; r < n_rows; ++r)
            for (int j = 0; j < kCols; j += L)
              store(run_of(panel, r0 + r, rows) + j,
                    load(tile + r * kCols + j) + load(bias + panel * kCols + j));
        });
    parallel(ceil_div(rows, kBundle), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        softmax(row0, i * kBundle, (i + 1) * kBundle < rows ? (i + 1) * kBundle : rows, rows);
    });
  }

  // f(row, vector of logits, lanes that are there) over rows r0..r1, panel by panel: neighbouring rows' runs
  // lie side by side, and a row's own runs are pages apart.
  template <class F>
  void for_logits(int64_t r0, int64_t r1, int64_t rows, F&& f) const {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int n = static_cast<int>(width(panel));
      for (int64_t r = r0; r < r1; ++r)
        for (int j = 0; j < n; j += L) f(r - r0, run_of(panel, r, rows) + j, n - j);
    }
  }

  // loss = (1 - e)(lse - z_target) + e (lse - mean z), e = label_smoothing; its gradient replaces the logits:
  // upstream * (softmax - (1 - e) onehot - e / V). Ignored rows: zeros.
  void softmax(int64_t row0, int64_t r0, int64_t r1, int64_t rows) const {
    V top[kBundle], sum[kBundle] = {}, total[kBundle] = {};
    T max[kBundle], z_target[kBundle], scale[kBundle], shift[kBundle];
    bool ignored[kBundle];
    const T smooth = static_cast<T>(p.label_smoothing);
    for (V& v : top) v = broadcast(-std::numeric_limits<T>::infinity());
    for_logits(r0, r1, rows, [&](int64_t i, const T* z, int there) {
      V v = first_n(load(z), there, top[i]);
      v = v > top[i] ? v : top[i];
      top[i] = top[i] == top[i] ? v : top[i];  // a NaN stays
    });
    for (int64_t i = 0; i < r1 - r0; ++i) {
      max[i] = top[i][0];
      for (int l = 1; l < L; ++l) max[i] = top[i][l] > max[i] || top[i][l] != top[i][l] ? top[i][l] : max[i];
      const int64_t target = p.target[row0 + r0 + i];
      ignored[i] = target == p.ignore_index;
      z_target[i] = ignored[i] ? T(0) : run_of(target / kCols, r0 + i, rows)[target % kCols];
    }
    for_logits(r0, r1, rows, [&](int64_t i, T* z, int there) {
      const V v = load(z), e = first_n(exp_(v - max[i]), there, V{});
      sum[i] += e;
      total[i] += first_n(v, there, V{});
      if (gradient) store(z, e);
    });
    for (int64_t i = 0; i < r1 - r0; ++i) {
      const int64_t n = row0 + r0 + i;
      const T exp_sum = sum_lanes<T>(sum[i]), lse = max[i] + std::log(exp_sum);
      T loss = lse - (1 - smooth) * z_target[i];
      if (smooth != 0) loss -= smooth * sum_lanes<T>(total[i]) / static_cast<T>(p.V);
      static_cast<T*>(p.loss)[n] = ignored[i] ? T(0) : loss;
      if (!gradient) continue;
      const T upstream = static_cast<const T*>(p.row_gradient)[n];
      scale[i] = upstream / exp_sum;
      shift[i] = upstream * smooth / static_cast<T>(p.V);
    }
    if (!gradient) return;
    for_logits(r0, r1, rows, [&](int64_t i, T* z, int there) {
      store(z, ignored[i] ? V{} : first_n(load(z) * scale[i] - shift[i], there, V{}));
    });
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t target = p.target[row0 + r];
      if (target == p.ignore_index) continue;
      run_of(target / kCols, r, rows)[target % kCols] -=
          static_cast<const T*>(p.row_gradient)[row0 + r] * (1 - smooth);
    }
  }

  // dh = dlogits @ W
  void hidden_gradient(int64_t row0, int64_t rows) {
    gemm<Tile>(
        rows, p.V, ceil_div(p.E, kCols), w_backward.get(), parallel,
        [&](Packed* a, int64_t r0, int n_rows, int64_t k0, int64_t kc) {
          pack_a_rows<Tile>(a, r0, n_rows, k0, kc, [&](int64_t r, int64_t k, int64_t n, Element* out) {
            for (int64_t j = 0; j < n;) {  // a row of logits lies in runs of kCols
              const int64_t in_run = kCols - (k + j) % kCols, run = n - j < in_run ? n - j : in_run;
              store_row(Tile::kElement, out, j, run, run_of((k + j) / kCols, r, rows) + (k + j) % kCols);
              j += run;
            }
          });
        },
        [&](int64_t r0, int n_rows, int64_t panel, const T* tile) {
          const int64_t col = panel * kCols, n = p.E - col < kCols ? p.E - col : kCols;
          for (int r = 0; r < n_rows; ++r)
            store_row(p.h.dtype, p.dh, (row0 + r0 + r) * p.E + col, n, tile + r * kCols);
        });
  }

  // dW^T += h^T @ dlogits, and db += column sums of dlogits. Transposed, because then the wide operand is
  // already packed.
  void weight_gradient(int64_t row0, int64_t rows) {
    const Packed* dlogits = pack_dlogits(rows);
    gemm<Tile>(
        p.E, rows, panels, dlogits, parallel,
        [&](Packed* a, int64_t e0, int n_e, int64_t k0, int64_t kc) {
          pack_a_columns<Tile>(a, e0, n_e, k0, kc, [&](int64_t r, int64_t e, int64_t n, Element* out) {
            if (p.target[row0 + r] == p.ignore_index) return no_elements<Tile>(n, out);
            load_elements<Tile>(p.h.dtype, p.h.row(row0 + r), e, n, out);
          });
        },
        [&](int64_t e0, int n_e, int64_t panel, const T* tile) {
          T* sum = dw + (panel * p.E + e0) * kCols;
          for (int64_t j = 0; j < static_cast<int64_t>(n_e) * kCols; j += L)
            store(sum + j, load(sum + j) + load(tile + j));
        });
  }
  const Packed* pack_dlogits(int64_t rows) {
    parallel(panels, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        T* sum = db + panel * kCols;
        for (int64_t r = 0; r < rows; ++r)
          for (int j = 0; j < kCols; j += L) store(sum + j, load(sum + j) + load(run_of(panel, r, rows) + j));
        if constexpr (!kPlain)
          pack_b_rows<Tile>(packed + panel * panel_elements<Tile>(rows), rows, kCols,
                            [&](int64_t r, Element* out) {
                              store_row(Tile::kElement, out, 0, kCols, run_of(panel, r, rows));
                            });
      }
    });
    if constexpr (kPlain) {
      return logits;
    } else {
      return packed;
    }
  }

  void store_weight_gradient() {
    parallel(panels, [&](int64_t begin, int64_t end) {
      Scratch<T> line(p.E);
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t c = 0; c < width(panel); ++c) {
          for (int64_t e = 0; e < p.E; ++e) line[e] = dw[(panel * p.E + e) * kCols + c];
          store_row(p.weight.dtype, p.dweight, (panel * kCols + c) * p.E, p.E, line.get());
        }
        if (p.dbias != nullptr)
          store_row(p.weight.dtype, p.dbias, panel * kCols, width(panel), db + panel * kCols);
      }
    });
  }

  const LinearCrossEntropy& p;
  const Parallel& parallel;
  const int64_t panels;
  const bool gradient;
  const int64_t chunk;
  Scratch<Packed> w_forward, w_backward;  // (V, E) packed for h @ W^T and for dlogits @ W
  Scratch<T> logits;
  Scratch<Packed> packed;   // dlogits as the packed operand, where it is not the logits themselves
  Scratch<T> dw, bias, db;  // dw: [panel][E][kCols], summed over chunks
};

template <class Tile>
void linear_cross_entropy(const LinearCrossEntropy& args, const Parallel& parallel) {
  LinearCrossEntropyPass<Tile>(args, parallel).run();
}

ULMFIT_END
