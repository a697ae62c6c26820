// The AMX tile: bf16 operands, fp32 sums, 16 x 16 results per tile register.
#pragma once
#include "gemm_bf16.inl"

#ifdef ULMFIT_AMX_ON_CPU
#include "amx_on_cpu.h"  // of the tests
#else
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
inline void tile_configure(const uint8_t* config) {
  asm volatile("ldtilecfg %0" ::"m"(*reinterpret_cast<const uint8_t (*)[64]>(config)) : "memory");
}
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }

ULMFIT_END
#endif

ULMFIT_BEGIN

struct AmxTile : Bf16Packing {
  static constexpr int kRows = 32;  // two tile registers' rows
  // An A block 288 KB, B blocks 144 KB each: in L2 together, and a result is loaded and stored for 36 steps
  // of multiplication, which hides it.
  static constexpr int kBlockRows = 128, kBlockDepth = 1152;
  static constexpr int kMostRows = 384;  // of a block that is not as deep
  static constexpr int kRowsToHide = 128;
  // Unpacked products go by AVX-512's dot products, at a small part of the tiles' rate. Not measured.
  static constexpr int64_t kUnpackedRows = 16;

  struct Session {
    Session() {
      alignas(64) uint8_t config[64] = {1};  // palette 1
      for (int r = 0; r < 8; ++r) {
        config[16 + 2 * r] = 64;  // bytes a row
        config[48 + r] = 16;      // rows
      }
      tile_configure(config);
    }
    ~Session() { tile_release(); }
  };

  static void block_product(int64_t kc, const uint16_t* a, int64_t lda, int rows, const uint16_t* b,
                            const uint16_t* next, float* c, bool accumulate, int columns = kCols) {
    // Two tiles by two: 32 rows and half a panel. All rows meet a half before
    // the other one's turn, because that half then comes from L1 at least in
    // part: with both operands from L2, loading takes longer than multiplying.
    const int whole = rows / kRows, tail = rows % kRows;
    Ahead ahead{reinterpret_cast<const char*>(next), (2 * whole + (tail > 0 ? 2 : 0))};
    for (int half = 0; 32 * half < columns; ++half)
      for (int r = 0; r < whole * kRows; r += kRows) {
        float* out = c + r * kCols + 32 * half;
        if (r + kRows < whole * kRows) expect(out + kRows * kCols);
        micro_2x2(kc, a + r * lda, lda, b + 2 * half * kTile, out, out + 16 * kCols, accumulate, ahead);
      }
    if (tail == 0) return;
    a += whole * kRows * lda;
    c += whole * kRows * kCols;
    if (tail <= 16) return micro_1x4(kc, a, b, c, tail, accumulate, ahead);
    // The caller's tile has room for `tail` rows alone; the last, partial one goes through a buffer.
    alignas(64) float edge[16 * kCols];
    if (accumulate) std::memcpy(edge, c + 16 * kCols, (tail - 16) * kCols * sizeof(float));
    for (int half = 0; 32 * half < columns; ++half)
      micro_2x2(kc, a, lda, b + 2 * half * kTile, c + 32 * half, edge + 32 * half, accumulate, ahead);
    std::memcpy(c + 16 * kCols, edge, (tail - 16) * kCols * sizeof(float));
  }

 private:
  // The next B block, 4 KB for every 32 of depth, fetched into L2 in even shares by the calls on this one.
  struct Ahead {
    const char* at;
    int calls;
    void fetch(int lines) {
      for (int line = 0; line < lines; ++line, at += 64) __builtin_prefetch(at, 0, 2);
    }
  };
  // Results that are about to be stored, or read and stored, and may lie far away.
  static void expect(const float* c) {
    for (int row = 0; row < kRows; ++row, c += kCols) {
      __builtin_prefetch(c, 1);
      __builtin_prefetch(c + 16, 1);
    }
  }
  static void micro_2x2(int64_t kc, const uint16_t* a, int64_t lda, const uint16_t* b, float* c0, float* c1,
                        bool accumulate, Ahead& ahead) {
    constexpr int64_t ld = kCols * sizeof(float);
    const int lines = 64 / ahead.calls;
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
    for (int64_t k = 0; k < kc; k += 32, a += kTile, b += 4 * kTile) {
      ahead.fetch(lines);
      tile_load<4>(a, 64);
      tile_load<5>(b, 64);
      tile_load<6>(b + kTile, 64);
      tile_dot<0, 4, 5>();
      tile_dot<1, 4, 6>();
      tile_load<7>(a + 16 * lda, 64);
      tile_dot<2, 7, 5>();
      tile_dot<3, 7, 6>();
    }
    tile_store<0>(c0, ld);
    tile_store<1>(c0 + 16, ld);
    tile_store<2>(c1, ld);
    tile_store<3>(c1 + 16, ld);
  }
  static void micro_1x4(int64_t kc, const uint16_t* a, const uint16_t* b, float* out, int m, bool accumulate,
                        Ahead& ahead) {
    constexpr int64_t ld = kCols * sizeof(float);
    const int lines = 2 * (64 / ahead.calls);
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
      ahead.fetch(lines);
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
