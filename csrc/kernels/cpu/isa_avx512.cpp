// AVX-512 F, BW, DQ, VL: Skylake-SP (2017) and since.
#include "std.h"

#if defined(__x86_64__)
#define ULMFIT_ISA avx512
#define ULMFIT_LANES 16
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "isa.inl"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace ulmfit_fast {
const Kernels& avx512_kernels() { return avx512::table(); }
}  // namespace ulmfit_fast
#endif
