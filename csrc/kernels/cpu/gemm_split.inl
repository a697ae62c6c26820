// fp32 products by three bf16 ones ("bf16x3", torch's "high" matmul precision): every operand is the sum of
// two bf16 numbers, high and low, and low * low is left out. Relative error about 5e-6, a few times fp32's
// own, at a multiple of its speed where there are AMX tiles.
#pragma once
#include "gemm_amx.inl"

ULMFIT_BEGIN

struct SplitTile : AmxTile {
  using Element = float;
  static constexpr DType kElement = DType::f32;
  // An A block (288 KB) and two B blocks (144 KB each) stay in L2 together.
  static constexpr int kBlockDepth = 576;
  static constexpr int64_t kUnpackedRows = 0;  // never asked: so few rows are the FMA tile's (isa.inl)

  // A: as AmxTile's, each tile with its low part after it. B: [k / 32][column / 16][high, low].
  static int64_t a_elements(int64_t rows, int64_t K) { return 2 * AmxTile::a_elements(rows, K); }
  static int64_t a_offset(int64_t k) { return 2 * AmxTile::a_offset(k); }
  static int64_t b_elements(int64_t K) { return 2 * AmxTile::b_elements(K); }

  static void split(VF v, VH& high, VH& low) {
    high = to_bf16(v);
    low = to_bf16(v - from_bf16(high));
  }
  static void store_a(uint16_t* a, int64_t K, int64_t row, int64_t k, const float* values, int64_t n) {
    for (int64_t j = 0; j < n;) {
      const int64_t in_half = 16 - (k + j) % 16, run = n - j < in_half ? n - j : in_half;
      store_part(a, K, row, k + j, load_n(values + j, static_cast<int>(run)), run);
      j += run;
    }
  }
  static void load_a(const uint16_t* a, int64_t K, int64_t row, int64_t k, int64_t n, float* values) {
    for (int64_t j = 0; j < n;) {
      const int64_t in_half = 16 - (k + j) % 16, run = n - j < in_half ? n - j : in_half;
      const int64_t at = place(K, row, k + j);
      const int lanes = static_cast<int>(run);
      store_n(values + j,
              load_as<float>(DType::bf16, a, at, lanes) + load_as<float>(DType::bf16, a, at + kTile, lanes),
              lanes);
      j += run;
    }
  }
  static void store_a_vector(uint16_t* a, int64_t K, int64_t row, int64_t k, VF v, int n) {
    if (k % 16 + n <= 16) return store_part(a, K, row, k, v, n);
    alignas(64) float values[kLanes];
    store(values, v);
    store_a(a, K, row, k, values, n);
  }
  static void store_a_columns(uint16_t* a, int64_t K, int rows, int64_t k, int n, const float* tmp,
                              int64_t ld) {
    alignas(64) uint16_t planes[2][32 * 16];
    for (int64_t r = 0; r < rows; r += 16) {
      for (int j = 0; j < 32; ++j) split_to(load(tmp + j * ld + r), planes, j * 16);
      for (int plane = 0; plane < 2; ++plane)
        columns_to_tile(planes[plane], 16, a + 2 * r * K + k / 32 * 2 * kTile + plane * kTile);
    }
  }
  static void store_b_columns(uint16_t* b, int64_t k0, int n, const float* tmp, int64_t ld) {
    alignas(64) uint16_t planes[2][16 * 32];
    for (int k = 0; k < n; k += 32)
      for (int c = 0; c < kCols; c += 16) {
        for (int j = 0; j < 16; ++j)
          for (int i = 0; i < 32; i += 16) split_to(load(tmp + (c + j) * ld + k + i), planes, j * 32 + i);
        for (int plane = 0; plane < 2; ++plane)
          rows_to_pairs_tile(planes[plane], 32, b_tile(b, k0 + k, c) + plane * kTile);
      }
  }
  static void store_b_rows(uint16_t* b, int64_t k, const float* rows) {
    alignas(64) uint16_t planes[2][32 * 16];
    for (int c = 0; c < kCols; c += 16) {
      for (int j = 0; j < 32; ++j) split_to(load(rows + j * kCols + c), planes, j * 16);
      for (int plane = 0; plane < 2; ++plane) pairs_tile(planes[plane], 16, b_tile(b, k, c) + plane * kTile);
    }
  }

