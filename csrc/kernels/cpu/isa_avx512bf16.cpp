// AVX-512 with its bf16 instructions: Cooper Lake (2020), Zen 4 (2022), and since.
#include "std.h"

#if defined(__x86_64__)
#define ULMFIT_BF16
#define ULMFIT_ISA avx512bf16
#define ULMFIT_PARENT avx512
#define ULMFIT_LANES 16
#ifdef __clang__
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")
#endif
#include "isa.inl"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace ulmfit_fast {
const Kernels& avx512bf16_kernels() { return avx512bf16::table(); }
}  // namespace ulmfit_fast
#endif
