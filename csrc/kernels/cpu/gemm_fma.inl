// The FMA tile: products of floats, or of doubles, with nothing but multiply-adds of vectors.
#pragma once
#include "storage.h"
#include "transpose.inl"

ULMFIT_BEGIN

template <class T>
struct FmaTile {
  using Compute = T;  // what is summed
  using Packed = T;   // what packed operands consist of
  using Element = T;  // what goes into packing, of type kElement
  static constexpr DType kElement = kComputeType<T>;
  static constexpr int L = lanes_of<T>;
  static constexpr int kVecs = 4;  // columns of a panel: 4 vectors, which in the LSTM are the 4 gates
  static constexpr int kCols = kVecs * L;
  static constexpr int kDepth = 1;      // K is padded to a multiple of this
  static constexpr bool kPlain = true;  // rows of elements are packed panels as they are
  static constexpr bool kSparse = false;
  // kRows x 4 accumulators, 4 vectors of B and a broadcast must fit the registers: AVX-512 and aarch64 have
  // 32, but on aarch64 GCC holds a scalar of each row besides; others have 16, where 3 broadcasts and one
  // vector of B are held.
#if defined(__aarch64__)
  static constexpr int kRegisters = 32, kRows = 5;
#else
  static constexpr int kRegisters = kLanes == 16 ? 32 : 16, kRows = kRegisters == 32 ? 6 : 3;
#endif
  // With AVX-512 a block of A (288 x 384 floats, 432 KB) and two of a B panel (96 KB each) stay in an L2 of
  // 1 MB together, and a B block is used for so many rows that fetching it from memory does not show. AVX2's
  // (96 x 384, 144 KB, and 48 KB each) leave room for C in the 512 KB of Zen 2 and 3; doubles, which serve as
  // references, take twice as much.
  static constexpr int kBlockRows = (kRegisters == 32 ? 48 : 32) * kRows, kBlockDepth = 384;
  static constexpr int kMostRows = 64 * kRows;  // of a block that is not as deep
  // Rows a thread needs for a stream of B from L3 to come in behind the multiplying.
  static constexpr int kRowsToHide = 8 * kRows;

  struct Session {};  // state a thread needs round micro-kernel calls; AMX has some

  // A: row-major. K is the depth it was packed with. A row whose number divides by kRowGroup begins at
  // a_elements of that number.
  static constexpr int kRowGroup = 1;
  static int64_t a_elements(int64_t rows, int64_t K) { return rows * K; }
  static int64_t a_offset(int64_t k) { return k; }  // of depth k
  // Writes n values at (row, k).
  static void store_a(T* a, int64_t K, int64_t row, int64_t k, const T* values, int64_t n) {
    std::memcpy(a + row * K + k, values, n * sizeof(T));
  }
  static void store_a_vector(T* a, int64_t K, int64_t row, int64_t k, Vec<T> v, int n) {
    store_n(a + row * K + k, v, n);
  }
  // Writes columns: tmp = [n depths][ld rows].
  static void store_a_columns(T* a, int64_t K, int rows, int64_t k, int n, const T* tmp, int64_t ld) {
    transpose(tmp, ld, n, rows, a + k, K);
  }
  // For products with a weight that is not packed: up to about how many rows packing it would not pay, and
  // runs along the depth.
  static constexpr int64_t kUnpackedRows = 64;
  static constexpr int kRun = L;
  static Vec<T> load_run(DType dtype, const void* row, int64_t k, int n) {
    return load_as<T>(dtype, row, k, n);
  }
  static Vec<T> load_packed_run(const T* a, int64_t K, int64_t row, int64_t k, int n) {
    return load_n(a + row * K + k, n);
  }
  static Vec<T> multiply_run(Vec<T> x, Vec<T> w, Vec<T> sum) { return fma(x, w, sum); }
  // B panel: [K][kCols].
  static int64_t b_elements(int64_t K) { return K * kCols; }
  // Writes columns' values of depth k0..k0+n, tmp = [kCols][ld].
  static void store_b_columns(T* b, int64_t k0, int n, const T* tmp, int64_t ld) {
    transpose(tmp, ld, kCols, n, b + k0 * kCols, kCols);
  }
  // Writes kDepth consecutive rows of a panel, each of kCols values.
  static void store_b_rows(T* b, int64_t k, const T* rows) {
    std::memcpy(b + k * kCols, rows, kCols * sizeof(T));
  }

  // c[rows][kCols] (+)= A block (packed with depth lda) * B block, both of depth kc. Meanwhile `next`, the B
  // block whose turn is next, comes into L2: in the recurrence a block is used for one batch only, and
  // waiting for L3 would cost a fifth of the time.
  // Of a panel of which only the first `columns` are wanted, a tile may leave out the rest.
  static void block_product(int64_t kc, const T* a, int64_t lda, int rows, const T* b, const T* next, T* c,
                            bool accumulate, int columns = kCols) {
    // kRows at a time, B would come from L2 two or three times, and the calls be over before `next` is here.
    // Twice the rows by half a panel take B from L2 once, and half a panel stays in L1 for the others. With
    // 16 registers that costs more instructions than it saves, unless half a panel is all that is wanted.
    const bool half = columns <= 2 * L, halves = kRegisters == 32 && rows > kRows && rows <= 3 * kRows;
    if (kRegisters == 32 && columns <= L && rows >= kRows) {
      multiply<1>(kc, a, lda, rows, b, next, c, accumulate, 1);
    } else if (half ? rows >= kRows : halves) {
      multiply<2>(kc, a, lda, rows, b, next, c, accumulate, half ? 1 : 2);
    } else {
      multiply<kVecs>(kc, a, lda, rows, b, next, c, accumulate, 1);
    }
  }

