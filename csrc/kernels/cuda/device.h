// What the kernels share: how elements are stored and computed with, vectors of them, masks, sums of a block.
#pragma once
#include <cmath>
#include <type_traits>

#include "../philox.h"
#include "kernels.h"
#include "launch.h"

namespace ulmfit_fast::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

// fp64 is computed in fp64, everything else in fp32.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

inline __device__ double widen(double v) { return v; }
inline __device__ float widen(float v) { return v; }
inline __device__ float widen(bf16 v) { return __bfloat162float(v); }
inline __device__ float widen(f16 v) { return __half2float(v); }

template <class S>
inline __device__ S narrow(Compute<S> v) {
  if constexpr (std::is_same_v<S, bf16>) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same_v<S, f16>) {
    return __float2half_rn(v);
  } else {
    return v;
  }
}

// f(S{}) with the type that is stored as `dtype`.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
}
// The same for a pair of which one is fp32, or both are the same.
template <class F>
void with_types(DType in, DType out, F&& f) {
  with_type(in, [&](auto from) {
    with_type(out, [&](auto to) {
      using In = decltype(from);
      using Out = decltype(to);
      if constexpr (std::is_same_v<In, Out> || ((std::is_same_v<In, float> || std::is_same_v<Out, float>) &&
                                                sizeof(In) + sizeof(Out) == 6)) {
        f(from, to);
      } else {
        throw std::runtime_error("ulmfit_fast: no kernel for this pair of dtypes");
      }
    });
  });
}

// N elements that are loaded and stored at once: 16 bytes where everything is aligned so.
template <class S, int N>
struct alignas(sizeof(S) * N) Pack {
  S v[N];
};
template <class S>
constexpr int kPack = 16 / sizeof(S);

// Whether rows `stride` elements apart, from `data` on, can be read in packs of N.
template <class S, int N = kPack<S>>
bool aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Pack<S, N>) == 0 && stride % N == 0;
}
template <class S, int N>
__device__ Pack<S, N>& pack_at(const S* data) {
  return *reinterpret_cast<Pack<S, N>*>(const_cast<S*>(data));
}

// *pack_at(to) = values. nvcc makes four stores of a plain assignment of 16 bytes.
template <class S, int N>
__device__ void store_pack(S* to, const Pack<S, N>& values) {
#ifdef __CUDACC__
  if constexpr (sizeof values == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(&values);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
                 "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
    return;
  }
#endif
  pack_at<S, N>(to) = values;
}

template <class S>
__device__ S* at(const Sequence& x, int64_t t, int64_t b) {
  return static_cast<S*>(x.data) + t * x.stride_t + b * x.stride_b;
}

// A mask as a kernel's argument: all but the key.
class DeviceMask {
 public:
  explicit DeviceMask(const Mask& mask) : seed(mask.seed), drop(0, mask.p) {}
  __device__ Dropout key() const {
    Dropout d = drop;
    if (d.active()) {
      const uint64_t value = static_cast<uint64_t>(*seed);
      d.key0 = static_cast<uint32_t>(value);
      d.key1 = static_cast<uint32_t>(value >> 32);
    }
    return d;
  }

 private:
  const int64_t* seed;
  Dropout drop;
};

// combine(a, b) over the values of a block's threads, in an order that is always the same; every thread has
// the result. At most 32 warps. value.from_partner(m): the value of the lane whose number differs in the
// bits of m.
template <class V, class F>
__device__ V block_reduce(V value, F&& combine) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = combine(value, value.from_partner(mask));
  __shared__ V parts[kWarp];
  const int warp = threadIdx.x / kWarp, warps = (blockDim.x + kWarp - 1) / kWarp;
  __syncthreads();  // the last use of parts is over
  if (threadIdx.x % kWarp == 0) parts[warp] = value;
  __syncthreads();
  V total = parts[0];
  for (int w = 1; w < warps; ++w) total = combine(total, parts[w]);
  return total;
}

}  // namespace ulmfit_fast::cuda
