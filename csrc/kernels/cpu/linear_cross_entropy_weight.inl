// The gradient of linear_cross_entropy's weight and bias, summed over chunks of rows.
#pragma once
#include "dropout_mask.inl"
#include "gemm.inl"

ULMFIT_BEGIN

template <class Tile>
class WordGradient {
  using T = typename Tile::Compute;
  using Packed = typename Tile::Packed;
  using Element = typename Tile::Element;
  static constexpr int kCols = Tile::kCols;
  static constexpr int64_t kBlock = 64;  // features at once, a multiple of every tile's kRowGroup

 public:
  // Of chunks of up to `chunk` rows.
  WordGradient(const LinearCrossEntropy& args, const Parallel& parallel, int64_t panels, int64_t chunk)
      : p(args),
        parallel(parallel),
        panels(panels),
        lines(p.E + 1),
        wanted(p.weight_gradient),
        smoothing(wanted && p.label_smoothing != 0),
        h_columns(wanted ? Tile::a_elements(round_up(lines, Tile::kRows), padded_depth<Tile>(chunk)) : 0),
        dw(wanted ? panels * lines * kCols : 0),
        h_sum(smoothing ? lines : 0) {
    if (smoothing) std::memset(h_sum.get(), 0, lines * sizeof(T));
    if (wanted && p.N == 0)
      std::memset(dw.get(), 0, panels * lines * kCols * sizeof(T));  // no chunk will write it
  }

  // dW^T += (scale [h | 1])^T @ e for rows first .. first + rows, e packed, zero at targets and in ignored
  // rows; and target_scale [h | 1] to each row's target.
  void add(int64_t first, int64_t rows, const Packed* e, const T* scale, const T* target_scale) {
    const int64_t depth = padded_depth<Tile>(rows);
    pack_columns(first, rows, scale);
    parallel(panels, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] typename Tile::Session session;
      for (int64_t panel = begin; panel < end; ++panel) {
        const Packed* b = e + panel * panel_elements<Tile>(rows);
        T* sums = dw + panel * lines * kCols;
        panel_product<Tile>(depth, h_columns, static_cast<int>(lines), b, kCols,
                            panel + 1 < end ? b + panel_elements<Tile>(rows) : b, sums, first > 0);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t column = p.target[first + r] - panel * kCols;
          if (column >= 0 && column < kCols) add_target(first + r, target_scale[r], sums + column);
        }
      }
    });
  }

  void store(void* to) const {
    parallel(panels, [&](int64_t begin, int64_t end) {
      Scratch<T> rows(kCols * lines);
      T db[kCols];
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t word = panel * kCols, n = p.V - word < kCols ? p.V - word : kCols;
        transpose(dw + panel * lines * kCols, kCols, lines, n, rows.get(), lines);
        for (int64_t c = 0; c < n; ++c) {
          T* row = rows + c * lines;
          for (int64_t e = 0; smoothing && e < lines; ++e) row[e] -= h_sum[e];
          store_row(p.weight.dtype, to, (word + c) * p.E, p.E, row);
          db[c] = row[p.E];
        }
        if (p.dbias != nullptr) store_row(p.weight.dtype, p.dbias, word, n, db);
      }
    });
  }

 private:
  // n elements, from e on, of factor * [h | 1], whose last column makes db; zeros in ignored rows.
  void load_scaled(int64_t row, int64_t e, int64_t n, T factor, T* out) const {
    if (p.target[row] == p.ignore_index) return static_cast<void>(std::memset(out, 0, n * sizeof(T)));
    const int64_t of_h = p.E - e < n ? p.E - e : n;
    load_row(p.h.dtype, p.h.row(row), e, of_h, out);
    if (of_h < n) out[of_h] = 1;
    for (int64_t j = 0; j < n; ++j) out[j] *= factor;
  }

  void pack_columns(int64_t first, int64_t rows, const T* scale) {
    const T share = static_cast<T>(p.label_smoothing) / static_cast<T>(p.V);
    parallel(ceil_div(lines, kBlock), [&](int64_t begin, int64_t end) {
      alignas(64) T values[kBlock], sums[kBlock];
      for (int64_t e0 = begin * kBlock; e0 < end * kBlock && e0 < lines; e0 += kBlock) {
        const int n_e = static_cast<int>(lines - e0 < kBlock ? lines - e0 : kBlock);
        pack_a_columns<Tile>(h_columns + Tile::a_elements(e0, padded_depth<Tile>(rows)), e0, n_e, 0, rows,
                             [&](int64_t r, int64_t e, int64_t n, Element* out) {
                               load_scaled(first + r, e, n, scale[r], values);
                               store_row(Tile::kElement, out, 0, n, values);
                             });
        if (!smoothing) continue;
        std::memset(sums, 0, sizeof sums);
        for (int64_t r = first; r < first + rows; ++r) {
          load_scaled(r, e0, n_e, static_cast<const T*>(p.row_gradient)[r] * share, values);
          for (int j = 0; j < n_e; ++j) sums[j] += values[j];
        }
        for (int j = 0; j < n_e; ++j) h_sum[e0 + j] += sums[j];
      }
    });
  }

  // In the compute type: where a model is far from its target, these are most of the gradient.
  void add_target(int64_t row, T factor, T* column) const {
    alignas(64) T values[kBlock];
    for (int64_t e = 0; e < lines; e += kBlock) {
      const int64_t n = lines - e < kBlock ? lines - e : kBlock;
      load_scaled(row, e, n, factor, values);
      for (int64_t j = 0; j < n; ++j) column[(e + j) * kCols] += values[j];
    }
  }

  const LinearCrossEntropy& p;
  const Parallel& parallel;
  const int64_t panels, lines;  // features and one
  const bool wanted, smoothing;
  Scratch<Packed> h_columns;  // of a chunk, as A of dW^T
  Scratch<T> dw, h_sum;       // dw: [panel][lines][kCols]; h_sum: what smoothing takes from every word
};

ULMFIT_END
