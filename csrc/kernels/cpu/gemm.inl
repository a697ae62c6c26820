// Blocked matrix products: everything in this library that multiplies matrices is built from these pieces.
//
// C = A * B with B packed whole into panels of Tile::kCols columns, and A packed block by block. A `Tile`
// says how an operand lies in memory and holds the micro-kernel: gemm_fma.inl (float, double), gemm_dot.inl
// (bf16 dot products), gemm_amx.inl (bf16 in AMX tiles), gemm_split.inl (float as three bf16 products),
// gemm_sparse.inl (float, B with many zeros). gemm_unpacked.inl has the products of few rows, for which B
// stays as it lies. Each element of C is summed in an order that depends on the shape alone, or on where B is
// zero, so threads never change a bit of it.
//
// A tile has
//   Element, Packed, Compute     what goes into packing, what memory then holds, what is summed
//   kRows, kCols, kDepth         rows of the micro-kernel, columns of a panel, what K is padded to
//   kRowGroup                    A's rows lie in groups of so many: a block of A begins with one
//   kBlockRows, kBlockDepth, kMostRows, kRowsToHide, kUnpackedRows
//                                how large blocks are, and from where on something pays: from cache sizes
//   kPlain                       packed rows of A and of B's panels are the rows themselves
//   a_elements, a_offset, b_elements, store_a*, load_a, store_b*       where operands lie
//   block_product                the micro-kernel over a block of each. Writes no row of C beyond `rows`, but
//                                any column of the panel
//   Session                      what a thread must have set up meanwhile
//   kRun, load_run, load_packed_run, multiply_run                      for gemm_unpacked.inl
#pragma once
#include "gemm_fma.inl"

ULMFIT_BEGIN

template <class Tile>
inline int64_t padded_depth(int64_t K) {
  return round_up(K, Tile::kDepth);
}
// Depth of the blocks that a product of depth K is done in: even ones, none deeper than the tile's.
template <class Tile>
inline int64_t block_depth(int64_t K) {
  const int64_t blocks = ceil_div(K, Tile::kBlockDepth);
  return blocks > 1 ? round_up(ceil_div(K, blocks), Tile::kDepth) : K;
}
template <class Tile>
inline int64_t panel_elements(int64_t K) {
  return Tile::b_elements(padded_depth<Tile>(K));
}

// n elements of storage from `at` on, as what the tile packs.
template <class Tile>
ULMFIT_HD void load_elements(DType dtype, const void* p, int64_t at, int64_t n, typename Tile::Element* out) {
  if constexpr (Tile::kElement == DType::bf16) {
    if (dtype == DType::bf16) return copy_piece(static_cast<const uint16_t*>(p) + at, n, out);
    for (int64_t j = 0; j < n; j += kLanes) {
      const int there = static_cast<int>(n - j < kLanes ? n - j : kLanes);
      store_as<float>(DType::bf16, out, j, load_as<float>(dtype, p, at + j, there), there);
    }
  } else {
    load_piece(dtype, p, at, n, out);
  }
}
template <class Tile>
inline void no_elements(int64_t n, typename Tile::Element* out) {
  std::memset(out, 0, n * sizeof(typename Tile::Element));
}

// How many row blocks M rows are divided into, none higher than most_rows, where each block is so many work
// items: more than that takes if the busiest thread then has fewer rows to multiply, by a fiftieth at least.
// With 16 items each they are even enough.
inline int64_t even_blocks(int64_t M, int64_t most_rows, int64_t unit, int64_t items, int threads) {
  int64_t blocks = ceil_div(M, most_rows), best = blocks, least = 0;
  for (;; ++blocks) {
    const int64_t work = ceil_div(blocks * items, threads) * round_up(ceil_div(M, blocks), unit);
    if (least == 0 || 50 * work <= 49 * least) best = blocks, least = work;
    if (blocks * items >= 16 * threads || blocks * unit >= M) return best;
  }
}

