// AMX's tile registers in memory, so that gemm_amx.inl runs on a CPU that has AVX-512's bf16 products alone.
#pragma once

ULMFIT_BEGIN

struct TileRegister {
  alignas(64) uint8_t rows[16][64];
};
inline TileRegister& tile_register(int i) {
  static thread_local TileRegister registers[8];
  return registers[i];
}

inline void tile_configure(const uint8_t*) {}
inline void tile_release() {}
template <int R>
inline void tile_load(const void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    std::memcpy(tile_register(R).rows[i], static_cast<const char*>(p) + i * stride, 64);
}
template <int R>
inline void tile_store(void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(p) + i * stride, tile_register(R).rows[i], 64);
}
template <int R>
inline void tile_zero() {
  std::memset(&tile_register(R), 0, sizeof(TileRegister));
}
// C[m][n] += A[m][2 k] B[k][2 n] + A[m][2 k + 1] B[k][2 n + 1], all k.
template <int C, int A, int B>
inline void tile_dot() {
  for (int m = 0; m < 16; ++m) {
    VF sum = load(reinterpret_cast<const float*>(tile_register(C).rows[m]));
    for (int k = 0; k < 16; ++k) {
      const VU a = broadcast(reinterpret_cast<const uint32_t*>(tile_register(A).rows[m])[k]);
      const VU b = load(reinterpret_cast<const uint32_t*>(tile_register(B).rows[k]));
      sum = (VF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    store(reinterpret_cast<float*>(tile_register(C).rows[m]), sum);
  }
}

ULMFIT_END
