// Storage types: fp32, fp64, bf16 and fp16 rows to and from the type that kernels compute in.
//
// Kernels are compiled for a compute type (float or double) and look at the storage type at run time, once
// per row or vector: a branch that always goes the same way costs nothing, and four storage types do not
// multiply the templates (except those of gemm_unpacked.inl, whose inner loop is short).
#pragma once
#include "simd.h"
#include "workspace.h"

ULMFIT_BEGIN

// 16 bits to 32 in a lane, zeros above, and back: one instruction, where GCC's own conversion works in two
// halves and makes a mask of what is zero.
#if ULMFIT_LANES == 16
ULMFIT_HD VU widened(VH h) { return (VU)_mm512_cvtepu16_epi32((__m256i)h); }
#elif ULMFIT_LANES == 8
ULMFIT_HD VU widened(VH h) { return (VU)_mm256_cvtepu16_epi32((__m128i)h); }
#else
ULMFIT_HD VU widened(VH h) { return __builtin_convertvector(h, VU); }
#endif
#if ULMFIT_LANES == 8
ULMFIT_HD VH narrowed(VU u) {
  const __m256i halves = _mm256_packus_epi32((__m256i)u, (__m256i)u);  // of each half of u, twice
  return (VH)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0xD8));
}
#else
ULMFIT_HD VH narrowed(VU u) { return __builtin_convertvector(u, VH); }
#endif

ULMFIT_HD VF from_bf16(VH h) { return (VF)(widened(h) << 16); }
// Round to nearest even; NaN stays NaN (a quiet bit is
// set, so that truncation cannot make an infinity of it).
ULMFIT_HD VU bf16_bits(VF v) {
  const VU bits = (VU)v;
  const VU rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : (bits >> 16) | 0x40u;
}
#ifdef ULMFIT_BF16  // rounds in one instruction; subnormals become zero
ULMFIT_HD VH to_bf16(VF v) { return (VH)_mm512_cvtneps_pbh((__m512)v); }
#else
ULMFIT_HD VH to_bf16(VF v) { return narrowed(bf16_bits(v)); }
#endif