// Packs one B panel whose column c is a run of memory: load(c, k0, n, out) fetches n <= 64 elements of it
// from depth k0 on.
template <class Tile, class Load>
inline void pack_b_columns(typename Tile::Packed* panel, int64_t K, Load&& load_column) {
  if constexpr (Tile::kSparse) {
    return Tile::pack_columns(panel, K, load_column);
  } else {
    using Element = typename Tile::Element;
    // Runs of 1 KB, which the processor sees coming; in shorter ones each column would wait for memory anew.
    constexpr int64_t kPiece = 64, kChunk = 1024 / sizeof(Element), kLine = kChunk + 64 / sizeof(Element);
    alignas(64) Element tmp[Tile::kCols * kLine];
    for (int64_t k0 = 0; k0 < padded_depth<Tile>(K); k0 += kChunk) {
      const int64_t there = K - k0 < kChunk ? K - k0 : kChunk, padded = round_up(there, Tile::kDepth);
      for (int c = 0; c < Tile::kCols; ++c) {
        Element* column = tmp + c * kLine;
        for (int64_t k = 0; k < there; k += kPiece)
          load_column(c, k0 + k, static_cast<int>(there - k < kPiece ? there - k : kPiece), column + k);
        no_elements<Tile>(padded - there, column + there);
      }
      Tile::store_b_columns(panel, k0, static_cast<int>(padded), tmp, kLine);
    }
  }
}
// Packs all panels of B, (K, N), whose row k is a run of memory: load(k, column,
// n, out) fetches n <= kCols elements of it. Threads share out the rows, so that
// memory is read as it lies; kRowsAtOnce of them are one thread's.
constexpr int64_t kRowsAtOnce = 64;
template <class Tile, class Load>
inline void pack_b_rows(typename Tile::Packed* packed, int64_t K, int64_t N, const Parallel& parallel,
                        Load&& fetch) {
  if constexpr (Tile::kSparse) {
    return Tile::pack_rows(packed, K, N, parallel, fetch);
  } else {
    using Element = typename Tile::Element;
    constexpr int64_t kCols = Tile::kCols;
    parallel(ceil_div(K, kRowsAtOnce), [&](int64_t begin, int64_t end) {
      alignas(64) Element rows[Tile::kDepth * kCols];
      const int64_t k1 = end * kRowsAtOnce < K ? end * kRowsAtOnce : K;
      for (int64_t k = begin * kRowsAtOnce; k < k1; k += Tile::kDepth)
        for (int64_t col = 0; col < N; col += kCols) {
          const int64_t n = N - col < kCols ? N - col : kCols,
                        there = K - k < Tile::kDepth ? K - k : Tile::kDepth;
          if (n < kCols || there < Tile::kDepth) no_elements<Tile>(Tile::kDepth * kCols, rows);
          for (int64_t r = 0; r < there; ++r) fetch(k + r, col, n, rows + r * kCols);
          Tile::store_b_rows(packed + col / kCols * panel_elements<Tile>(K), k, rows);
        }
    });
  }
}

// Packs a block of A whose row is a run of memory: load(row, k0, n, out).
template <class Tile, class Load>
inline void pack_a_rows(typename Tile::Packed* a, int64_t row0, int rows, int64_t k0, int64_t kc,
                        Load&& fetch) {
  if constexpr (Tile::kPlain) {  // no padding either
    for (int r = 0; r < rows; ++r) fetch(row0 + r, k0, kc, a + r * kc);
  } else {
    constexpr int64_t kChunk = 256;
    alignas(64) typename Tile::Element tmp[kChunk];
    const int64_t ld = padded_depth<Tile>(kc);
    for (int r = 0; r < rows; ++r)
      for (int64_t k = 0; k < ld; k += kChunk) {
        const int64_t n = ld - k < kChunk ? ld - k : kChunk;
        const int64_t there = kc - k < n ? (kc - k > 0 ? kc - k : 0) : n;
        fetch(row0 + r, k0 + k, there, tmp);
        no_elements<Tile>(n - there, tmp + there);
        Tile::store_a(a, ld, r, k, tmp, n);
      }
  }
}
// Rows of a matrix as a block of A; and rows of a weight, from row0 on, as the columns of one B panel, of
// which the weight fills only `columns` (its last panel).
template <class Tile>
inline void pack_a_matrix(const Matrix& m, typename Tile::Packed* a, int64_t row0, int rows, int64_t k0,
                          int64_t kc) {
  pack_a_rows<Tile>(a, row0, rows, k0, kc, [&](int64_t r, int64_t k, int64_t n, typename Tile::Element* out) {
    load_elements<Tile>(m.dtype, m.row(r), k, n, out);
  });
}
template <class Tile>
inline void pack_b_matrix(const Matrix& weight, typename Tile::Packed* panel, int64_t K, int64_t row0,
                          int64_t columns) {
  pack_b_columns<Tile>(panel, K, [&](int c, int64_t k0, int n, typename Tile::Element* out) {
    if (c >= columns) return no_elements<Tile>(n, out);
    load_elements<Tile>(weight.dtype, weight.row(row0 + c), k0, n, out);
  });
}

