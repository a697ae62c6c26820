// The blocked product with the tiles that multiply pairs of bf16: vdpbf16ps's, AMX's and the three products
// of "high". AMX's registers are emulated here, so that its code is tested wherever the former instruction
// is.
#include "kernels/cpu/std.h"  // first: the others take its headers for granted

#include "check.h"

#if defined(__x86_64__)
#define ULMFIT_AMX_ON_CPU
#define ULMFIT_AMX
#define ULMFIT_BF16
#define ULMFIT_ISA gemm_bf16_test
#define ULMFIT_LANES 16
#ifdef __clang__
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")
#endif
#include "kernels/cpu/gemm_split.inl"
#include "kernels/cpu/gemm_dot.inl"
#include "gemm_check.h"

namespace ulmfit_fast::gemm_bf16_test {
void run() {
  constexpr double kSplit = 1.0 / (1 << 16);  // of two factors what high + low leave, and low * low
  const auto check = [](int64_t M, int64_t N, int64_t K) {
    check_product<DotTile>(M, N, K);
    check_product<AmxTile>(M, N, K);
    check_product<SplitTile>(M, N, K, kSplit);
  };
  for (int64_t M : {1, 15, 17, 33, 48})
    for (int64_t N : {1, 32, 48, 65})
      for (int64_t K : {1, 31, 64, 130}) check(M, N, K);
  check(200, 130, 1300);  // several depth blocks, panels and row blocks
  check(20, 700, 1300);   // groups of panels, not all of one size
}
}  // namespace ulmfit_fast::gemm_bf16_test
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

int main() {
  if (ulmfit_fast::kernels_for("avx512bf16") != nullptr) return ulmfit_fast::gemm_bf16_test::run(), 0;
  std::printf("skipped: this CPU has no AVX-512 bf16\n");
}
#else
int main() {}
#endif