#if ULMFIT_LANES == 16
ULMFIT_HD VF from_f16(VH h) { return (VF)_mm512_cvtph_ps((__m256i)h); }
ULMFIT_HD VH to_f16(VF v) {
  return (VH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif ULMFIT_LANES == 8
ULMFIT_HD VF from_f16(VH h) { return (VF)_mm256_cvtph_ps((__m128i)h); }
ULMFIT_HD VH to_f16(VF v) {
  return (VH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__aarch64__)
ULMFIT_HD VF from_f16(VH h) { return (VF)vcvt_f32_f16((float16x4_t)h); }
ULMFIT_HD VH to_f16(VF v) { return (VH)vcvt_f16_f32((float32x4_t)v); }
#else
// Without F16C: move the bits and let one multiplication
// do the subnormals (both ways exact or rounded to even).
ULMFIT_HD VF from_f16(VH h) {
  const VU u = widened(h);
  const VU sign = (u & 0x8000u) << 16, magnitude = (u & 0x7FFFu) << 13;
  const VU scaled = (VU)((VF)magnitude * (VF)(VU{} + 0x77800000u));  // * 2^112
  return (VF)(sign | ((u & 0x7C00u) == 0x7C00u ? magnitude | 0x7F800000u : scaled));
}
ULMFIT_HD VH to_f16(VF v) {
  const VU sign = (VU)v & 0x80000000u, magnitude = (VU)v & 0x7FFFFFFFu;
  const VU normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const VU subnormal = (VU)((VF)magnitude + 0.5f) - 0x3F000000u;  // 0.5's ulp is fp16's smallest step
  VU bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x477FF000u ? VU{} + 0x7C00u : bits;
  bits = magnitude > 0x7F800000u ? VU{} + 0x7E00u : bits;
  return narrowed(bits | (sign >> 16));
}
#endif

// A vector of each of two rows of 16-bit elements, side by side: the pairs that bf16 products take.
ULMFIT_HD VU pair_rows(const uint16_t* rows, int64_t ld) {
  VH low, high;
  std::memcpy(&low, rows, sizeof low);
  std::memcpy(&high, rows + ld, sizeof high);
  return widened(low) | (widened(high) << 16);
}

// The first n of kLanes 16-bit elements, as load_n and store_n.
ULMFIT_HD VH load_halves(const uint16_t* p, int n) {
  VH h = {};
  if (n >= kLanes) {  // a constant size, so a load
    __builtin_memcpy(&h, p, sizeof h);
    return h;
  }
#ifdef ULMFIT_MASKED
  return (VH)_mm256_maskz_loadu_epi16((1u << n) - 1, p);
#else
  __builtin_memcpy(&h, p, n * 2);
  return h;
#endif
}
ULMFIT_HD void store_halves(uint16_t* p, VH h, int n) {
  if (n >= kLanes) return static_cast<void>(__builtin_memcpy(p, &h, sizeof h));
#ifdef ULMFIT_MASKED
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)h);
#else
  __builtin_memcpy(p, &h, n * 2);
#endif
}

// One vector of compute type T at element `at` of storage p; `n` lanes are there.
template <class T>
ULMFIT_HD Vec<T> load_as(DType dtype, const void* p, int64_t at, int n) {
  if constexpr (std::is_same_v<T, double>) {
    return load_n(static_cast<const double*>(p) + at, n);
  } else {
    if (dtype == DType::f32) return load_n(static_cast<const float*>(p) + at, n);
    const VH h = load_halves(static_cast<const uint16_t*>(p) + at, n);
    return dtype == DType::bf16 ? from_bf16(h) : from_f16(h);
  }
}
template <class T>
ULMFIT_HD void store_as(DType dtype, void* p, int64_t at, Vec<T> v, int n) {
  if constexpr (std::is_same_v<T, double>) {
    store_n(static_cast<double*>(p) + at, v, n);
  } else {
    if (dtype == DType::f32) return store_n(static_cast<float*>(p) + at, v, n);
    const VH h = dtype == DType::bf16 ? to_bf16(v) : to_f16(v);
    store_halves(static_cast<uint16_t*>(p) + at, h, n);
  }
}
// What a value becomes when it is stored and read again.
template <class T>
ULMFIT_HD Vec<T> round_as(DType dtype, Vec<T> v) {
  if constexpr (std::is_same_v<T, float>) {
    if (dtype == DType::bf16) return from_bf16(to_bf16(v));
    if (dtype == DType::f16) return from_f16(to_f16(v));
  }
  return v;
}

// Whole rows: n elements from `at` on.
template <class T>
inline void load_row(DType dtype, const void* p, int64_t at, int64_t n, T* out) {
  constexpr int L = lanes_of<T>;
  int64_t j = 0;
  for (; j + L <= n; j += L) store(out + j, load_as<T>(dtype, p, at + j, L));
  if (j < n) store_n(out + j, load_as<T>(dtype, p, at + j, static_cast<int>(n - j)), static_cast<int>(n - j));
}
template <class T>
inline void store_row(DType dtype, void* p, int64_t at, int64_t n, const T* in) {
  constexpr int L = lanes_of<T>;
  int64_t j = 0;
  for (; j + L <= n; j += L) store_as<T>(dtype, p, at + j, load(in + j), L);
  if (j < n) store_as<T>(dtype, p, at + j, load_n(in + j, static_cast<int>(n - j)), static_cast<int>(n - j));
}

// What T itself is stored as.
template <class T>
constexpr DType kComputeType = std::is_same_v<T, double> ? DType::f64 : DType::f32;

// The 64 elements that packing takes at a time, or fewer at an end. In vectors: for a copy of unknown length
// GCC emits `rep movs`, which was three quarters of packing's time.
template <class E>
inline void copy_piece(const E* in, int64_t n, E* out) {
  constexpr int kPiece = 64, L = lanes_of<E>;
  if (n != kPiece) return static_cast<void>(std::memcpy(out, in, n * sizeof(E)));
  Vec<E> piece[kPiece / L];
  for (int v = 0; v < kPiece / L; ++v) piece[v] = load(in + v * L);
  for (int v = 0; v < kPiece / L; ++v) store(out + v * L, piece[v]);
}
// load_row for such a piece.
template <class T>
inline void load_piece(DType dtype, const void* p, int64_t at, int64_t n, T* out) {
  if (dtype == kComputeType<T>) return copy_piece(static_cast<const T*>(p) + at, n, out);
  load_row(dtype, p, at, n, out);
}

// Uninitialised scratch memory, 64-byte aligned.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(workspace_take(n * static_cast<int64_t>(sizeof(T))))) {}
  ~Scratch() { release(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }
  T* get() const { return data_; }
  void release() {
    if (data_ != nullptr) workspace_give(data_);
    data_ = nullptr;
  }

 private:
  T* data_;
};

ULMFIT_END