// Packs a block of A whose column is a run of memory: load(k, row0, rows, out).
template <class Tile, class Load>
inline void pack_a_columns(typename Tile::Packed* a, int64_t row0, int rows, int64_t k0, int64_t kc,
                           Load&& load_column) {
  constexpr int kChunk = 32;
  alignas(64) typename Tile::Element tmp[kChunk * Tile::kMostRows] = {};
  const int64_t ld = padded_depth<Tile>(kc);
  for (int64_t k = 0; k < ld; k += kChunk) {
    const int n = static_cast<int>(ld - k < kChunk ? ld - k : kChunk);
    for (int j = 0; j < n; ++j) {
      if (k + j < kc) {
        load_column(k0 + k + j, row0, rows, tmp + j * Tile::kMostRows);
      } else {
        no_elements<Tile>(rows, tmp + j * Tile::kMostRows);
      }
    }
    Tile::store_a_columns(a, ld, rows, k, n, tmp, Tile::kMostRows);
  }
}
// n elements of row r, from column k on, of a matrix that lies in panels of plain B, each of `rows` rows.
template <class Tile>
inline void load_from_panels(const typename Tile::Packed* panels, int64_t rows, int64_t r, int64_t k,
                             int64_t n, typename Tile::Element* out) {
  constexpr int64_t kCols = Tile::kCols;
  for (int64_t j = 0; j < n;) {
    const int64_t in_run = kCols - (k + j) % kCols, run = n - j < in_run ? n - j : in_run;
    const auto* from = panels + ((k + j) / kCols * rows + r) * kCols + (k + j) % kCols;
    std::memcpy(out + j, from, run * sizeof(*out));
    j += run;
  }
}
// Writes n values at depth k of each of `count` rows, the first a multiple of L: up to L rows' at once, as a
// tile may lie transposed. v is spent.
template <class Tile, class V>
ULMFIT_HD void store_a_vectors(typename Tile::Packed* a, int64_t K, int64_t row, int count, int64_t k, V* v,
                               int n) {
  if constexpr (Tile::kSparse) {
    Tile::store_a_vectors(a, K, row, count, k, v, n);
  } else {
    for (int i = 0; i < count; ++i) Tile::store_a_vector(a, K, row + i, k, v[i], n);
  }
}
// A that lies packed already, with its whole padded depth.
template <class Tile>
struct PackedRows {
  const typename Tile::Packed* data;
  int64_t depth;
};

// Of N columns in panels, how many are in this one.
template <class Tile>
inline int columns_there(int64_t N, int64_t panel) {
  const int64_t left = N - panel * Tile::kCols;
  return left < Tile::kCols ? static_cast<int>(left) : Tile::kCols;
}

// c[panel][rows][kCols] (+)= A (packed with its whole padded depth K, from its row 0 on) * the panels that N
// columns of B lie in. Depth is the outer loop: A's block and the sums stay in L2 while B streams by, once.
template <class Tile, class T = typename Tile::Compute>
inline void panel_product(int64_t K, const typename Tile::Packed* a, int rows, const typename Tile::Packed* b,
                          int64_t N, const typename Tile::Packed* next, T* c, bool accumulate) {
  const int64_t panels = ceil_div(N, Tile::kCols);
  if (K == 0 && !accumulate) std::memset(c, 0, panels * rows * Tile::kCols * sizeof(T));
  const int64_t depth = block_depth<Tile>(K);
  const auto block_b = [&](int64_t p, int64_t k) { return b + Tile::b_elements(p * K + k); };
  for (int64_t k = 0; k < K; k += depth)
    for (int64_t p = 0; p < panels; ++p) {
      const auto* after = p + 1 < panels ? block_b(p + 1, k) : k + depth < K ? block_b(0, k + depth) : next;
      Tile::block_product(K - k < depth ? K - k : depth, a + Tile::a_offset(k), K, rows, block_b(p, k), after,
                          c + p * rows * Tile::kCols, accumulate || k > 0, columns_there<Tile>(N, p));
    }
}