  static void block_product(int64_t kc, const uint16_t* a, int64_t lda, int rows, const uint16_t* b,
                            const uint16_t* next, float* c, bool accumulate, int columns = kCols) {
    // The next B block, 8 KB for every 32 of depth, comes into L2 in even shares meanwhile.
    const char* ahead = reinterpret_cast<const char*>(next);
    const int lines = static_cast<int>(128 / (2 * ceil_div(rows, kRows)));
    alignas(64) float edge[kRows * kCols];
    for (int half = 0; 32 * half < columns; ++half)
      for (int r = 0; r < rows; r += kRows) {
        const int m = rows - r < kRows ? rows - r : kRows;
        float *c0 = c + r * kCols, *out = m < kRows ? edge : c0;  // the caller has room for m rows alone
        if (m < kRows && accumulate) std::memcpy(edge, c0, m * kCols * sizeof(float));
        micro(kc, a + 2 * r * lda, m > 16 ? 2 * 16 * lda : 0, b + 4 * half * kTile, out + 32 * half,
              accumulate, ahead, lines);
        ahead += kc / 32 * lines * 64;
        if (m == kRows) continue;
        for (int i = 0; i < m; ++i)
          std::memcpy(c0 + i * kCols + 32 * half, edge + i * kCols + 32 * half, 128);
      }
  }

 private:
  static int64_t place(int64_t K, int64_t row, int64_t k) {
    return 2 * (row / 16 * 16 * K + k / 32 * kTile) + row % 16 * 32 + k % 32;
  }
  static uint16_t* b_tile(uint16_t* b, int64_t k, int c) { return b + (k / 32 * 4 + c / 16) * 2 * kTile; }
  static void store_part(uint16_t* a, int64_t K, int64_t row, int64_t k, VF v, int64_t n) {
    VH high, low;
    split(v, high, low);
    const int64_t at = place(K, row, k);
    std::memcpy(a + at, &high, n * sizeof(uint16_t));
    std::memcpy(a + at + kTile, &low, n * sizeof(uint16_t));
  }
  template <int N>
  static void split_to(VF v, uint16_t (&planes)[2][N], int at) {
    VH high, low;
    split(v, high, low);
    std::memcpy(planes[0] + at, &high, sizeof high);
    std::memcpy(planes[1] + at, &low, sizeof low);
  }

  // 32 rows (the second 16 of them `second` elements after the first) by 32 columns: ten loads for twelve
  // products a step.
  static void micro(int64_t kc, const uint16_t* a, int64_t second, const uint16_t* b, float* c,
                    bool accumulate, const char* ahead, int lines) {
    constexpr int64_t ld = kCols * sizeof(float);
    if (accumulate) {
      tile_load<0>(c, ld);
      tile_load<1>(c + 16, ld);
      tile_load<2>(c + 16 * kCols, ld);
      tile_load<3>(c + 16 * kCols + 16, ld);
    } else {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    for (int64_t k = 0; k < kc; k += 32, a += 2 * kTile, b += 8 * kTile) {
      for (int line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
      tile_load<4>(a, 64);
      tile_load<6>(b, 64);
      tile_dot<0, 4, 6>();  // high * high
      tile_load<7>(b + 2 * kTile, 64);
      tile_dot<1, 4, 7>();
      tile_load<5>(a + second, 64);
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
      tile_load<4>(a + kTile, 64);
      tile_dot<0, 4, 6>();  // low * high
      tile_dot<1, 4, 7>();
      tile_load<5>(a + second + kTile, 64);
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
      tile_load<4>(a, 64);
      tile_load<6>(b + kTile, 64);
      tile_dot<0, 4, 6>();  // high * low
      tile_load<7>(b + 3 * kTile, 64);
      tile_dot<1, 4, 7>();
      tile_load<5>(a + second, 64);
      tile_dot<2, 5, 6>();
      tile_dot<3, 5, 7>();
    }
    tile_store<0>(c, ld);
    tile_store<1>(c + 16, ld);
    tile_store<2>(c + 16 * kCols, ld);
    tile_store<3>(c + 16 * kCols + 16, ld);
  }
};

ULMFIT_END
