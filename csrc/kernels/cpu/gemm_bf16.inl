// How bf16 operands lie in memory where instructions multiply pairs of them: in tiles of 1 KB, each of which
// fills an AMX register.
#pragma once
#include "gemm.inl"

ULMFIT_BEGIN

struct Bf16Packing {
  using Compute = float;
  using Packed = uint16_t;  // bf16 bits
  using Element = uint16_t;
  static constexpr DType kElement = DType::bf16;
  static constexpr int kVecs = 4;
  static constexpr int kCols = 64;   // four tiles' columns
  static constexpr int kDepth = 32;  // a tile row: 32 bf16, a cache line
  static constexpr bool kPlain = false, kSparse = false;
  static constexpr int kTile = 16 * 32;  // elements of a tile

  // A: tiles [row / 16][k / 32] of [16][32].
  static constexpr int kRowGroup = 16;
  static int64_t a_elements(int64_t rows, int64_t K) { return round_up(rows, kRowGroup) * K; }
  static int64_t a_offset(int64_t k) { return 16 * k; }
  // f(place in A, offset in the values, how many) for each tile's part of n values at (row, k).
  template <class F>
  static void for_runs(int64_t K, int64_t row, int64_t k, int64_t n, F&& f) {
    const int64_t line = row / 16 * 16 * K + row % 16 * 32;
    for (int64_t j = 0; j < n;) {
      const int64_t in_tile = 32 - (k + j) % 32, run = n - j < in_tile ? n - j : in_tile;
      f(line + (k + j) / 32 * kTile + (k + j) % 32, j, run);
      j += run;
    }
  }
  static void store_a(uint16_t* a, int64_t K, int64_t row, int64_t k, const uint16_t* values, int64_t n) {
    for_runs(K, row, k, n, [&](int64_t at, int64_t j, int64_t run) { copy_run(a + at, values + j, run); });
  }
  static void load_a(const uint16_t* a, int64_t K, int64_t row, int64_t k, int64_t n, uint16_t* values) {
    for_runs(K, row, k, n, [&](int64_t at, int64_t j, int64_t run) { copy_run(values + j, a + at, run); });
  }
  static void store_a_vector(uint16_t* a, int64_t K, int64_t row, int64_t k, VF v, int n) {
    const VH bits = to_bf16(v);
    if (n == kLanes && k % 32 <= 16) {
      std::memcpy(a + row / 16 * 16 * K + row % 16 * 32 + k / 32 * kTile + k % 32, &bits, sizeof bits);
    } else {  // at an edge or across two tiles
      alignas(64) uint16_t values[kLanes];
      std::memcpy(values, &bits, sizeof bits);
      for_runs(K, row, k, n, [&](int64_t at, int64_t j, int64_t run) {
        std::memcpy(a + at, values + j, run * sizeof(uint16_t));
      });
    }
  }
  // Runs along the depth, for products with a weight that is not packed. A's go on with zeros at its end.
  static constexpr int kRun = 32;
  static VU load_run(DType dtype, const void* row, int64_t k, int n) {
    if (dtype == DType::bf16) return (VU)load_n(static_cast<const uint16_t*>(row) + k, n);
    const VF low = load_as<float>(dtype, row, k, n < 16 ? n : 16);
    const VF high = n > 16 ? load_as<float>(dtype, row, k + 16, n - 16) : VF{};
    return (VU)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
  static VU load_packed_run(const uint16_t* a, int64_t K, int64_t row, int64_t k, int) {
    return load(reinterpret_cast<const uint32_t*>(a + row / 16 * 16 * K + k / 32 * kTile + row % 16 * 32));
  }
  static VF multiply_run(VU x, VU w, VF sum) {
    return (VF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
  // tmp = [n = 32 depths][ld rows]; rows up to a multiple of 16 are there.
  static void store_a_columns(uint16_t* a, int64_t K, int rows, int64_t k, int n, const uint16_t* tmp,
                              int64_t ld) {
    for (int64_t r = 0; r < rows; r += 16) columns_to_tile(tmp + r, ld, a + r * K + k / 32 * kTile);
  }
  // B panel: tiles [k / 32][column / 16] of [16 pairs of k][16 columns][2].
  static int64_t b_elements(int64_t K) { return K * kCols; }
  static void store_b_columns(uint16_t* b, int64_t k0, int n, const uint16_t* tmp, int64_t ld) {
    for (int k = 0; k < n; k += 32)
      for (int c = 0; c < kCols; c += 16)
        rows_to_pairs_tile(tmp + c * ld + k, ld, b + (k0 + k) / 32 * 4 * kTile + c / 16 * kTile);
  }
  static void store_b_rows(uint16_t* b, int64_t k, const uint16_t* rows) {
    for (int c = 0; c < kCols; c += 16) pairs_tile(rows + c, kCols, b + k / 32 * 4 * kTile + c / 16 * kTile);
  }

  // Three ways to fill a tile: out[row][k] = in[k][row]; out[k / 2][column][k % 2] = in[column][k], and the
  // same = in[k][column].
  static void columns_to_tile(const uint16_t* in, int64_t ld, uint16_t* out) {
    alignas(64) uint32_t pairs[16 * 16];
    for (int j = 0; j < 16; ++j) store(pairs + 16 * j, pair_rows(in + 2 * j * ld, ld));
    transpose_block(pairs, 16, reinterpret_cast<uint32_t*>(out), 16);
  }
  static void rows_to_pairs_tile(const uint16_t* in, int64_t ld, uint16_t* out) {
    transpose_block(reinterpret_cast<const uint32_t*>(in), ld / 2, reinterpret_cast<uint32_t*>(out), 16);
  }
  static void pairs_tile(const uint16_t* in, int64_t ld, uint16_t* out) {
    for (int j = 0; j < 16; ++j)
      store(reinterpret_cast<uint32_t*>(out + 32 * j), pair_rows(in + 2 * j * ld, ld));
  }

 private:
  static void copy_run(uint16_t* to, const uint16_t* from, int64_t n) {
    if (n == 32) {  // a constant size, so a move; the other is a call
      std::memcpy(to, from, 64);
    } else {
      std::memcpy(to, from, n * 2);
    }
  }
};

ULMFIT_END