// C (M x N) = A (M x K) * B (packed).
// A is PackedRows, or a function (a, row0, rows, k0, kc) that packs a block of it; store(row0, rows, panel,
// c) takes a finished [rows][kCols] tile. With place(row0, panel), which gives a tile's memory, tiles grow
// where they belong, and are added to what is there if `accumulate` says so.
template <class Tile, class A, class Store, class Place = std::nullptr_t>
void gemm(int64_t M, int64_t K, int64_t N, const typename Tile::Packed* b, const Parallel& parallel,
          const A& rows_of_a, Store&& store_tile, Place&& place = nullptr, bool accumulate = false) {
  using T = typename Tile::Compute;
  using Packed = typename Tile::Packed;
  constexpr bool kPacked = std::is_same_v<A, PackedRows<Tile>>;
  constexpr bool kPlaced = !std::is_same_v<std::decay_t<Place>, std::nullptr_t>;
  constexpr int64_t kWholeBytes = 8 << 20;  // of packed A, a thread: it must stay in L3 beside B
  const int64_t panels = ceil_div(N, Tile::kCols);
  if (M == 0 || panels == 0) return;
  const int64_t depth = block_depth<Tile>(K);
  // Where the depth takes several blocks, a thread holds the C tiles of 8 panels at once: 8 x 288 x 64
  // floats, 576 KB, and the next block of A serves them all.
  const int64_t groups = ceil_div(panels, depth < K ? 8 : 1), group = ceil_div(panels, groups);
  // A shallow block of A is a high one: each panel is read once for all its rows.
  const int64_t room = Tile::kBlockRows * Tile::kBlockDepth / (depth > 0 ? depth : 1);
  const int64_t most_rows = room < Tile::kBlockRows  ? Tile::kBlockRows
                            : room < Tile::kMostRows ? room
                                                     : Tile::kMostRows;
  const int64_t blocks =
      even_blocks(M, most_rows / Tile::kRows * Tile::kRows, Tile::kRows, groups, parallel.threads);
  const int64_t block_rows = round_up(ceil_div(M, blocks), Tile::kRows);
  // A row block that several groups of panels meet is packed once for all of them, if that is not too large.
  const int64_t row_bytes = Tile::a_elements(block_rows, K) * static_cast<int64_t>(sizeof(Packed));
  const bool whole = groups > 1 && row_bytes <= kWholeBytes;
  const int64_t scratch_depth = kPacked ? 0 : padded_depth<Tile>(whole ? K : depth);
  parallel(blocks * groups, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] typename Tile::Session session;
    Scratch<Packed> scratch(Tile::a_elements(block_rows, scratch_depth));
    Scratch<T> scratch_c(kPlaced ? 0 : group * block_rows * Tile::kCols);
    int64_t packed_row = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row0 = item / groups * block_rows;
      const int64_t p0 = item % groups * panels / groups, p1 = (item % groups + 1) * panels / groups;
      const int rows = static_cast<int>(M - row0 < block_rows ? M - row0 : block_rows);
      if (rows <= 0 || p0 >= p1) continue;
      const auto tile_of = [&](int64_t p) {
        if constexpr (kPlaced) {
          return place(row0, p);
        } else {
          return scratch_c + (p - p0) * block_rows * Tile::kCols;
        }
      };
      for (int64_t k0 = 0; k0 < K; k0 += depth) {
        const int64_t kc = K - k0 < depth ? K - k0 : depth, ld = padded_depth<Tile>(kc);
        const Packed* a;
        int64_t lda = ld;
        if constexpr (kPacked) {
          lda = rows_of_a.depth;
          a = rows_of_a.data + Tile::a_elements(row0, lda) + Tile::a_offset(k0);
        } else {
          Packed* block = whole ? scratch + Tile::a_elements(block_rows, k0) : scratch.get();
          if (!whole || packed_row != row0) rows_of_a(block, row0, rows, k0, kc);
          a = block;
        }
        const auto block_b = [&](int64_t p) {
          return b + p * panel_elements<Tile>(K) + Tile::b_elements(k0);
        };
        for (int64_t p = p0; p < p1; ++p)
          Tile::block_product(ld, a, lda, rows, block_b(p), block_b(p + 1 < p1 ? p + 1 : p), tile_of(p),
                              accumulate || k0 > 0, columns_there<Tile>(N, p));
      }
      packed_row = row0;
      for (int64_t p = p0; p < p1; ++p) {
        if (K == 0 && !accumulate) std::memset(tile_of(p), 0, rows * Tile::kCols * sizeof(T));
        store_tile(row0, rows, p, tile_of(p));
      }
    }
  });
}

ULMFIT_END
