// The instructions of AVX-512, its bf16 ones included, that the kernels ask for by name, made of AVX2's.
// Included before every source by `make isas-on-cpu`, whose copies of the ISA files have the compiler's
// target lowered to AVX2: vectors of 64 bytes are then the compiler's own matter, and what is left is here.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define ULMFIT_EMULATED static inline __attribute__((always_inline, target("avx2,fma,f16c")))

namespace avx512_on_cpu {

template <class Half, class Whole>
struct Halves {
  Half low, high;
  ULMFIT_EMULATED Halves of(Whole v) {
    Halves halves;
    std::memcpy(&halves, &v, sizeof halves);
    return halves;
  }
  ULMFIT_EMULATED Whole joined(Half low, Half high) {
    const Halves halves = {low, high};
    Whole v;
    std::memcpy(&v, &halves, sizeof v);
    return v;
  }
};
using F = Halves<__m256, __m512>;
using D = Halves<__m256d, __m512d>;
using I = Halves<__m256i, __m512i>;
using H = Halves<__m128i, __m256i>;

ULMFIT_EMULATED __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  const F x = F::of(a), y = F::of(b), z = F::of(c);
  return F::joined(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high));
}
ULMFIT_EMULATED __m512d fmadd(__m512d a, __m512d b, __m512d c) {
  const D x = D::of(a), y = D::of(b), z = D::of(c);
  return D::joined(_mm256_fmadd_pd(x.low, y.low, z.low), _mm256_fmadd_pd(x.high, y.high, z.high));
}
ULMFIT_EMULATED __m512 min(__m512 a, __m512 b) {
  const F x = F::of(a), y = F::of(b);
  return F::joined(_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high));
}
ULMFIT_EMULATED __m512 max(__m512 a, __m512 b) {
  const F x = F::of(a), y = F::of(b);
  return F::joined(_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high));
}
ULMFIT_EMULATED __m512i broadcast(long long x) { return (__m512i)((__v8di){} + x); }
ULMFIT_EMULATED __m512i multiply_low_halves(__m512i a, __m512i b) {
  const I x = I::of(a), y = I::of(b);
  return I::joined(_mm256_mul_epu32(x.low, y.low), _mm256_mul_epu32(x.high, y.high));
}
ULMFIT_EMULATED __m512i widened(__m256i a) {
  const H x = H::of(a);
  return I::joined(_mm256_cvtepu16_epi32(x.low), _mm256_cvtepu16_epi32(x.high));
}
// a * 2^floor(b)
ULMFIT_EMULATED __m512 scaled(__m512 a, __m512 b) {
  for (int l = 0; l < 16; ++l)
    a[l] = std::isnan(b[l])
               ? b[l]
               : std::ldexp(a[l], static_cast<int>(std::floor(std::fmin(std::fmax(b[l], -300), 300))));
  return a;
}
ULMFIT_EMULATED __m512 from_f16(__m256i a) {
  const H x = H::of(a);
  return F::joined(_mm256_cvtph_ps(x.low), _mm256_cvtph_ps(x.high));
}
ULMFIT_EMULATED __m256i to_f16(__m512 a) {
  const F x = F::of(a);
  return H::joined(_mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT),
                   _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}

// bf16's instructions take subnormals as zeros and make none.
using U32 = uint32_t __attribute__((vector_size(64)));
using U16 = uint16_t __attribute__((vector_size(32)));
ULMFIT_EMULATED U32 flushed(U32 a) { return (a & 0x7F800000u) == 0 ? a & 0x80000000u : a; }
ULMFIT_EMULATED U16 to_bf16(__m512 v) {
  const U32 bits = flushed((U32)v);
  const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded, U16);
}
ULMFIT_EMULATED __m512bh to_bf16(__m512 high, __m512 low) {
  const U16 halves[2] = {to_bf16(low), to_bf16(high)};
  __m512bh both;
  std::memcpy(&both, halves, sizeof both);
  return both;
}
// The odd products first, then the even ones, each added in one rounding.
ULMFIT_EMULATED __m512 dot(__m512 sum, __m512bh a, __m512bh b) {
  const U32 x = (U32)a, y = (U32)b;
  sum = fmadd((__m512)flushed(x & 0xFFFF0000u), (__m512)flushed(y & 0xFFFF0000u), (__m512)flushed((U32)sum));
  sum = fmadd((__m512)flushed(x << 16), (__m512)flushed(y << 16), (__m512)flushed((U32)sum));
  return (__m512)flushed((U32)sum);
}

// Lanes of type T that the mask names.
template <class T, class V>
ULMFIT_EMULATED V load_masked(uint64_t mask, const void* p) {
  T lanes[sizeof(V) / sizeof(T)] = {};
  for (unsigned l = 0; l < sizeof(V) / sizeof(T); ++l)
    if (mask >> l & 1) std::memcpy(&lanes[l], static_cast<const T*>(p) + l, sizeof(T));
  V v;
  std::memcpy(&v, lanes, sizeof v);
  return v;
}
template <class T, class V>
ULMFIT_EMULATED void store_masked(void* p, uint64_t mask, V v) {
  T lanes[sizeof(V) / sizeof(T)];
  std::memcpy(lanes, &v, sizeof v);
  for (unsigned l = 0; l < sizeof(V) / sizeof(T); ++l)
    if (mask >> l & 1) std::memcpy(static_cast<T*>(p) + l, &lanes[l], sizeof(T));
}

}  // namespace avx512_on_cpu

#define _mm512_fmadd_ps avx512_on_cpu::fmadd
#define _mm512_fmadd_pd avx512_on_cpu::fmadd
#define _mm512_min_ps avx512_on_cpu::min
#define _mm512_max_ps avx512_on_cpu::max
#define _mm512_set1_epi64 avx512_on_cpu::broadcast
#define _mm512_mul_epu32 avx512_on_cpu::multiply_low_halves
#define _mm512_cvtepu16_epi32 avx512_on_cpu::widened
#define _mm512_scalef_ps avx512_on_cpu::scaled
#define _mm512_cvtph_ps avx512_on_cpu::from_f16
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) avx512_on_cpu::to_f16(a)
#define _mm512_cvtneps_pbh avx512_on_cpu::to_bf16
#define _mm512_cvtne2ps_pbh avx512_on_cpu::to_bf16
#define _mm512_dpbf16_ps avx512_on_cpu::dot
#define _mm512_maskz_loadu_epi16 avx512_on_cpu::load_masked<uint16_t, __m512i>
#define _mm512_maskz_loadu_epi32 avx512_on_cpu::load_masked<uint32_t, __m512i>
#define _mm512_maskz_loadu_epi64 avx512_on_cpu::load_masked<uint64_t, __m512i>
#define _mm256_maskz_loadu_epi16 avx512_on_cpu::load_masked<uint16_t, __m256i>
#define _mm512_mask_storeu_epi16 avx512_on_cpu::store_masked<uint16_t>
#define _mm512_mask_storeu_epi32 avx512_on_cpu::store_masked<uint32_t>
#define _mm512_mask_storeu_epi64 avx512_on_cpu::store_masked<uint64_t>
#define _mm256_mask_storeu_epi16 avx512_on_cpu::store_masked<uint16_t>

#define __builtin_cpu_supports(feature) 1  // dispatch.cpp's question
#endif
