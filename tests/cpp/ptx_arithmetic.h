// What the PTX instructions of the CUDA kernels compute: registers, arithmetic and conversions. Registers are
// bits, as on a card; the names are PTX's, with _ for its dots.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "cuda_on_cpu.h"

namespace ulmfit_fast::ptx {

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};
struct Tf32 {
  uint32_t bits;
};

// --- registers ---------------------------------------------------------------------------------------------

template <size_t bytes>
using Bits = std::conditional_t<
    bytes == 1, uint8_t,
    std::conditional_t<bytes == 2, uint16_t, std::conditional_t<bytes == 4, uint32_t, uint64_t>>>;

template <class T, class R>
T get(R bits) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(bits);
  } else {
    return std::bit_cast<T>(static_cast<Bits<sizeof(T)>>(bits));
  }
}
// Integers are extended by their sign where the register is wider.
template <class R, class T>
R put(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<R>(value);
  } else {
    static_assert(sizeof(R) == sizeof(T));
    return std::bit_cast<R>(value);
  }
}

inline uint32_t join(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }
inline uint64_t join(uint32_t low, uint32_t high) { return low | uint64_t{high} << 32; }
template <class R, class T>
R part(T value, int i) {
  return static_cast<R>(value >> 8 * sizeof(R) * i);
}

// --- arithmetic --------------------------------------------------------------------------------------------

template <class T>
constexpr bool kFloat = std::is_floating_point_v<T>;
template <class T>
using Wide = std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>;
template <class T, class F>
T wrapped(T a, T b, F&& f) {
  if constexpr (kFloat<T>) {
    return f(a, b);
  } else {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(f(static_cast<U>(a), static_cast<U>(b)));
  }
}

// clang-format off
template <class T> T add_(T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x + y; }); }
template <class T> T sub_(T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x - y; }); }
template <class T> T mul_(T a, T b) { return a * b; }
template <class T> T mul_lo_(T a, T b) { return wrapped(a, b, [](auto x, auto y) { return x * y; }); }
template <class T> T mul_hi_(T a, T b) { return static_cast<T>(Wide<T>{a} * b >> 8 * sizeof(T)); }
template <class T> Wide<T> mul_wide_(T a, T b) { return Wide<T>{a} * b; }
template <class T> T mad_lo_(T a, T b, T c) { return add_(mul_lo_(a, b), c); }
template <class T> T neg_(T a) { if constexpr (kFloat<T>) return -a; else return sub_(T{0}, a); }
template <class T> T abs_(T a) { return std::abs(a); }
template <class T> T min_(T a, T b) { static_assert(!kFloat<T>); return std::min(a, b); }
template <class T> T max_(T a, T b) { static_assert(!kFloat<T>); return std::max(a, b); }
template <class T> T and_(T a, T b) { return a & b; }
template <class T> T or_(T a, T b) { return a | b; }
template <class T> T xor_(T a, T b) { return a ^ b; }
template <class T> T not_(T a) { if constexpr (std::is_same_v<T, bool>) return !a; else return ~a; }
template <class T> T mov_(T a) { return a; }
template <class T> T shl_(T a, uint32_t n) { return n < 8 * sizeof(T) ? static_cast<T>(a << n) : T{0}; }
template <class T> T shr_(T a, uint32_t n) { return a >> std::min<uint32_t>(n, 8 * sizeof(T) - 1) >> (n >= 8 * sizeof(T)); }
template <class T> T selp_(T a, T b, bool p) { return p ? a : b; }
template <class T> T copysign_(T sign, T magnitude) { return std::copysign(magnitude, sign); }
template <class T> T fma_rn_(T a, T b, T c) { return std::fma(a, b, c); }
template <class T> T add_rn_(T a, T b) { return a + b; }
template <class T> T div_rn_(T a, T b) { return a / b; }
template <class T> T rcp_rn_(T a) { return 1 / a; }

