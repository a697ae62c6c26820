// The AMX tile: bf16 operands, fp32 sums, 16 x 16 results per tile register.
#pragma once
#include "gemm.inl"

ULMFIT_BEGIN

// GCC's tile intrinsics declare too little of the memory they touch (tile configuration: 8 of 64 bytes;
// loads: none), so stores before them can be dropped. These say "memory".
template <int R>
ULMFIT_HD void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(R) : "memory");
}
template <int R>
ULMFIT_HD void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(R) : "memory");
}
template <int R>
ULMFIT_HD void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(R));
}
template <int C, int A, int B>
ULMFIT_HD void tile_dot() {  // C += A * B
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

struct AmxTile {
  using Compute = float;
  using Packed = uint16_t;  // bf16 bits
  using Element = uint16_t;
  static constexpr DType kElement = DType::bf16;
  static constexpr int kVecs = 4;
  static constexpr int kCols = 64;   // four tile registers' columns
  static constexpr int kDepth = 32;  // a tile row: 32 bf16
  static constexpr int kRows = 32;   // two tile registers' rows
  // A block 192 KB, B blocks 96 KB each, in L2 together.
  static constexpr int kBlockRows = 128, kBlockDepth = 768;
  static constexpr int kAheadCalls = 2;
  static constexpr int kTile = 16 * 32;  // elements of one operand tile, 1 KB

  struct Session {
    Session() {
      alignas(64) uint8_t config[64] = {1};  // palette 1
      for (int r = 0; r < 8; ++r) {
        config[16 + 2 * r] = 64;  // bytes a row
        config[48 + r] = 16;      // rows
      }
      asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    ~Session() { asm volatile("tilerelease" ::: "memory"); }
  };

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
  // tmp = [n = 32 depths][ld rows]; rows up to a multiple of 16 are there.
  static void store_a_columns(uint16_t* a, int64_t K, int rows, int64_t k, int n, const uint16_t* tmp,
                              int64_t ld) {
    alignas(64) uint32_t pairs[16 * 16];
    for (int64_t r = 0; r < rows; r += 16) {
      for (int j = 0; j < n; j += 2) store(pairs + j / 2 * 16, pair_rows(tmp + j * ld + r, ld));
      transpose_block(pairs, 16, reinterpret_cast<uint32_t*>(a + r * K + k / 32 * kTile), 16);
    }
  }
  // B panel: tiles [k / 32][column / 16] of [16 pairs of k][16 columns][2].
  static int64_t b_elements(int64_t K) { return K * kCols; }
  static void store_b_columns(uint16_t* b, int64_t k0, int n, const uint16_t* tmp, int64_t ld) {
    for (int k = 0; k < n; k += 32)
      for (int c = 0; c < kCols; c += 16)
        transpose_block(reinterpret_cast<const uint32_t*>(tmp + c * ld + k), ld / 2,
                        reinterpret_cast<uint32_t*>(b + (k0 + k) / 32 * 4 * kTile + c / 16 * kTile), 16);
  }
  static void store_b_rows(uint16_t* b, int64_t k, const uint16_t* rows) {
    for (int r = 0; r < kDepth; r += 2)
      for (int c = 0; c < kCols; c += 16)
        store(reinterpret_cast<uint32_t*>(b + k / 32 * 4 * kTile + c / 16 * kTile + r / 2 * 32),
              pair_rows(rows + r * kCols + c, kCols));
  }

  static void micro(int64_t kc, const uint16_t* a, int64_t lda, int64_t row0, int m, const uint16_t* b,
                    float* c, bool accumulate, const char* ahead) {
    const uint16_t* a0 = a + row0 * lda;
    if (m <= 16) return micro_16(kc, a0, b, c, m, accumulate, ahead);
    const uint16_t* a1 = a0 + 16 * lda;
    // The caller's tile has room for m rows alone; the last, partial one goes through a buffer.
    alignas(64) float edge[16 * kCols];
    float* c1 = m == 32 ? c + 16 * kCols : edge;
    if (accumulate && m < 32) std::memcpy(edge, c + 16 * kCols, (m - 16) * kCols * sizeof(float));
    for (int half = 0; half < 2; ++half)
      micro_2x2(kc, a0, a1, b + 2 * half * kTile, c + 32 * half, c1 + 32 * half, accumulate,
                ahead + half * kc * 32);
    if (m < 32) std::memcpy(c + 16 * kCols, edge, (m - 16) * kCols * sizeof(float));
  }

 private:
  static void copy_run(uint16_t* to, const uint16_t* from, int64_t n) {
    if (n == 32) {  // a constant size, so a move; the other is a call
      std::memcpy(to, from, 64);
    } else {
      std::memcpy(to, from, n * 2);
    }
  }
  // 16 columns of two rows, side by side.
  static VU pair_rows(const uint16_t* rows, int64_t ld) {
    VH low, high;
    std::memcpy(&low, rows, sizeof low);
    std::memcpy(&high, rows + ld, sizeof high);
    return __builtin_convertvector(low, VU) | (__builtin_convertvector(high, VU) << 16);
  }
  static void micro_2x2(int64_t kc, const uint16_t* a0, const uint16_t* a1, const uint16_t* b, float* c0,
                        float* c1, bool accumulate, const char* ahead) {
    constexpr int64_t ld = kCols * sizeof(float);
    if (accumulate) {
      tile_load<0>(c0, ld);
      tile_load<1>(c0 + 16, ld);
      tile_load<2>(c1, ld);
      tile_load<3>(c1 + 16, ld);
    } else {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    for (int64_t k = 0; k < kc; k += 32, a0 += kTile, a1 += kTile, b += 4 * kTile) {
      for (int line = 0; line < 16; ++line) __builtin_prefetch(ahead + k * 32 + line * 64, 0, 2);
      tile_load<4>(a0, 64);
      tile_load<5>(b, 64);
      tile_load<6>(b + kTile, 64);
      tile_dot<0, 4, 5>();
      tile_dot<1, 4, 6>();
      tile_load<7>(a1, 64);
      tile_dot<2, 7, 5>();
      tile_dot<3, 7, 6>();
    }
    tile_store<0>(c0, ld);
    tile_store<1>(c0 + 16, ld);
    tile_store<2>(c1, ld);
    tile_store<3>(c1 + 16, ld);
  }
  static void micro_16(int64_t kc, const uint16_t* a, const uint16_t* b, float* out, int m, bool accumulate,
                       const char* ahead) {
    constexpr int64_t ld = kCols * sizeof(float);
    alignas(64) float edge[16 * kCols];
    float* c = m == 16 ? out : edge;
    if (accumulate) {
      if (m < 16) std::memcpy(edge, out, m * ld);
      tile_load<0>(c, ld);
      tile_load<1>(c + 16, ld);
      tile_load<2>(c + 32, ld);
      tile_load<3>(c + 48, ld);
    } else {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    for (int64_t k = 0; k < kc; k += 32, a += kTile, b += 4 * kTile) {
      for (int line = 0; line < 32; ++line) __builtin_prefetch(ahead + k * 64 + line * 64, 0, 2);
      tile_load<4>(a, 64);
      tile_load<5>(b, 64);
      tile_dot<0, 4, 5>();
      tile_load<6>(b + kTile, 64);
      tile_dot<1, 4, 6>();
      tile_load<7>(b + 2 * kTile, 64);
      tile_dot<2, 4, 7>();
      tile_load<5>(b + 3 * kTile, 64);
      tile_dot<3, 4, 5>();
    }
    tile_store<0>(c, ld);
    tile_store<1>(c + 16, ld);
    tile_store<2>(c + 32, ld);
    tile_store<3>(c + 48, ld);
    if (m < 16) std::memcpy(out, edge, m * ld);
  }
};

ULMFIT_END
