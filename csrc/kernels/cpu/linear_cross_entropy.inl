// Linear layer + cross-entropy over a vocabulary, a chunk of rows at a time: logits are never whole in
// memory.
//
// Logits lie in panels, [panel][row][kCols]: that is what the product writes and, for the FMA tile, what the
// packed operand of dW = dlogits^T @ h looks like. Three passes see them, a slice of rows at a time, which
// stays in L3: the product with its row maxima, the exponentials with their sums, and one that makes the
// gradient and packs it for both products that follow. Those take a chunk of several slices, because dW,
// which is summed in fp32, is read and written for each.
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
  static constexpr bool kPlain = std::is_same_v<T, Packed>;  // a panel of logits is a packed panel
  static constexpr int64_t kBundle = 16;                     // rows whose softmax is computed together
  // Rows of a slice (15 MB of logits over 30,000 words) and of a chunk.
  static constexpr int64_t kSliceRows = 128, kChunkRows = 4 * kSliceRows;
  static_assert(kSliceRows % Tile::kDepth == 0, "a slice begins where a square of packed rows does");

 public:
  LinearCrossEntropyPass(const LinearCrossEntropy& args, const Parallel& parallel)
      : p(args),
        parallel(parallel),
        panels(ceil_div(p.V, kCols)),
        gradient(p.row_gradient != nullptr),
        chunk(p.N < kChunkRows ? p.N : kChunkRows),
        slice(p.N < kSliceRows ? p.N : kSliceRows),
        w_forward(panels * panel_elements<Tile>(p.E)),
        w_backward(gradient ? ceil_div(p.E, kCols) * panel_elements<Tile>(p.V) : 0),
        logits(panels * (kPlain ? chunk : slice) * kCols),
        dlogits_rows(gradient && !kPlain ? Tile::a_elements(chunk, panels * kCols) : 0),
        dlogits_panels(gradient && !kPlain ? panels * panel_elements<Tile>(chunk) : 0),
        top(panels * slice * L),
        scale(slice),
        shift(slice),
        dw(gradient ? panels * p.E * kCols : 0),
        bias(panels * kCols),
        db(gradient ? panels * kCols : 0) {}

  void run() {
    pack_weights();
    for (int64_t row0 = 0; row0 < p.N; row0 += chunk) {
      const int64_t rows = p.N - row0 < chunk ? p.N - row0 : chunk;
      for (int64_t r0 = 0; r0 < rows; r0 += slice) {
        const Slice now{row0 + r0, r0, rows - r0 < slice ? rows - r0 : slice, rows};
        forward(now);
        if (!gradient) continue;
        parallel(panels, [&](int64_t begin, int64_t end) {
          for (int64_t panel = begin; panel < end; ++panel) logit_gradient(now, panel);
        });
      }
      if (!gradient) continue;
      hidden_gradient(row0, rows);
      weight_gradient(row0, rows);
    }
    if (gradient) store_weight_gradient();
  }

 private:
  struct Slice {
    int64_t first, in_chunk;  // its first row, counted in all and in its chunk
    int64_t rows, chunk_rows;
  };
  T* run_of(int64_t panel, int64_t row, const Slice& now) const {
    if constexpr (kPlain) return logits + (panel * now.chunk_rows + now.in_chunk + row) * kCols;
    return logits + (panel * slice + row) * kCols;
  }
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

  void forward(const Slice& now) {
    gemm<Tile>(
        now.rows, p.E, panels, w_forward.get(), parallel,
        [&](Packed* a, int64_t r0, int n_rows, int64_t k0, int64_t kc) {
          pack_a_rows<Tile>(a, now.first + r0, n_rows, k0, kc,
                            [&](int64_t r, int64_t k, int64_t n, Element* out) {
                              load_elements<Tile>(p.h.dtype, p.h.row(r), k, n, out);
                            });
        },
        [&](int64_t r0, int n_rows, int64_t panel, const T* tile) {
          const int there = static_cast<int>(width(panel));
          for (int r = 0; r < n_rows; ++r) {
            V max = broadcast(-std::numeric_limits<T>::infinity());
            for (int j = 0; j < there; j += L)
              max = larger(max, first_n(logit(tile + r * kCols, panel, j), there - j, max));
            store(top + (panel * slice + r0 + r) * L, max);
          }
        },
        [&](int64_t r0, int64_t panel) { return run_of(panel, r0, now); });
    parallel(ceil_div(now.rows, kBundle), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        softmax(now, i * kBundle, (i + 1) * kBundle < now.rows ? (i + 1) * kBundle : now.rows);
    });
  }
  V logit(const T* run, int64_t panel, int j) const { return load(run + j) + load(bias + panel * kCols + j); }
  static V larger(V a, V b) {  // a NaN stays
    const V max = b > a ? b : a;
    return a != a ? a : b != b ? b : max;
  }

  // loss = (1 - e)(lse - z_target) + e (lse - mean z), e = label_smoothing. exp(z - max) replaces the logits,
  // and scale and shift are what makes the gradient of them. Rows r0..r1 together, panel by panel:
  // neighbouring rows' runs lie side by side, and a row's own runs are pages apart.
  void softmax(const Slice& now, int64_t r0, int64_t r1) const {
    V maxima[kBundle], sum[kBundle] = {}, total[kBundle] = {};
    T max[kBundle], z_target[kBundle];
    const T smooth = static_cast<T>(p.label_smoothing);
    for (V& v : maxima) v = broadcast(-std::numeric_limits<T>::infinity());
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t r = r0; r < r1; ++r)
        maxima[r - r0] = larger(maxima[r - r0], load(top + (panel * slice + r) * L));
    for (int64_t i = 0; i < r1 - r0; ++i) {
      max[i] = maxima[i][0];
      for (int l = 1; l < L; ++l)
        max[i] = maxima[i][l] > max[i] || maxima[i][l] != maxima[i][l] ? maxima[i][l] : max[i];
      const int64_t target = p.target[now.first + r0 + i];
      z_target[i] = ignored(now.first + r0 + i)
                        ? T(0)
                        : run_of(target / kCols, r0 + i, now)[target % kCols] + bias[target];
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int there = static_cast<int>(width(panel));
      for (int64_t r = r0; r < r1; ++r)
        for (int j = 0; j < there; j += L) {
          T* z = run_of(panel, r, now) + j;
          const V v = logit(z - j, panel, j), e = first_n(exp_(v - max[r - r0]), there - j, V{});
          sum[r - r0] += e;
          if (smooth != 0) total[r - r0] += first_n(v, there - j, V{});
          if (gradient) store(z, e);
        }
    }
    for (int64_t i = 0; i < r1 - r0; ++i) {
      const int64_t n = now.first + r0 + i;
      const T exp_sum = sum_lanes<T>(sum[i]), lse = max[i] + std::log(exp_sum);
      T loss = lse - (1 - smooth) * z_target[i];
      if (smooth != 0) loss -= smooth * sum_lanes<T>(total[i]) / static_cast<T>(p.V);
      static_cast<T*>(p.loss)[n] = ignored(n) ? T(0) : loss;
      if (!gradient) continue;
      const T upstream = static_cast<const T*>(p.row_gradient)[n];
      scale[r0 + i] = upstream / exp_sum;
      shift[r0 + i] = upstream * smooth / static_cast<T>(p.V);
    }
  }
  bool ignored(int64_t row) const { return p.target[row] == p.ignore_index; }

  // A panel's exponentials become upstream * (softmax - (1 - e) onehot - e / V), zeros in ignored rows,
  // packed for dlogits @ W and for dlogits^T @ h.
  void logit_gradient(const Slice& now, int64_t panel) const {
    constexpr int kRuns = kCols / L;
    alignas(64) T gradients[Tile::kDepth * kCols];
    alignas(64) Element elements[Tile::kDepth * kCols];
    const int there = static_cast<int>(width(panel));
    const int64_t first = panel * kCols;
    const T target_share = 1 - static_cast<T>(p.label_smoothing);
    V sums[kRuns] = {};  // of a slice: added up in two levels, db keeps its low bits
    for (int64_t r0 = 0; r0 < now.rows; r0 += Tile::kDepth) {
      const int count = static_cast<int>(now.rows - r0 < Tile::kDepth ? now.rows - r0 : Tile::kDepth);
      for (int i = 0; i < count; ++i) {
        const int64_t r = r0 + i, target = p.target[now.first + r];
        T* out = gradients + i * kCols;
        if (target == p.ignore_index) {
          std::memset(out, 0, kCols * sizeof(T));
          continue;
        }
        const T* e = run_of(panel, r, now);
        for (int j = 0; j < kCols; j += L) store(out + j, load(e + j) * scale[r] - shift[r]);
        for (int j = there; j < kCols; ++j) out[j] = 0;
        if (target >= first && target < first + kCols)
          out[target - first] -= static_cast<const T*>(p.row_gradient)[now.first + r] * target_share;
        for (int j = 0; j < kRuns; ++j) sums[j] += load(out + j * L);
      }
      std::memset(gradients + count * kCols, 0, (Tile::kDepth - count) * kCols * sizeof(T));
      if constexpr (kPlain) {
        std::memcpy(run_of(panel, r0, now), gradients, sizeof gradients);
      } else {
        store_row(Tile::kElement, elements, 0, Tile::kDepth * kCols, gradients);
        for (int i = 0; i < count; ++i)
          Tile::store_a(dlogits_rows, panels * kCols, now.in_chunk + r0 + i, first, elements + i * kCols,
                        kCols);
        Tile::store_b_rows(dlogits_panels + panel * panel_elements<Tile>(now.chunk_rows), now.in_chunk + r0,
                           elements);
      }
    }
    for (int j = 0; j < kRuns; ++j) store(db + first + j * L, load(db + first + j * L) + sums[j]);
  }

  // dh = dlogits @ W
  void hidden_gradient(int64_t row0, int64_t rows) {
    const auto store_rows = [&](int64_t r0, int n_rows, int64_t panel, const T* tile) {
      const int64_t col = panel * kCols, n = p.E - col < kCols ? p.E - col : kCols;
      for (int r = 0; r < n_rows; ++r)
        store_row(p.h.dtype, p.dh, (row0 + r0 + r) * p.E + col, n, tile + r * kCols);
    };
    const int64_t e_panels = ceil_div(p.E, kCols);
    if constexpr (!kPlain) {
      gemm<Tile>(rows, p.V, e_panels, w_backward.get(), parallel,
                 PackedRows<Tile>{dlogits_rows, panels * kCols}, store_rows);
    } else {
      gemm<Tile>(
          rows, p.V, e_panels, w_backward.get(), parallel,
          [&](Packed* a, int64_t r0, int n_rows, int64_t k0, int64_t kc) {
            pack_a_rows<Tile>(a, r0, n_rows, k0, kc, [&](int64_t r, int64_t k, int64_t n, Element* out) {
              for (int64_t j = 0; j < n;) {  // a row of logits lies in runs of kCols
                const int64_t in_run = kCols - (k + j) % kCols, run = n - j < in_run ? n - j : in_run;
                std::memcpy(out + j, logits + ((k + j) / kCols * rows + r) * kCols + (k + j) % kCols,
                            run * sizeof(T));
                j += run;
              }
            });
          },
          store_rows);
    }
  }

  // dW^T += h^T @ dlogits. Transposed, because then the wide operand is the packed one.
  void weight_gradient(int64_t row0, int64_t rows) {
    const Packed* dlogits;
    if constexpr (kPlain) {
      dlogits = logits;
    } else {
      dlogits = dlogits_panels;
    }
    gemm<Tile>(
        p.E, rows, panels, dlogits, parallel,
        [&](Packed* a, int64_t e0, int n_e, int64_t k0, int64_t kc) {
          pack_a_columns<Tile>(a, e0, n_e, k0, kc, [&](int64_t r, int64_t e, int64_t n, Element* out) {
            if (ignored(row0 + r)) return no_elements<Tile>(n, out);
            load_elements<Tile>(p.h.dtype, p.h.row(row0 + r), e, n, out);
          });
        },
        [](int64_t, int, int64_t, const T*) {},
        [&](int64_t e0, int64_t panel) { return dw + (panel * p.E + e0) * kCols; }, true);
  }

  void store_weight_gradient() {
    parallel(panels, [&](int64_t begin, int64_t end) {
      Scratch<T> lines(kCols * p.E);
      for (int64_t panel = begin; panel < end; ++panel) {
        transpose(dw + panel * p.E * kCols, kCols, p.E, width(panel), lines.get(), p.E);
        store_row(p.weight.dtype, p.dweight, panel * kCols * p.E, width(panel) * p.E, lines.get());
        if (p.dbias != nullptr)
          store_row(p.weight.dtype, p.dbias, panel * kCols, width(panel), db + panel * kCols);
      }
    });
  }

  const LinearCrossEntropy& p;
  const Parallel& parallel;
  const int64_t panels;
  const bool gradient;
  const int64_t chunk, slice;             // rows
  Scratch<Packed> w_forward, w_backward;  // (V, E) packed for h @ W^T and for dlogits @ W
  Scratch<T> logits;
  Scratch<Packed> dlogits_rows, dlogits_panels;  // a chunk, packed as A and as B, where logits are neither
  Scratch<T> top, scale, shift;  // of a slice: each panel's row maxima, and the gradient's two factors
  Scratch<T> dw, bias, db;       // dw: [panel][E][kCols], summed over chunks
};

template <class Tile>
void linear_cross_entropy(const LinearCrossEntropy& args, const Parallel& parallel) {
  LinearCrossEntropyPass<Tile>(args, parallel).run();
}

ULMFIT_END