template <class T> bool setp_eq_(T a, T b) { return a == b; }
template <class T> bool setp_lt_(T a, T b) { return a < b; }
template <class T> bool setp_le_(T a, T b) { return a <= b; }
template <class T> bool setp_gt_(T a, T b) { return a > b; }
template <class T> bool setp_ge_(T a, T b) { return a >= b; }
template <class T> bool setp_ne_(T a, T b) { return kFloat<T> ? a < b || a > b : a != b; }
template <class T> bool setp_ltu_(T a, T b) { return !(a >= b); }
template <class T> bool setp_geu_(T a, T b) { return !(a < b); }
template <class T> bool setp_num_(T a, T b) { return a == a && b == b; }
template <class T> bool setp_nan_(T a, T b) { return a != a || b != b; }
// clang-format on

template <class T>
T div_(T a, T b) {
  if (b == 0) throw std::logic_error("an integer division by zero");
  return a / b;
}
template <class T>
T bfi_(T bits, T into, uint32_t first, uint32_t count) {
  if (first >= 8 * sizeof(T)) return into;
  const T mask = (count >= 8 * sizeof(T) ? ~T{0} : (T{1} << count) - 1) << first;
  return (into & ~mask) | (bits << first & mask);
}
// Rounded towards minus infinity. The product is exact in double, and so is what the sum leaves over.
inline float fma_rm_(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;
  const double of_c = sum - product, left_over = (product - (sum - of_c)) + (c - of_c);
  const float rounded = static_cast<float>(sum);
  const bool above = rounded > sum || (rounded == sum && left_over < 0);
  return above ? std::nextafter(rounded, -std::numeric_limits<float>::infinity()) : rounded;
}
template <class T>
T flushed(T v) {
  return std::abs(v) < std::numeric_limits<T>::min() ? std::copysign(T{0}, v) : v;
}
inline float ex2_approx_ftz_(float v) {
  return flushed(static_cast<float>(std::exp2(static_cast<double>(flushed(v)))));
}
inline float rcp_approx_ftz_(float v) { return flushed(1 / flushed(v)); }
// The upper 20 bits of the fraction count.
inline double rcp_approx_ftz_(double v) {
  const auto cut = [](double x) {
    return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & ~0xFFFFFFFFull);
  };
  return flushed(cut(1 / cut(flushed(v))));
}

// --- conversions -------------------------------------------------------------------------------------------

template <class To, class From>
To cvt(From v) {
  if constexpr (std::is_same_v<From, Half>) {
    return static_cast<To>(std::bit_cast<Float16>(v.bits));
  } else if constexpr (std::is_same_v<From, Brain>) {
    return std::bit_cast<float>(uint32_t{v.bits} << 16);
  } else {
    return static_cast<To>(v);  // of integers, or to a wider float
  }
}
template <class To, class From>
To cvt_rn(From v) {
  if constexpr (std::is_same_v<To, Half>) {
    return v != v ? Half{0x7FFF} : Half{std::bit_cast<uint16_t>(static_cast<Float16>(v))};
  } else if constexpr (std::is_same_v<To, Brain>) {
    if (v != v) return Brain{0x7FFF};
    const uint32_t bits = std::bit_cast<uint32_t>(v), upper = bits >> 16, rest = bits & 0xFFFF;
    return Brain{static_cast<uint16_t>(upper + (rest > 0x8000 || (rest == 0x8000 && upper % 2 == 1)))};
  } else {
    return static_cast<To>(v);
  }
}
template <class To, class From>
To cvt_rni(From v) {
  return std::nearbyint(v);
}
template <class To, class From>
To cvt_sat(From v) {
  return v > 0 ? std::min(v, From{1}) : From{0};  // and NaN to 0
}
template <class To, class From>
To cvt_rna(From v) {  // halves away from zero
  static_assert(std::is_same_v<To, Tf32>);
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if (v != v) return Tf32{0x7FFFFFFF};
  return Tf32{(bits & 0x7F800000) == 0x7F800000 ? bits : (bits + 0x1000) & ~0x1FFFu};
}

}  // namespace ulmfit_fast::ptx
