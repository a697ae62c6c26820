// The blocked matrix product on 128-bit vectors. What other instruction sets change is the micro-kernel,
// which test_lstm.cpp runs for each, and test_gemm_bf16.cpp where it multiplies pairs of bf16.
#define ULMFIT_ISA gemm_test
#define ULMFIT_LANES 4
#include "kernels/cpu/std.h"  // first: the others take its headers for granted

#include "check.h"
#include "kernels/cpu/gemm.inl"
#include "gemm_check.h"

using namespace ulmfit_fast;
using namespace ulmfit_fast::gemm_test;

int main() {
  const auto check = [](int64_t M, int64_t N, int64_t K) {
    check_product<FmaTile<float>>(M, N, K);
    check_product<FmaTile<double>>(M, N, K);
  };
  for (int64_t M : {1, 2, 7, 25})
    for (int64_t N : {1, 16, 32, 33, 80})
      for (int64_t K : {1, 5, 64, 65}) check(M, N, K);
  check(30, 300, 1300);  // several depth blocks, groups of panels and row blocks
}
