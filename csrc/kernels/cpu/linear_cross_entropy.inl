// Linear layer + cross-entropy over a vocabulary, a chunk of rows at a time: logits are never whole in
// memory, and no pass over them makes their gradient.
//
// With e = exp(logit - reference), s = sum e, g a row's upstream gradient and a the label smoothing, the
// gradient of a row's logits is
//     g / s * (e - (1 - a) s onehot(target)) - g a / V
// so the products can take e itself: dh is scaled by g / s after, h before that of dW; the target is one word
// a row, apart, and smoothing the same vector for all words. A tile of the product h @ W^T becomes e
// while it is in L1, written as both products want it: as A, for dh += e @ W while a few panels' e are in L2,
// and as B, kept for the whole chunk, for dW^T += (g / s h)^T @ e. dW is summed in fp32, read and written
// once a chunk, which is why a chunk has many rows. The reference is the row's largest logit among the first
// panel's words: any near the largest will do.
#pragma once
#include "linear_cross_entropy_few.inl"
#include "linear_cross_entropy_weight.inl"

ULMFIT_BEGIN

template <class Tile>
class LinearCrossEntropyPass {
  using T = typename Tile::Compute;
  using Packed = typename Tile::Packed;
  using Element = typename Tile::Element;
  using V = Vec<T>;
  static constexpr int L = lanes_of<T>;
  static constexpr int kCols = Tile::kCols;
  static constexpr int64_t kChunkRows = 512;
  // An item's rows are whole micro-kernels, and whole depths of the product for dW. kGroup panels of e are
  // collected before dh += e @ W: with this many rows and panels e, 256 KB, and dh, 256 x 448 floats, stay in
  // L2 beside the panels that pass.
  static constexpr int64_t kUnit = Tile::kRows > Tile::kDepth ? Tile::kRows : Tile::kDepth, kGroup = 8;
  static constexpr int64_t kItemRows = round_up(512 / static_cast<int64_t>(sizeof(Element)), kUnit);
  // A row's dh is summed in slices of the vocabulary, each one item, whatever the number of threads.
  static constexpr int64_t kSlice = 16 * kGroup;
  // A logit so far above its row's reference makes the chunk begin again with exact maxima: e, summed over a
  // vocabulary, and h times g over that sum still fit their types.
  static constexpr T kFar = std::is_same_v<T, double> ? T(300) : T(30);

 public:
  LinearCrossEntropyPass(const LinearCrossEntropy& args, const Parallel& parallel)
      : p(args),
        parallel(parallel),
        panels(ceil_div(p.V, kCols)),
        e_panels(ceil_div(p.E, kCols)),
        slices(ceil_div(panels, kSlice)),
        gradient(p.gradient),
        weight_gradient(p.weight_gradient),
        smoothing(p.label_smoothing != 0),
        chunk(chunk_rows(p.N)),
        stride(round_up(chunk, L)),
        w_forward(panels * panel_elements<Tile>(p.E)),
        w_backward(gradient ? e_panels * panel_elements<Tile>(p.V) : 0),
        exponents(weight_gradient ? panels * panel_elements<Tile>(chunk) : 0),
        dh(gradient ? slices * chunk * e_panels * kCols : 0),
        sums(panels * stride),
        totals(smoothing ? panels * stride : 0),
        reference(stride),
        z_target(stride),
        scale(stride),
        target_scale(stride),
        dweight(p, parallel, panels, chunk),
        bias(panels * kCols),
        w_sum(smoothing ? p.E : 0) {}