 private:
  // Depths of a turn of a micro-kernel's loop. With 16 registers a depth is 12 multiply-adds, beside which
  // what else a turn has would show.
  static constexpr int kUnroll = kRegisters == 16 ? 4 : 1;

  // `parts` of the panel, kN vectors each, one after the other, by even numbers of rows: a call for few rows
  // waits for B as long as one for many.
  template <int kN>
  static void multiply(int64_t kc, const T* a, int64_t lda, int rows, const T* b, const T* next, T* c,
                       bool accumulate, int parts) {
    constexpr int kMost = kN == kVecs ? kRows : 2 * kRows, kLeast = kN == kVecs ? 1 : kRows;
    const int calls = (rows + kMost - 1) / kMost;
    // All turns fetch as much of `next`: those that fetched more would wait, as memory has no pauses. Few
    // rows are done before it can be here.
    constexpr int64_t kMostAhead = 64 * kUnroll * kVecs / kN;
    const int64_t turns = calls * parts * (kc / kUnroll), bytes = kc * kCols * int64_t{sizeof(T)};
    const int64_t even = turns > 0 ? (bytes + turns - 1) / turns : 0,
                  step = even < kMostAhead ? even : kMostAhead;
    const char* ahead = reinterpret_cast<const char*>(next);
    for (int v = 0; v < parts * kN; v += kN)
      for (int r = 0, left = calls; left > 0; --left) {
        const int m = (rows - r + left - 1) / left;
        const auto with_lines = [&](auto many) {
          micro<kMost, kLeast, kN, many>(m, kc, a + r * lda, lda, b + v * L, c + r * kCols + v * L,
                                         accumulate, ahead, step);
        };
        step > 64 ? with_lines(std::true_type()) : with_lines(std::false_type());
        ahead += kc / kUnroll * step;
        r += m;
      }
  }
  // micro_m for m rows, from kLeast to M, with their number known to the compiler.
  template <int M, int kLeast, int kN, bool kMany>
  static void micro(int m, int64_t kc, const T* a, int64_t lda, const T* b, T* c, bool accumulate,
                    const char* ahead, int64_t step) {
    if constexpr (M > kLeast) {
      if (m < M) return micro<M - 1, kLeast, kN, kMany>(m, kc, a, lda, b, c, accumulate, ahead, step);
    }
    micro_m<M, kN, kMany>(kc, a, lda, b, c, accumulate, ahead, step);
  }
  // In each turn of the loop `step` bytes from `ahead` on are fetched into L2; kMany: they are more than a
  // line. Not inlined: with a copy in each caller GCC reaches the limit of what inlining may add to a file,
  // and leaves small functions of inner loops as calls.
  template <int M, int kN, bool kMany>
  __attribute__((noinline)) static void micro_m(int64_t kc, const T* a, int64_t lda, const T* b, T* c,
                                                bool accumulate, const char* ahead, int64_t step) {
    if (accumulate)  // in the recurrence C is the projected inputs, which are in L3
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < kN; ++v) __builtin_prefetch(c + m * kCols + v * L, 1);
    // From zero, and c added at the end: a sum over a whole vocabulary keeps more of its low bits in blocks.
    Vec<T> acc[M][kN];
    unrolled<M>([&](auto m)
                    ULMFIT_INLINE { unrolled<kN>([&](auto v) ULMFIT_INLINE { acc[m][v] = Vec<T>{}; }); });
    const auto depth = [&](const T* a_k, const T* b_k) ULMFIT_INLINE {
      // Of A and B the one with fewer vectors is held: the sums and these fit the registers.
      if constexpr (M < kN) {
        Vec<T> av[M];
        unrolled<M>([&](auto m) ULMFIT_INLINE { av[m] = broadcast(a_k[m * lda]); });
        unrolled<kN>([&](auto v) ULMFIT_INLINE {
          const Vec<T> bv = load(b_k + v * L);
          unrolled<M>([&](auto m) ULMFIT_INLINE { acc[m][v] = fma(av[m], bv, acc[m][v]); });
        });
      } else {
        Vec<T> bv[kN];
        unrolled<kN>([&](auto v) ULMFIT_INLINE { bv[v] = load(b_k + v * L); });
        unrolled<M>([&](auto m) ULMFIT_INLINE {
          const Vec<T> av = broadcast(a_k[m * lda]);
          unrolled<kN>([&](auto v) ULMFIT_INLINE { acc[m][v] = fma(av, bv[v], acc[m][v]); });
        });
      }
    };
    int64_t k = 0;
    for (; k + kUnroll <= kc; k += kUnroll) {
      __builtin_prefetch(ahead, 0, 2);
      for (int64_t i = 64; kMany && i < step; i += 64) __builtin_prefetch(ahead + i, 0, 2);
      ahead += step;
      unrolled<kUnroll>([&](auto i) ULMFIT_INLINE { depth(a + k + i, b + (k + i) * kCols); });
    }
    for (; k < kc; ++k) depth(a + k, b + k * kCols);
    unrolled<M>([&](auto m) ULMFIT_INLINE {
      unrolled<kN>([&](auto v) ULMFIT_INLINE {
        T* to = c + m * kCols + v * L;
        store(to, accumulate ? load(to) + acc[m][v] : acc[m][v]);
      });
    });
  }
};

ULMFIT_END
