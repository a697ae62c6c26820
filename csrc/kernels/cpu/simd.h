// A thin SIMD wrapper: compiler vector types of ULMFIT_LANES
// floats, and the few operations that need an intrinsic.
//
// Included once per ISA file, inside its `#pragma GCC target` region; standard
// headers and <immintrin.h> come before. +, -, *, /, comparisons and ?: are the
// compiler's own on these types, so only what C++ cannot say is written here.
#pragma once

#include "../isa_namespace.h"
#include "kernels.h"

ULMFIT_BEGIN

constexpr int kLanes = ULMFIT_LANES;  // floats in a vector; doubles: half as many

// f(0), ..., f(N - 1) with constants. GCC keeps an array of vectors in registers only where every index is a
// constant from the first, not where a loop turns out to be unrolled later.
template <int N, class F>
ULMFIT_HD void unrolled(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      ULMFIT_INLINE { (f(std::integral_constant<int, i>()), ...); }(std::make_integer_sequence<int, N>());
}

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T>
constexpr int lanes_of = kLanes * 4 / static_cast<int>(sizeof(T));
template <class T>
using Vec = typename VectorOf<T, lanes_of<T>>::type;

using VF = Vec<float>;
using VD = Vec<double>;
using VU = Vec<uint32_t>;
using VI = Vec<int32_t>;
using VW = Vec<uint64_t>;
using VH = typename VectorOf<uint16_t, kLanes>::type;  // 16-bit storage of one VF

template <class T>
ULMFIT_HD Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T, lanes_of<T>>::unaligned*>(p);
}
template <class T>
ULMFIT_HD void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T, lanes_of<T>>::unaligned*>(p) = v;
}
// Masked loads and stores; without them a length that the compiler does not know makes a call of memcpy.
// GCC's address sanitizer does not see what they touch.
#if ULMFIT_LANES == 16 && !defined(__SANITIZE_ADDRESS__)
#define ULMFIT_MASKED
#endif
// The first n lanes only; the others read as zero and are not written.
template <class T>
ULMFIT_HD Vec<T> load_n(const T* p, int n) {
  if (n >= lanes_of<T>) return load(p);
#ifdef ULMFIT_MASKED
  if constexpr (sizeof(T) == 2) return (Vec<T>)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_epi32((1u << n) - 1, p);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_loadu_epi64((1u << n) - 1, p);
#endif
  Vec<T> v = {};
  __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}
template <class T>
ULMFIT_HD void store_n(T* p, Vec<T> v, int n) {
  if (n >= lanes_of<T>) return store(p, v);
#ifdef ULMFIT_MASKED
  if constexpr (sizeof(T) == 2) return _mm512_mask_storeu_epi16(p, (1u << n) - 1, (__m512i)v);
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_epi32(p, (1u << n) - 1, (__m512i)v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_epi64(p, (1u << n) - 1, (__m512i)v);
#endif
  __builtin_memcpy(p, &v, n * sizeof(T));
}
template <class T>
ULMFIT_HD Vec<T> broadcast(T x) {  // minus, as -0.0 + 0.0 would be +0.0
  return x - Vec<T>{};
}
// v with the lanes from n on taken from rest.
template <class V>
ULMFIT_HD V first_n(V v, int n, V rest) {
  using Lane = std::conditional_t<sizeof(v[0]) == 8, int64_t, int32_t>;
  constexpr int L = sizeof(V) / sizeof(Lane);
  typename VectorOf<Lane, L>::type lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  return lane < static_cast<Lane>(n) ? v : rest;
}

// Lane i of the result is lane `lane[i]` of a and b, one after the other.
template <int... lane, class V>
ULMFIT_HD V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, lane...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b, typename VectorOf<Index, sizeof...(lane)>::type{lane...});
#endif
}

