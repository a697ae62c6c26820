// AVX-512 with AMX tiles for bf16: Sapphire Rapids (2023) and since.
#include "std.h"

#if defined(__x86_64__)
#define ULMFIT_AMX
#define ULMFIT_BF16
#define ULMFIT_ISA amx
#define ULMFIT_PARENT avx512
#define ULMFIT_LANES 16
#ifdef __clang__
#pragma clang attribute push(                                                                      \
    __attribute__((                                                                                \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16")
#endif
#include "isa.inl"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace ulmfit_fast {
const Kernels& amx_kernels() { return amx::table(); }
}  // namespace ulmfit_fast
#endif
