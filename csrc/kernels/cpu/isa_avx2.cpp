// AVX2 with FMA and F16C: Haswell (2013) and Zen, and everything since.
#include "std.h"

#if defined(__x86_64__)
#define ULMFIT_ISA avx2
#define ULMFIT_LANES 8
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "isa.inl"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace ulmfit_fast {
const Kernels& avx2_kernels() { return avx2::table(); }
}  // namespace ulmfit_fast
#endif
