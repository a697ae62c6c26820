// The sparse tile: products with a weight many of whose elements are zero, as DropConnect leaves W_hh. What
// is zero is neither stored nor multiplied. For panel_product alone, whose A is written by store_a_vectors.
//
// Vectors run along the batch. The columns of a panel are taken in groups of kGroup, whose sums are in
// registers, and the depths of a group are sorted by which of its columns have a weight there: one loop for
// each such pattern, in which no branch depends on a weight. The order of a sum follows from which of its
// group's weights are zero.
#pragma once
#include "gemm.inl"

ULMFIT_BEGIN

// kVecs_: vectors of columns in a panel.
template <int kVecs_>
struct SparseTile {
  using Compute = float;
  using Packed = float;
  using Element = float;
  static constexpr DType kElement = DType::f32;
  static constexpr int L = kLanes;
  static constexpr int kVecs = kVecs_;
  static constexpr int kCols = kVecs * L;  // of a panel
  static constexpr int kDepth = 1;
  static constexpr bool kPlain = false, kSparse = true;
  // 5 columns x 4 vectors of sums, 4 vectors of A and a weight: 25 of AVX-512's 32 registers. Of 6 columns a
  // pattern has so few depths, a 64th, that the ends of the loops show; of 4 columns each vector of A, which
  // comes from L2, meets fewer weights.
  static constexpr int kGroup = 5, kPatterns = 1 << kGroup;
  static constexpr int kGroups = (kCols + kGroup - 1) / kGroup;
  static constexpr int kBatchVecs = 4, kBatch = kBatchVecs * L;  // rows that share a block of A
  static constexpr int kRows = kBatch, kRowGroup = kBatch, kBlockRows = 4 * kBatch, kRowsToHide = kBatch;
  // kBatch rows of A, 1152 x 64 floats, 288 KB, stay in an L2 of 1 MB while the weights stream by.
  static constexpr int kBlockDepth = 1152;

  struct Session {};

  // Whether the products of a layer are faster so: where much is dropped and steps have rows enough, most of
  // which fill their vectors. Sixteen registers, as of AVX2, hold too few sums. Measured on Zen 4.
  static bool pays(const LstmShape& s) {
    const bool ragged = s.lengths != nullptr;
    int64_t rows = ragged ? 0 : s.T * s.B, steps = ragged ? 0 : s.T;
    for (int64_t b = 0; ragged && b < s.B; ++b) {
      rows += s.lengths[b];
      if (s.lengths[b] > steps) steps = s.lengths[b];
    }
    return kLanes == 16 && s.weight_p >= 0.4 && s.H >= kLeastDepth && s.B >= 2 * L && rows >= 2 * L * steps &&
           8 * round_up(s.B, L) <= 9 * s.B;
  }

  // A: blocks [row / kBatch] of [k][kBatch].
  static int64_t a_elements(int64_t rows, int64_t K) { return round_up(rows, kBatch) * K; }
  static int64_t a_offset(int64_t k) { return k * kBatch; }
  static void store_a_vectors(float* a, int64_t K, int64_t row, int count, int64_t k, VF* v, int n) {
    float* to = a + row / kBatch * kBatch * K + k * kBatch + row % kBatch;
    for (int i = count; i < L; ++i) v[i] = VF{};
    transpose_stage<VF, 1, L>(v);
    for (int l = 0; l < n; ++l) store_n(to + l * kBatch, v[l], count);
  }

  // A block of a B panel: for each group how many depths each pattern has, then the depths, then the weights,
  // all groups' one after the other. There is room for a weight that has no zeros.
  // A float of each depth is for the counts, so a block must be at least that deep.
  static constexpr int64_t kLeastDepth = 256;
  static_assert(kGroups * kPatterns * sizeof(uint16_t) <= kLeastDepth * sizeof(float));
  static int64_t b_elements(int64_t K) { return K * (1 + (kGroups + 1) / 2 + kCols); }
  static uint16_t* counts_of(float* block) { return reinterpret_cast<uint16_t*>(block); }
  static uint16_t* depths_of(float* block, int64_t kc) { return reinterpret_cast<uint16_t*>(block + kc); }
  static float* weights_of(float* block, int64_t kc) { return block + kc * (1 + (kGroups + 1) / 2); }

  // dense: [kc][kCols]
  static void store_b_block(float* block, int64_t kc, const float* dense) {
    uint16_t *counts = counts_of(block), *depths = depths_of(block, kc);
    float* weights = weights_of(block, kc);
    Scratch<uint8_t> pattern(kc);
    for (int group = 0; group < kGroups; ++group, counts += kPatterns) {
      const int first = group * kGroup, columns = kCols - first < kGroup ? kCols - first : kGroup;
      int64_t at[kPatterns] = {};
      for (int64_t k = 0; k < kc; ++k) {
        int bits = 0;
        for (int c = 0; c < columns; ++c) bits |= (dense[k * kCols + first + c] != 0) << c;
        pattern[k] = static_cast<uint8_t>(bits);
        ++at[bits];
      }
      int64_t begin = 0;
      for (int bits = 0; bits < kPatterns; ++bits) {
        counts[bits] = static_cast<uint16_t>(bits == 0 ? 0 : at[bits]);
        at[bits] = begin;
        begin += counts[bits];
      }
      for (int64_t k = 0; k < kc; ++k)
        if (pattern[k] != 0) depths[at[pattern[k]]++] = static_cast<uint16_t>(k);
      for (int bits = 1; bits < kPatterns; ++bits)
        for (int i = 0; i < counts[bits]; ++i, ++depths)
          for (int c = 0; c < columns; ++c)
            if (bits >> c & 1) *weights++ = dense[*depths * kCols + first + c];
    }
  }

