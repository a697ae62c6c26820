// Linear layer + cross-entropy over a vocabulary, a chunk of rows at a time: logits are never whole in
// memory.
//
// A tile of the product h @ W^T becomes exp(logit - reference) while it is in L1, in the type that the next
// products take. The reference is the row's largest logit among the first panel's words: any near the largest
// will do. A second pass, panel by panel, makes the gradient of a chunk's exponentials, in place, and
// multiplies it into dW at once, while the panel is in L2. dW is summed in fp32, read and written once a
// chunk, which is why a chunk has many rows. Exponentials lie as the next product wants them: for the FMA
// tile in panels, [panel][row][kCols], the packed operand of dW = dlogits^T @ h, for the others in rows,
// packed as that of dh = dlogits @ W.
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
  static constexpr bool kPlain = Tile::kPlain;  // a panel of logits is a packed panel
  static constexpr int64_t kChunkRows = 512;
  // A logit so far above its row's reference makes the chunk begin again with exact maxima: exp of it, a
  // whole vocabulary of times, still fits.
  static constexpr T kFar = std::is_same_v<T, double> ? T(600) : T(60);

 public:
  LinearCrossEntropyPass(const LinearCrossEntropy& args, const Parallel& parallel)
      : p(args),
        parallel(parallel),
        panels(ceil_div(p.V, kCols)),
        gradient(p.row_gradient != nullptr),
        smoothing(p.label_smoothing != 0),
        chunk(p.N < kChunkRows ? p.N : kChunkRows),
        stride(round_up(chunk, L)),
        depth(panels * kCols),
        w_forward(panels * panel_elements<Tile>(p.E)),
        w_backward(gradient ? ceil_div(p.E, kCols) * panel_elements<Tile>(p.V) : 0),
        h_columns(gradient ? Tile::a_elements(round_up(p.E, Tile::kRows), padded_depth<Tile>(chunk)) : 0),
        exponents(!gradient ? 0
                  : kPlain  ? panels * chunk * kCols
                            : Tile::a_elements(chunk, depth)),
        sums(panels * stride),
        totals(smoothing ? panels * stride : 0),
        reference(stride),
        z_target(stride),
        scale(stride),
        shift(stride),
        dw(gradient ? panels * p.E * kCols : 0),
        bias(panels * kCols),
        db(gradient ? panels * kCols : 0) {}

  void run() {
    pack_weights();
    for (int64_t first = 0; first < p.N; first += chunk) {
      const Chunk now{first, p.N - first < chunk ? p.N - first : chunk};
      forward(now);
      if (!gradient) continue;
      pack_columns(now);
      parallel(panels, [&](int64_t begin, int64_t end) {
        [[maybe_unused]] typename Tile::Session session;
        Scratch<Packed> scratch(kPlain ? 0 : panel_elements<Tile>(now.rows));
        for (int64_t panel = begin; panel < end; ++panel) weight_gradient(now, panel, scratch);
      });
      hidden_gradient(now);
    }
    if (gradient) store_weight_gradient();
  }

 private:
  struct Chunk {
    int64_t first, rows;
  };
  int64_t width(int64_t panel) const { return p.V - panel * kCols < kCols ? p.V - panel * kCols : kCols; }
  // Where the FMA tile has a row's piece of a panel.
  Packed* run_of(int64_t panel, int64_t row, const Chunk& now) const {
    return exponents + (panel * now.rows + row) * kCols;
  }

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
    pack_b_rows<Tile>(w_backward.get(), p.V, p.E, parallel,
                      [&](int64_t k, int64_t col, int64_t n, Element* out) {
                        load_elements<Tile>(p.weight.dtype, p.weight.row(k), col, n, out);
                      });
  }

  // The product h @ W^T over the first `n` panels; store(row, rows, panel, tile) takes its tiles.
  template <class Store>
  void multiply(const Chunk& now, int64_t n, Store&& store_tile) {
    gemm<Tile>(
        now.rows, p.E, n, w_forward.get(), parallel,
        [&](Packed* a, int64_t r0, int n_rows, int64_t k0, int64_t kc) {
          pack_a_rows<Tile>(a, now.first + r0, n_rows, k0, kc,
                            [&](int64_t r, int64_t k, int64_t n, Element* out) {
                              load_elements<Tile>(p.h.dtype, p.h.row(r), k, n, out);
                            });
        },
        store_tile);
  }

  void forward(const Chunk& now) {
    find_reference(now, 1);
    std::atomic<bool> far{false};
    const auto make = [&](int64_t r0, int n_rows, int64_t panel, const T* tile) {
      if (exponentials(now, r0, n_rows, panel, tile)) far.store(true, std::memory_order_relaxed);
    };
    multiply(now, panels, make);
    if (far.load()) find_reference(now, panels), multiply(now, panels, make);
    parallel(ceil_div(now.rows, L), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish_rows(now, i * L);
    });
  }

  // reference[row] = the largest logit of the first n panels.
  void find_reference(const Chunk& now, int64_t n) {
    multiply(now, n, [&](int64_t r0, int n_rows, int64_t panel, const T* tile) {
      const int there = static_cast<int>(width(panel));
      for (int r = 0; r < n_rows; ++r) {
        T max = -std::numeric_limits<T>::infinity();
        for (int j = 0; j < there; ++j) {
          const T z = tile[r * kCols + j] + bias[panel * kCols + j];
          max = z > max ? z : max;
        }
        sums[panel * stride + r0 + r] = max;
      }
    });
    for (int64_t r = 0; r < now.rows; ++r) {
      T max = sums[r];
      for (int64_t panel = 1; panel < n; ++panel)
        max = sums[panel * stride + r] > max ? sums[panel * stride + r] : max;
      reference[r] = std::isfinite(max) ? max : T(0);
    }
  }

  // A tile's logits become exp(logit - reference), with the sum of each row's; true where one is too far off.
  bool exponentials(const Chunk& now, int64_t r0, int n_rows, int64_t panel, const T* tile) const {
    constexpr int kRuns = kCols / L;
    const int there = static_cast<int>(width(panel));
    const int64_t first = panel * kCols;
    V b[kRuns], highest = broadcast(T(0));
    for (int j = 0; j < kRuns; ++j) b[j] = load(bias + first + j * L);
    for (int r = 0; r < n_rows; r += L) {
      const int count = n_rows - r < L ? n_rows - r : L;
      V row_sums[L] = {}, row_totals[L] = {};
      for (int i = 0; i < count; ++i) {
        const int64_t row = r0 + r + i, target = p.target[now.first + row] - first;
        const T* z = tile + (r + i) * kCols;
        const V from = broadcast(reference[row]);
        for (int j = 0; j < kRuns; ++j) {
          const V logit = load(z + j * L) + b[j], above = first_n(logit - from, there - j * L, V{});
          const V e = first_n(exp_(above), there - j * L, V{});
          highest = above > highest ? above : highest;
          row_sums[i] += e;
          if (gradient) store_exponential(now, panel, row, j * L, e);
          if (smoothing) row_totals[i] += first_n(logit, there - j * L, V{});
        }
        if (target >= 0 && target < there) z_target[row] = z[target] + bias[first + target];
      }
      store_n(sums + panel * stride + r0 + r, sum_of_each(row_sums), count);
      if (smoothing) store_n(totals + panel * stride + r0 + r, sum_of_each(row_totals), count);
    }
    bool far = false;
    for (int l = 0; l < L; ++l) far |= highest[l] > kFar;
    return far;
  }

  // loss = (1 - e)(lse - z_target) + e (lse - mean z), e = label_smoothing; scale and shift are what makes
  // the gradient of the exponentials. L rows from r0 on, together.
  void finish_rows(const Chunk& now, int64_t r0) const {
    const auto over_panels = [&](const T* parts) {
      V sum{}, part{};  // two levels again: an error here is one of the whole row
      for (int64_t panel = 0; panel < panels; ++panel) {
        part += load(parts + panel * stride + r0);
        if (panel % 32 == 31) sum += part, part = V{};
      }
      return sum + part;
    };
    const V sum = over_panels(sums), total = smoothing ? over_panels(totals) : V{};
    const T smooth = static_cast<T>(p.label_smoothing);
    for (int64_t r = r0; r < r0 + L && r < now.rows; ++r) {
      const int64_t n = now.first + r;
      const T exp_sum = sum[r - r0], lse = reference[r] + std::log(exp_sum);
      T loss = lse - (1 - smooth) * z_target[r];
      if (smoothing) loss -= smooth * total[r - r0] / static_cast<T>(p.V);
      static_cast<T*>(p.loss)[n] = ignored(n) ? T(0) : loss;
      if (!gradient) continue;
      const T upstream = static_cast<const T*>(p.row_gradient)[n];
      scale[r] = upstream / exp_sum;
      shift[r] = upstream * smooth / static_cast<T>(p.V);
    }
  }
  bool ignored(int64_t row) const { return p.target[row] == p.ignore_index; }

  void store_exponential(const Chunk& now, int64_t panel, int64_t row, int column, V e) const {
    if constexpr (kPlain) {
      store(run_of(panel, row, now) + column, e);
    } else {
      Tile::store_a_vector(exponents, depth, row, panel * kCols + column, e, L);
    }
  }

  // h^T, as the operand of dW; zeros in ignored rows, whose gradient is none whatever h is.
  void pack_columns(const Chunk& now) {
    constexpr int64_t kBlock = 64;  // a multiple of every tile's kRowGroup
    parallel(ceil_div(p.E, kBlock), [&](int64_t begin, int64_t end) {
      for (int64_t e0 = begin * kBlock; e0 < end * kBlock && e0 < p.E; e0 += kBlock) {
        const int n_e = static_cast<int>(p.E - e0 < kBlock ? p.E - e0 : kBlock);
        pack_a_columns<Tile>(h_columns + Tile::a_elements(e0, padded_depth<Tile>(now.rows)), e0, n_e, 0,
                             now.rows, [&](int64_t r, int64_t e, int64_t n, Element* out) {
                               if (ignored(now.first + r)) return no_elements<Tile>(n, out);
                               load_elements<Tile>(p.h.dtype, p.h.row(now.first + r), e, n, out);
                             });
      }
    });
  }

  // A panel's exponentials become upstream * (softmax - (1 - e) onehot - e / V), zeros in ignored rows, and
  // with them dW^T += h^T @ dlogits. Transposed, because then the wide operand is the packed one.
  void weight_gradient(const Chunk& now, int64_t panel, Packed* scratch) const {
    constexpr int kRuns = kCols / L;
    alignas(64) T gradients[Tile::kDepth * kCols];
    alignas(64) Element elements[Tile::kDepth * kCols];
    const int there = static_cast<int>(width(panel));
    const int64_t first = panel * kCols;
    const T target_share = 1 - static_cast<T>(p.label_smoothing);
    Packed* packed = kPlain ? run_of(panel, 0, now) : scratch;
    V column_sums[kRuns] = {};  // of up to 128 rows: added up in two levels, db keeps its low bits
    const auto keep_sums = [&] {
      for (int j = 0; j < kCols; j += L) store(db + first + j, load(db + first + j) + column_sums[j / L]);
      std::memset(column_sums, 0, sizeof column_sums);
    };
    for (int64_t r0 = 0; r0 < now.rows; r0 += Tile::kDepth) {
      if (r0 % 128 == 0) keep_sums();
      const int count = static_cast<int>(now.rows - r0 < Tile::kDepth ? now.rows - r0 : Tile::kDepth);
      for (int i = 0; i < count; ++i) {
        const int64_t r = r0 + i, target = p.target[now.first + r];
        T* out = gradients + i * kCols;
        if (target == p.ignore_index) {
          std::memset(out, 0, kCols * sizeof(T));
          continue;
        }
        const Element* e = elements;
        if constexpr (kPlain) {
          e = run_of(panel, r, now);
        } else {
          Tile::load_a(exponents, depth, r, first, kCols, elements);
        }
        for (int j = 0; j < kCols; j += L)
          store(out + j, load_as<T>(Tile::kElement, e, j, L) * scale[r] - shift[r]);
        for (int j = there; j < kCols; ++j) out[j] = 0;
        if (target >= first && target < first + kCols)
          out[target - first] -= static_cast<const T*>(p.row_gradient)[now.first + r] * target_share;
        for (int j = 0; j < kRuns; ++j) column_sums[j] += load(out + j * L);
      }
      std::memset(gradients + count * kCols, 0, (Tile::kDepth - count) * kCols * sizeof(T));
      store_row(Tile::kElement, elements, 0, Tile::kDepth * kCols, gradients);
      if constexpr (!kPlain) {
        for (int i = 0; i < count; ++i)
          Tile::store_a(exponents, depth, r0 + i, first, elements + i * kCols, kCols);
      }
      Tile::store_b_rows(packed, r0, elements);
    }
    keep_sums();
    panel_product<Tile>(padded_depth<Tile>(now.rows), h_columns, static_cast<int>(p.E), packed, 1, packed,
                        dw + panel * p.E * kCols, true);
  }

  // dh = dlogits @ W
  void hidden_gradient(const Chunk& now) {
    const auto store_rows = [&](int64_t r0, int n_rows, int64_t panel, const T* tile) {
      const int64_t col = panel * kCols, n = p.E - col < kCols ? p.E - col : kCols;
      for (int r = 0; r < n_rows; ++r)
        store_row(p.h.dtype, p.dh, (now.first + r0 + r) * p.E + col, n, tile + r * kCols);
    };
    const int64_t e_panels = ceil_div(p.E, kCols);
    if constexpr (!kPlain) {
      gemm<Tile>(now.rows, p.V, e_panels, w_backward.get(), parallel, PackedRows<Tile>{exponents, depth},
                 store_rows);
    } else {
      gemm<Tile>(
          now.rows, p.V, e_panels, w_backward.get(), parallel,
          [&](Packed* a, int64_t r0, int n_rows, int64_t k0, int64_t kc) {
            pack_a_rows<Tile>(a, r0, n_rows, k0, kc, [&](int64_t r, int64_t k, int64_t n, Element* out) {
              load_from_panels<Tile>(exponents, now.rows, r, k, n, out);
            });
          },
          store_rows);
    }
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
  const bool gradient, smoothing;
  const int64_t chunk, stride, depth;     // rows, and in whole vectors; columns in whole panels
  Scratch<Packed> w_forward, w_backward;  // (V, E) packed for h @ W^T and for dlogits @ W
  Scratch<Packed> h_columns, exponents;   // of a chunk: h^T packed, and what becomes the logits' gradient
  Scratch<T> sums, totals;                // [panel][row] of a chunk: of exponentials, of logits
  Scratch<T> reference, z_target, scale, shift;  // of a chunk's rows; the last two make the gradient
  Scratch<T> dw, bias, db;                       // dw: [panel][E][kCols], summed over chunks
};

template <class Tile>
void linear_cross_entropy(const LinearCrossEntropy& args, const Parallel& parallel) {
  LinearCrossEntropyPass<Tile>(args, parallel).run();
}

ULMFIT_END