// a * b + c in one rounding where the ISA has it. The build
// turns contraction off: what is fused is decided here.
#if ULMFIT_LANES == 16
ULMFIT_HD VF fma(VF a, VF b, VF c) { return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ULMFIT_HD VD fma(VD a, VD b, VD c) { return (VD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif ULMFIT_LANES == 8
ULMFIT_HD VF fma(VF a, VF b, VF c) { return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
ULMFIT_HD VD fma(VD a, VD b, VD c) { return (VD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#elif defined(__aarch64__)
ULMFIT_HD VF fma(VF a, VF b, VF c) { return (VF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
ULMFIT_HD VD fma(VD a, VD b, VD c) { return (VD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
ULMFIT_HD VF fma(VF a, VF b, VF c) { return a * b + c; }
ULMFIT_HD VD fma(VD a, VD b, VD c) { return a * b + c; }
#endif

// The smaller and the larger; b where either is NaN. The compiler makes a comparison and a blend of ?:, each
// slower than the one instruction.
#if ULMFIT_LANES == 16
ULMFIT_HD VF min_(VF a, VF b) { return (VF)_mm512_min_ps((__m512)a, (__m512)b); }
ULMFIT_HD VF max_(VF a, VF b) { return (VF)_mm512_max_ps((__m512)a, (__m512)b); }
#elif ULMFIT_LANES == 8
ULMFIT_HD VF min_(VF a, VF b) { return (VF)_mm256_min_ps((__m256)a, (__m256)b); }
ULMFIT_HD VF max_(VF a, VF b) { return (VF)_mm256_max_ps((__m256)a, (__m256)b); }
#else
ULMFIT_HD VF min_(VF a, VF b) { return a < b ? a : b; }
ULMFIT_HD VF max_(VF a, VF b) { return a > b ? a : b; }
#endif

// The 32-bit numbers that Philox computes with, kLanes of them: each in a lane of 64 bits, as the hardware
// has products, with noise above it. Two vectors take turns, as one alone would wait for its own results.
struct Words {
  VW even, odd;
};
ULMFIT_HD Words operator^(Words a, Words b) { return {a.even ^ b.even, a.odd ^ b.odd}; }
ULMFIT_HD Words operator^(Words a, uint32_t b) { return {a.even ^ b, a.odd ^ b}; }
ULMFIT_HD VU in_order(Words w) { return (VU)((w.even & 0xFFFFFFFFu) | (w.odd << 32)); }
ULMFIT_HD VW mul_low_halves(VW a, uint32_t b) {
#if ULMFIT_LANES == 16
  return (VW)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif ULMFIT_LANES == 8
  return (VW)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (VW)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__aarch64__)
  return (VW)vmull_n_u32(vmovn_u64((uint64x2_t)a), b);
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}
ULMFIT_HD void mul_hi_lo(Words a, uint32_t b, Words& hi, Words& lo) {
  lo = {mul_low_halves(a.even, b), mul_low_halves(a.odd, b)};
  hi = {lo.even >> 32, lo.odd >> 32};
}

ULMFIT_END
// Vector types have no namespace for a template to find their
// functions in: what philox.h calls must stand before it.
#include "../philox.h"
ULMFIT_BEGIN

// exp for floats: 2^n * e^r with |r| <= ln2/2, degree-5
// polynomial (Cephes expf), below 2 ulp; keeps NaN. It saturates:
// exp(-inf) is 2^-126 and no zero, exp(inf) is 2.4e38.
ULMFIT_HD VF exp_(VF x) {
  x = max_(broadcast(-87.3365447505531f), min_(broadcast(88.3762626647950f), x));
  const VF magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const VF shifted = fma(x, broadcast(1.44269504088896341f), magic);
  const VF n = shifted - magic;
  VF r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  VF p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
#if ULMFIT_LANES == 16
  return (VF)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // bits of magic removed, n moved into the exponent field; a NaN's bits would move there too
  const VI exponent = ((VI)shifted - 0x4B400000) << 23;
  return x == x ? (VF)((VI)p + exponent) : x;
#endif
}
ULMFIT_HD VF sigmoid_(VF x) { return 1.0f / (1.0f + exp_(-x)); }
// tanh: a polynomial near zero, where 1 - 2/(e^2x + 1) would cancel (Cephes tanhf), the formula elsewhere.
ULMFIT_HD VF tanh_(VF x) {
  const VF z = x * x;
  VF p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const VF near_zero = fma(p * z, x, x);
  const VF far = 1.0f - 2.0f / (exp_(x + x) + 1.0f);
  return z < 0.390625f ? near_zero : far;
}
// Doubles serve gradcheck and references, so the C library's accuracy matters and its speed does not.
ULMFIT_HD VD exp_(VD x) {
  for (int l = 0; l < lanes_of<double>; ++l) x[l] = std::exp(x[l]);
  return x;
}
ULMFIT_HD VD sigmoid_(VD x) { return 1.0 / (1.0 + exp_(-x)); }
ULMFIT_HD VD tanh_(VD x) {
  for (int l = 0; l < lanes_of<double>; ++l) x[l] = std::tanh(x[l]);
  return x;
}

// One level of a tree of sums: lanes kStep apart are added in a and in b; the result has kStep sums of a,
// kStep of b, and so on by turns.
template <int kStep, class V, int... lane>
ULMFIT_HD V add_neighbours(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int L = sizeof...(lane);
  return shuffle<(lane / kStep % 2 * L + lane / (2 * kStep) * 2 * kStep + lane % kStep)...>(a, b) +
         shuffle<(lane / kStep % 2 * L + lane / (2 * kStep) * 2 * kStep + lane % kStep + kStep)...>(a, b);
}
// Lane i of the result is the sum of v[i]'s lanes, for as many vectors as there are lanes. They are spent.
template <int kStep = 1, class V, int L>
ULMFIT_HD V sum_of_each(V (&v)[L]) {
  for (int i = 0; i < L / (2 * kStep); ++i)
    v[i] = add_neighbours<kStep>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, L>());
  if constexpr (2 * kStep < L) {
    return sum_of_each<2 * kStep>(v);
  } else {
    return v[0];
  }
}

ULMFIT_END