  // What pack_b_columns and pack_b_rows do for other tiles: a block is packed when it is there as a whole.
  template <class Load>
  static void pack_columns(float* panel, int64_t K, Load&& load_column) {
    constexpr int64_t kPiece = 64;
    const int64_t depth = block_depth<SparseTile>(K);
    Scratch<float> dense(depth * kCols);
    alignas(64) float tmp[kCols * kPiece];
    for (int64_t k0 = 0; k0 < K; k0 += depth) {
      const int64_t kc = K - k0 < depth ? K - k0 : depth;
      for (int64_t k = 0; k < kc; k += kPiece) {
        const int n = static_cast<int>(kc - k < kPiece ? kc - k : kPiece);
        for (int c = 0; c < kCols; ++c) load_column(c, k0 + k, n, tmp + c * kPiece);
        transpose(tmp, kPiece, kCols, n, dense + k * kCols, kCols);
      }
      store_b_block(panel + b_elements(k0), kc, dense);
    }
  }
  template <class Load>
  static void pack_rows(float* packed, int64_t K, int64_t N, const Parallel& parallel, Load&& load_row_) {
    const int64_t depth = block_depth<SparseTile>(K), blocks = ceil_div(K, depth);
    parallel(ceil_div(N, kCols) * blocks, [&](int64_t begin, int64_t end) {
      Scratch<float> dense(depth * kCols);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t col = i / blocks * kCols, n = N - col < kCols ? N - col : kCols;
        const int64_t k0 = i % blocks * depth, kc = K - k0 < depth ? K - k0 : depth;
        if (n < kCols) std::memset(dense.get(), 0, kc * kCols * sizeof(float));
        for (int64_t k = 0; k < kc; ++k) load_row_(k0 + k, col, n, dense + k * kCols);
        store_b_block(packed + b_elements(i / blocks * K + k0), kc, dense);
      }
    });
  }

  static void block_product(int64_t kc, const float* a, int64_t lda, int rows, const float* b,
                            const float* /*next*/, float* c, bool accumulate, int /*columns*/ = kCols) {
    for (int r = 0; r < rows; r += kBatch, a += kBatch * lda, c += kBatch * kCols)
      with_vectors<kBatchVecs>(rows - r, [&](auto vecs) {
        multiply<vecs()>(kc, a, rows - r < kBatch ? rows - r : kBatch, const_cast<float*>(b), c, accumulate);
      });
  }

 private:
  template <int kMost, class F>
  static void with_vectors(int rows, F&& f) {
    if constexpr (kMost > 1) {
      if (rows <= (kMost - 1) * L) return with_vectors<kMost - 1>(rows, f);
    }
    f(std::integral_constant<int, kMost>());
  }

  struct Stream {
    const uint16_t* depths;
    const float* weights;
  };

  template <int V>
  static void multiply(int64_t kc, const float* a, int rows, float* b, float* c, bool accumulate) {
    alignas(64) float sums[kGroups * kGroup * kBatch];
    Stream stream{depths_of(b, kc), weights_of(b, kc)};
    for (int group = 0; group < kGroups; ++group)
      stream = group_product<V>(counts_of(b) + group * kPatterns, stream, a, sums + group * kGroup * kBatch);
    for (int r = 0; r < rows; r += L)
      for (int v = 0; v < kCols; v += L) {
        VF lines[L];
        for (int i = 0; i < L; ++i) lines[i] = load(sums + (v + i) * kBatch + r);
        transpose_stage<VF, 1, L>(lines);
        for (int i = 0; i < L && r + i < rows; ++i) {
          float* to = c + (r + i) * kCols + v;
          store(to, accumulate ? load(to) + lines[i] : lines[i]);
        }
      }
  }

  // The sums of a group: column c, vector v.
  template <int V>
  using Sums = VF[kGroup][V];

  // sums[column][kBatch], of V vectors of rows
  template <int V>
  __attribute__((noinline)) static Stream group_product(const uint16_t* counts, Stream stream, const float* a,
                                                        float* sums) {
    Sums<V> acc;
    unrolled<kGroup * V>([&](auto i) ULMFIT_INLINE { acc[i / V][i % V] = VF{}; });
    patterns<1>(counts, stream, a, acc);
    unrolled<kGroup * V>([&](auto i)
                             ULMFIT_INLINE { store(sums + i / V * kBatch + i % V * L, acc[i / V][i % V]); });
    return stream;
  }
  template <int kBits, int V>
  ULMFIT_HD static void patterns(const uint16_t* counts, Stream& stream, const float* a, Sums<V>& acc) {
    if constexpr (kBits < kPatterns) {
      Stream at = stream;
      for (const uint16_t* end = at.depths + counts[kBits]; at.depths != end; ++at.depths)
        one_depth<kBits>(a + size_t{*at.depths} * kBatch, at.weights, acc);
      stream = at;
      patterns<kBits + 1>(counts, stream, a, acc);
    }
  }
  template <int kBits, int V>
  ULMFIT_HD static void one_depth(const float* a, const float*& w, Sums<V>& acc) {
    VF x[V];
    unrolled<V>([&](auto v) ULMFIT_INLINE { x[v] = load(a + v * L); });
    unrolled<kGroup>([&](auto c) ULMFIT_INLINE {
      if constexpr ((kBits >> c & 1) != 0) {
        const VF weight = broadcast(*w++);
        unrolled<V>([&](auto v) ULMFIT_INLINE { acc[c][v] = fma(weight, x[v], acc[c][v]); });
      }
    });
  }
};

ULMFIT_END