  void run() {
    pack_weights();
    for (int64_t first = 0; first < p.N; first += chunk) {
      Chunk now{first, p.N - first < chunk ? p.N - first : chunk, 0};
      const int64_t blocks = even_blocks(now.rows, kItemRows, kUnit, slices, parallel.threads);
      now.block = round_up(ceil_div(now.rows, blocks), kUnit);
      find_reference(now, 1);
      if (forward(now)) find_reference(now, panels), forward(now);
      parallel(ceil_div(now.rows, L), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) finish_rows(now, i * L);
      });
      if (weight_gradient) dweight.add(now.first, now.rows, exponents, scale, target_scale);
    }
    if (!weight_gradient) return;
    w_forward.release(), w_backward.release(), exponents.release();
    dweight.store(p.new_dweight(p.results));
  }

 private:
  struct Chunk {
    int64_t first, rows, block;  // rows of an item
  };
  // Even chunks of items of whole units.
  static int64_t chunk_rows(int64_t N) {
    if (N <= kItemRows) return N;
    return round_up(ceil_div(N, ceil_div(N, kChunkRows)), 4 * kUnit);
  }
  int width(int64_t panel) const { return columns_there<Tile>(p.V, panel); }
  bool ignored(int64_t row) const { return p.target[row] == p.ignore_index; }
  T upstream(int64_t row) const { return static_cast<const T*>(p.row_gradient)[row]; }
  T target_share() const { return 1 - static_cast<T>(p.label_smoothing); }
  Packed* exponents_of(int64_t panel, const Chunk& now) const {
    return exponents + panel * panel_elements<Tile>(now.rows);
  }

  void pack_weights() {
    parallel(panels, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        pack_b_matrix<Tile>(p.weight, w_forward + panel * panel_elements<Tile>(p.E), p.E, panel * kCols,
                            width(panel));
        T* b = bias + panel * kCols;
        std::memset(b, 0, kCols * sizeof(T));
        if (p.bias != nullptr) load_row(p.weight.dtype, p.bias, panel * kCols, width(panel), b);
      }
    });
    if (!gradient) return;
    pack_b_rows<Tile>(w_backward.get(), p.V, p.E, parallel,
                      [&](int64_t k, int64_t col, int64_t n, Element* out) {
                        load_elements<Tile>(p.weight.dtype, p.weight.row(k), col, n, out);
                      });
    if (!smoothing) return;
    parallel(ceil_div(p.E, kCols), [&](int64_t begin, int64_t end) {
      for (int64_t e = begin * kCols; e < end * kCols && e < p.E; e += L) {
        V sum{}, part{};  // two levels: sums of a whole vocabulary keep their low bits
        for (int64_t v = 0; v < p.V; ++v) {
          part += load_as<T>(p.weight.dtype, p.weight.row(v), e, there(p.E - e));
          if (v % 128 == 127) sum += part, part = V{};
        }
        store_n(w_sum + e, sum + part, there(p.E - e));
      }
    });
  }
  static int there(int64_t n) { return static_cast<int>(n < L ? n : L); }

  void pack_h(Packed* a, int64_t row0, int rows, int64_t k0, int64_t kc) const {
    pack_a_matrix<Tile>(p.h, a, row0, rows, k0, kc);
  }

  // reference[row] = the largest logit of the first n panels, infinite or not. A logit equal to an infinite
  // reference makes the row NaN, as torch's softmax does; every finite one is far above -inf, so that all
  // panels are asked.
  void find_reference(const Chunk& now, int64_t n) {
    gemm<Tile>(
        now.rows, p.E, n < panels ? n * kCols : p.V, w_forward.get(), parallel,
        [&](Packed* a, int64_t r0, int rows, int64_t k0, int64_t kc) {
          pack_h(a, now.first + r0, rows, k0, kc);
        },
        [&](int64_t r0, int rows, int64_t panel, const T* tile) {
          for (int r = 0; r < rows; ++r) {
            T max = -std::numeric_limits<T>::infinity();
            for (int j = 0; j < width(panel); ++j) {
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
      reference[r] = max;
    }
  }

  // e of the chunk, its sums, and each slice's part of dh, unscaled; true where a logit is too far off.
  bool forward(const Chunk& now) {
    std::atomic<bool> far{false};
    const int64_t block = now.block, group_depth = kGroup * kCols;
    const int64_t depth = padded_depth<Tile>(p.E), v_depth = padded_depth<Tile>(p.V);
    parallel(ceil_div(now.rows, block) * slices, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] typename Tile::Session session;
      Scratch<Packed> h(Tile::a_elements(block, depth)),
          e(Tile::a_elements(gradient ? block : 0, group_depth));
      Scratch<T> logits(block * kCols);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t r0 = item / slices * block, slice = item % slices;
        const int rows = static_cast<int>(now.rows - r0 < block ? now.rows - r0 : block);
        if (item == begin || slice == 0) pack_h(h, now.first + r0, rows, 0, p.E);
        const int64_t last = (slice + 1) * kSlice < panels ? (slice + 1) * kSlice : panels;
        for (int64_t panel = slice * kSlice; panel < last; ++panel) {
          const Packed* w = w_forward + panel * panel_elements<Tile>(p.E);
          panel_product<Tile>(depth, h.get(), rows, w, kCols,
                              panel + 1 < last ? w + panel_elements<Tile>(p.E) : w, logits.get(), false);
          const int64_t in_group = panel % kGroup * kCols;
          if (exponentials(now, r0, rows, panel, logits, e, in_group))
            far.store(true, std::memory_order_relaxed);
          if (!gradient || (panel % kGroup != kGroup - 1 && panel + 1 < last)) continue;
          const int64_t v0 = panel / kGroup * group_depth;
          const int64_t n = v_depth - v0 < group_depth ? v_depth - v0 : group_depth;
          for (int64_t j = 0; j < e_panels; ++j) {
            const Packed* b = w_backward + j * panel_elements<Tile>(p.V) + Tile::b_elements(v0);
            Tile::block_product(
                n, e, group_depth, rows, b, j + 1 < e_panels ? b + panel_elements<Tile>(p.V) : b,
                dh_of(now, slice, r0, rows, j), v0 > slice * kSlice * kCols, columns_there<Tile>(p.E, j));
          }
        }
      }
    });
    return far.load();
  }
  // A slice's part of an item's dh, one panel of features: [rows][kCols].
  T* dh_of(const Chunk& now, int64_t slice, int64_t r0, int64_t rows, int64_t e_panel) const {
    return dh + ((slice * now.rows + r0) * e_panels + e_panel * rows) * kCols;
  }

  // A tile's logits become e, with the sum of each row's; the target's element stays zero, as do ignored
  // rows, whose gradient is none whatever their h is. True where a logit is too far off.
  bool exponentials(const Chunk& now, int64_t r0, int rows, int64_t panel, const T* tile, Packed* as_a,
                    int64_t column) const {
    constexpr int kRuns = kCols / L;
    alignas(64) Element b_rows[Tile::kDepth * kCols];
    const int words = width(panel);
    const int64_t word = panel * kCols;
    V b[kRuns], highest = broadcast(T(0));
    for (int j = 0; j < kRuns; ++j) b[j] = load(bias + word + j * L);
    for (int r1 = 0; r1 < rows; r1 += L) {
      const int count = rows - r1 < L ? rows - r1 : L;
      V row_sums[L], row_totals[L];
      for (int i = 0; i < count; ++i) {
        const int r = r1 + i;
        const int64_t row = r0 + r, target = p.target[now.first + row] - word;
        const T* z = tile + r * kCols;
        const V from = broadcast(reference[row]);
        Element* line = b_rows + r % Tile::kDepth * kCols;
        V sum{}, total{};
        for (int j = 0; j < kRuns; ++j) {
          const V logit = load(z + j * L) + b[j], above = first_n(logit - from, words - j * L, V{});
          const V e = first_n(exp_(above), words - j * L, V{});
          highest = above > highest ? above : highest;
          sum += e;
          store_as<T>(Tile::kElement, line, j * L, e, L);
          if (smoothing) total += first_n(logit, words - j * L, V{});
        }
        row_sums[i] = sum, row_totals[i] = total;
        if (target >= 0 && target < words) z_target[row] = z[target] + bias[word + target], line[target] = 0;
        if (!gradient) continue;
        if (ignored(now.first + row)) no_elements<Tile>(kCols, line);
        Tile::store_a(as_a, kGroup * kCols, r, column, line, kCols);
        if (!weight_gradient || (r + 1 < rows && (r + 1) % Tile::kDepth != 0)) continue;
        for (int rest = r % Tile::kDepth + 1; rest < Tile::kDepth; ++rest)
          no_elements<Tile>(kCols, b_rows + rest * kCols);
        Tile::store_b_rows(exponents_of(panel, now), row / Tile::kDepth * Tile::kDepth, b_rows);
      }
      for (int i = count; i < L; ++i) row_sums[i] = row_totals[i] = V{};
      store_n(sums + panel * stride + r0 + r1, sum_of_each(row_sums), count);
      if (smoothing) store_n(totals + panel * stride + r0 + r1, sum_of_each(row_totals), count);
    }
    bool far = false;
    for (int l = 0; l < L; ++l) far |= highest[l] > kFar;
    return far;
  }

  // loss = (1 - a)(lse - z_target) + a (lse - mean z), and
  // what the gradient of L rows from r0 on needs of it.
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
      T loss = lse - target_share() * z_target[r];
      if (smoothing) loss -= smooth * total[r - r0] / static_cast<T>(p.V);
      static_cast<T*>(p.loss)[n] = ignored(n) ? T(0) : loss;
      if (!gradient) continue;
      if (ignored(n)) {
        scale[r] = target_scale[r] = 0;
        const T zeros[kCols] = {};
        for (int64_t e = 0; e < p.E; e += kCols) store_hidden_gradient(n, e, zeros);
      } else {
        scale[r] = upstream(n) / exp_sum;
        target_scale[r] = scale[r] * std::exp(z_target[r] - reference[r]) - upstream(n) * target_share();
        hidden_gradient(now, r);
      }
    }
  }

  // dh of a row = scale * the slices' parts + target_scale * the target's word - g a / V * the sum of words
  void hidden_gradient(const Chunk& now, int64_t r) const {
    const int64_t n = now.first + r, in_block = r % now.block, r1 = r - in_block;
    const int64_t rows = now.rows - r1 < now.block ? now.rows - r1 : now.block;
    const T shift = upstream(n) * static_cast<T>(p.label_smoothing) / static_cast<T>(p.V);
    for (int64_t panel = 0; panel < e_panels; ++panel) {
      alignas(64) T out[kCols];
      for (int64_t j = 0; j < kCols && panel * kCols + j < p.E; j += L) {
        const int64_t e = panel * kCols + j;
        V sum{};
        for (int64_t slice = 0; slice < slices; ++slice)
          sum += load(dh_of(now, slice, r1, rows, panel) + in_block * kCols + j);
        sum *= scale[r];
        sum += target_scale[r] * load_as<T>(p.weight.dtype, p.weight.row(p.target[n]), e, there(p.E - e));
        if (smoothing) sum -= shift * load_n(w_sum + e, there(p.E - e));
        store(out + j, sum);
      }
      store_hidden_gradient(n, panel * kCols, out);
    }
  }
  void store_hidden_gradient(int64_t n, int64_t e, const T* values) const {
    store_row(p.h.dtype, p.dh, n * p.E + e, p.E - e < kCols ? p.E - e : kCols, values);
  }

  const LinearCrossEntropy& p;
  const Parallel& parallel;
  const int64_t panels, e_panels, slices;
  const bool gradient, weight_gradient, smoothing;
  const int64_t chunk, stride;                          // rows, and in whole vectors
  Scratch<Packed> w_forward, w_backward;                // (V, E) packed for h @ W^T and for e @ W
  Scratch<Packed> exponents;                            // e of a chunk, as B of dW^T
  Scratch<T> dh;                                        // of a chunk: [slice][item][panel of E][row][kCols]
  Scratch<T> sums, totals;                              // [panel][row] of a chunk: of e, of logits
  Scratch<T> reference, z_target, scale, target_scale;  // of a chunk's rows
  WordGradient<Tile> dweight;
  Scratch<T> bias, w_sum;  // w_sum: of all words
};

template <class Tile>
void linear_cross_entropy(const LinearCrossEntropy& args, const Parallel& parallel) {
  if (!args.gradient && args.N <= Tile::kUnpackedRows)
    return linear_cross_entropy_of_few<Tile>(args, parallel);
  LinearCrossEntropyPass<Tile>(args, parallel).run();
}

ULMFIT_END
