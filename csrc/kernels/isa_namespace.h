// The namespace of what is compiled once for each instruction set: one inline copy for each.
//
// An ISA file (cpu/isa_*.cpp) defines ULMFIT_ISA before it includes the
// sources. Because the name differs, the linker cannot merge an AVX-512 copy
// of an inline function with a baseline one, which would crash an older CPU.
#pragma once

#ifndef ULMFIT_ISA
#define ULMFIT_ISA plain  // CUDA, the C++ tests, torch glue: no SIMD
#endif

#define ULMFIT_BEGIN      \
  namespace ulmfit_fast { \
  inline namespace ULMFIT_ISA {
#define ULMFIT_END \
  }                \
  }

#if defined(__CUDACC__)
#define ULMFIT_HD __host__ __device__ __forceinline__
#define ULMFIT_INLINE __attribute__((always_inline))  // of a lambda: stands behind its parameters
#elif defined(__SANITIZE_ADDRESS__)
// An access is a dozen instructions there: with everything inlined a file compiles for minutes.
#define ULMFIT_HD inline
#define ULMFIT_INLINE
#else
#define ULMFIT_HD inline __attribute__((always_inline))
#define ULMFIT_INLINE __attribute__((always_inline))
#endif
