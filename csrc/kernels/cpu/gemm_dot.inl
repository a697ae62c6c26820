// The dot tile: bf16 operands, fp32 sums, two products an element and instruction (AVX-512's vdpbf16ps).
#pragma once
#include "gemm_bf16.inl"

ULMFIT_BEGIN

struct DotTile : Bf16Packing {
  static constexpr int kRows = 16;  // whole tiles of A
  // An A block 216 KB, B blocks 72 KB each: in L2 together. Half a B block, 36 KB, stays in L1 for all rows.
  static constexpr int kBlockRows = 192, kBlockDepth = 576, kMostRows = 384;
  static constexpr int kRowsToHide = 32;
  static constexpr int64_t kUnpackedRows = 64;  // as for the FMA tile

  struct Session {};

  static void block_product(int64_t kc, const uint16_t* a, int64_t lda, int rows, const uint16_t* b,
                            const uint16_t* next, float* c, bool accumulate, int columns = kCols) {
    // Calls fetch the next B block into L2, a line for each pair of depths: a quarter each, those after the
    // fourth the last quarter again.
    const uint16_t* ahead = next;
    const auto call = [&](auto m, auto vecs, const uint16_t* a_rows, const uint16_t* b_part, float* out) {
      micro<m(), vecs()>(kc, a_rows, b_part, out, accumulate, reinterpret_cast<const char*>(ahead));
      if (ahead < next + 3 * kc * 16) ahead += kc * 16;
    };
    if (rows <= 4) return with_rows<4>(rows, [&](auto m) { call(m, Int<4>(), a, b, c); });
    for (int column = 0; column < columns; column += 32)
      for (int r = 0; r < rows; r += 8)
        with_rows<8>(rows - r, [&](auto m) {
          const uint16_t *a_rows = a + r / 16 * 16 * lda + r % 16 * 32, *b_part = b + column / 16 * kTile;
          float* out = c + r * kCols + column;
          columns - column > 16 ? call(m, Int<2>(), a_rows, b_part, out)
                                : call(m, Int<1>(), a_rows, b_part, out);
        });
  }

 private:
  template <int N>
  using Int = std::integral_constant<int, N>;
  // f(Int<the smaller of rows and Most>())
  template <int Most, class F>
  static void with_rows(int rows, F&& f) {
    if constexpr (Most > 1) {
      if (rows < Most) return with_rows<Most - 1>(rows, f);
    }
    f(Int<Most>());
  }

  // M rows by kN vectors: 8 x 2 sums, or up to 4 x 4, with B's vectors and a broadcast, fit the 32 registers.
  // A turn of the loop is a whole tile of depth: with a turn for each pair Zen 4 multiplies a twentieth
  // slower. Not inlined, as the FMA tile's.
  template <int M, int kN>
  __attribute__((noinline)) static void micro(int64_t kc, const uint16_t* a, const uint16_t* b, float* c,
                                              bool accumulate, const char* ahead) {
    if (accumulate)  // in the recurrence C is the projected inputs, which are in L3
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < kN; ++v) __builtin_prefetch(c + m * kCols + v * kLanes, 1);
    VF acc[M][kN];
    unrolled<M>([&](auto m) ULMFIT_INLINE { unrolled<kN>([&](auto v) ULMFIT_INLINE { acc[m][v] = VF{}; }); });
    for (int64_t k = 0; k < kc; k += 32, a += kTile, b += 4 * kTile, ahead += 16 * 64)
      unrolled<16>([&](auto pair) ULMFIT_INLINE {
        // Nothing happens here, but after the last pair's products and before this one's fetch: GCC would
        // put all sixteen fetches first.
        asm volatile("" : "+r"(ahead), "+v"(acc[0][0]));
        __builtin_prefetch(ahead + pair * 64, 0, 2);
        VU bv[kN];
        unrolled<kN>([&](auto v) ULMFIT_INLINE {
          bv[v] = load(reinterpret_cast<const uint32_t*>(b + v * kTile + pair * 32));
        });
        unrolled<M>([&](auto m) ULMFIT_INLINE {
          uint32_t two;
          std::memcpy(&two, a + m * 32 + pair * 2, sizeof two);
          const VU av = VU{} + two;
          unrolled<kN>([&](auto v) ULMFIT_INLINE {
            acc[m][v] = (VF)_mm512_dpbf16_ps((__m512)acc[m][v], (__m512bh)av, (__m512bh)bv[v]);
          });
        });
      });
    unrolled<M>([&](auto m) ULMFIT_INLINE {
      unrolled<kN>([&](auto v) ULMFIT_INLINE {
        float* to = c + m * kCols + v * kLanes;
        store(to, accumulate ? load(to) + acc[m][v] : acc[m][v]);
      });
    });
  }
};

ULMFIT_END
