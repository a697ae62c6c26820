// The dot tile: bf16 operands, fp32 sums, two products an element and instruction (AVX-512's vdpbf16ps).
#pragma once
#include "gemm.inl"

ULMFIT_BEGIN

struct DotTile {
  using Compute = float;
  using Packed = uint16_t;  // bf16 bits
  using Element = uint16_t;
  static constexpr DType kElement = DType::bf16;
  static constexpr int kVecs = 4, kCols = 64;
  static constexpr int kDepth = 32;  // packed in squares of 16 x 16 pairs
  static constexpr int kRows = 6;    // 24 sums, 4 vectors of B and a broadcast in 32 registers
  // About as many bytes as the FMA tile: an A block 288 KB, B blocks 96 KB each.
  static constexpr int kBlockRows = 192, kBlockDepth = 768, kMostRows = 384;

  struct Session {};

  // A: row-major. B panel: [k / 2][kCols][2].
  static constexpr int kRowGroup = 1;
  static int64_t a_elements(int64_t rows, int64_t K) { return rows * K; }
  static int64_t a_offset(int64_t k) { return k; }
  static int64_t b_elements(int64_t K) { return K * kCols; }
  static void store_a(uint16_t* a, int64_t K, int64_t row, int64_t k, const uint16_t* values, int64_t n) {
    std::memcpy(a + row * K + k, values, n * sizeof(uint16_t));
  }
  static void load_a(const uint16_t* a, int64_t K, int64_t row, int64_t k, int64_t n, uint16_t* values) {
    std::memcpy(values, a + row * K + k, n * sizeof(uint16_t));
  }
  static void store_a_vector(uint16_t* a, int64_t K, int64_t row, int64_t k, VF v, int n) {
    store_as<float>(DType::bf16, a, row * K + k, v, n);
  }
  // tmp = [n = 32 depths][ld rows]; rows up to a multiple of 16 are there.
  static void store_a_columns(uint16_t* a, int64_t K, int rows, int64_t k, int n, const uint16_t* tmp,
                              int64_t ld) {
    alignas(64) uint32_t pairs[16 * 16];
    for (int64_t r0 = 0; r0 < rows; r0 += 16) {
      for (int j = 0; j < 16; ++j) store(pairs + 16 * j, pair_rows(tmp + 2 * j * ld + r0, ld));
      transpose_block(pairs, 16, pairs, 16);
      for (int64_t r = r0; r < r0 + 16 && r < rows; ++r)
        std::memcpy(a + r * K + k, pairs + (r - r0) * 16, 32 * sizeof(uint16_t));
    }
  }
  static void store_b_columns(uint16_t* b, int64_t k0, int n, const uint16_t* tmp, int64_t ld) {
    for (int k = 0; k < n; k += 32)
      for (int c = 0; c < kCols; c += 16)
        transpose_block(reinterpret_cast<const uint32_t*>(tmp + c * ld + k), ld / 2,
                        reinterpret_cast<uint32_t*>(b + (k0 + k) * kCols) + c, kCols);
  }
  static void store_b_rows(uint16_t* b, int64_t k, const uint16_t* rows) {
    for (int j = 0; j < kDepth; j += 2)
      for (int c = 0; c < kCols; c += 16)
        store(reinterpret_cast<uint32_t*>(b + (k + j) * kCols) + c, pair_rows(rows + j * kCols + c, kCols));
  }

  static void block_product(int64_t kc, const uint16_t* a, int64_t lda, int rows, const uint16_t* b,
                            const uint16_t* next, float* c, bool accumulate) {
    constexpr int kAheadCalls = 4;  // as the FMA tile's: a line of `next` for each pair of k
    for (int r = 0, call = 0; r < rows; r += kRows, ++call, a += kRows * lda, c += kRows * kCols) {
      const uint16_t* from = call < kAheadCalls ? next + call * kc * kCols / kAheadCalls : b;
      const char* ahead = reinterpret_cast<const char*>(from);
      switch (rows - r) {
        case 1: micro<1>(kc, a, lda, b, c, accumulate, ahead); break;
        case 2: micro<2>(kc, a, lda, b, c, accumulate, ahead); break;
        case 3: micro<3>(kc, a, lda, b, c, accumulate, ahead); break;
        case 4: micro<4>(kc, a, lda, b, c, accumulate, ahead); break;
        case 5: micro<5>(kc, a, lda, b, c, accumulate, ahead); break;
        default: micro<6>(kc, a, lda, b, c, accumulate, ahead);
      }
    }
  }

 private:
  template <int M>
  static void micro(int64_t kc, const uint16_t* a, int64_t lda, const uint16_t* b, float* c, bool accumulate,
                    const char* ahead) {
    VF acc[M][kVecs] = {};
    for (int64_t k = 0; k < kc; k += 2, b += 2 * kCols) {
      __builtin_prefetch(ahead + k * 32, 0, 2);
      VU bv[kVecs];
      for (int v = 0; v < kVecs; ++v) bv[v] = load(reinterpret_cast<const uint32_t*>(b) + v * kLanes);
      for (int m = 0; m < M; ++m) {
        uint32_t pair;
        std::memcpy(&pair, a + m * lda + k, sizeof pair);
        const VU av = VU{} + pair;
        for (int v = 0; v < kVecs; ++v)
          acc[m][v] = (VF)_mm512_dpbf16_ps((__m512)acc[m][v], (__m512bh)av, (__m512bh)bv[v]);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kVecs; ++v) {
        float* to = c + m * kCols + v * kLanes;
        store(to, accumulate ? load(to) + acc[m][v] : acc[m][v]);
      }
  }
};

ULMFIT_END
