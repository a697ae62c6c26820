// Concat pooling, [last, max, mean] over the first lengths[b] steps, in one pass; and its gradient.
#include "device.h"

namespace ulmfit_fast::cuda {
namespace {

constexpr int kSlices = 16;  // warps that share out the steps of a sequence: a document has hundreds

template <class T>
struct Pooled {
  T best = 0, sum = 0;
  int64_t at = -1;

  // The first of equal steps stays; NaN wins over numbers, as in torch.
  __device__ void take(T value, int64_t t) {
    const bool nan = value != value, best_nan = best != best;
    const bool better =
        at < 0 || value > best || (nan && !best_nan) || ((value == best || (nan && best_nan)) && t < at);
    if (better) best = value, at = t;
  }
};

// A warp's lanes lie along the hidden units, its siblings take every kSlices-th step.
template <class S>
__global__ void concat_pool_kernel(ConcatPool a, S* pooled, int64_t* argmax) {
  using T = Compute<S>;
  __shared__ T bests[kSlices][kWarp], sums[kSlices][kWarp];
  __shared__ int64_t places[kSlices][kWarp];
  const int64_t blocks = (a.H + kWarp - 1) / kWarp, b = blockIdx.x / blocks;
  const int64_t h = blockIdx.x % blocks * kWarp + threadIdx.x, length = a.lengths[b];
  ULMFIT_DEVICE_CHECK(length >= 0 && length <= a.T,
                      "ulmfit_fast.concat_pool: lengths must be in 0..T, the number of time steps");
  Pooled<T> p;
  const S* in = static_cast<const S*>(a.in.data) + b * a.in.stride_b + h;
  if (h < a.H) {
    ULMFIT_UNROLL
    for (int64_t t = threadIdx.y; t < length; t += kSlices) {
      const T value = widen(in[t * a.in.stride_t]);
      p.take(value, t);
      p.sum += value;
    }
  }
  bests[threadIdx.y][threadIdx.x] = p.best;
  sums[threadIdx.y][threadIdx.x] = p.sum;
  places[threadIdx.y][threadIdx.x] = p.at;
  __syncthreads();
  if (threadIdx.y > 0 || h >= a.H) return;
  for (int s = 1; s < kSlices; ++s) {
    const int64_t at = places[s][threadIdx.x];
    if (at >= 0) p.take(bests[s][threadIdx.x], at);
    p.sum += sums[s][threadIdx.x];
  }
  S* out = pooled + b * 3 * a.H + h;
  out[0] = length > 0 ? in[(length - 1) * a.in.stride_t] : narrow<S>(T(0));
  out[a.H] = narrow<S>(p.best);
  out[2 * a.H] = narrow<S>(p.sum / static_cast<T>(length > 0 ? length : 1));
  argmax[b * a.H + h] = p.at;
}

template <class S, int N>
__global__ void concat_pool_backward_kernel(ConcatPool a, const S* dpooled, const int64_t* argmax) {
  using T = Compute<S>;
  const int64_t i = warp_index();
  if (i >= a.B * a.T) return;
  const int64_t t = i % a.T, b = i / a.T, length = a.lengths[b];
  ULMFIT_DEVICE_CHECK(length >= 0 && length <= a.T,
                      "ulmfit_fast.concat_pool_backward: lengths must be in 0..T, the number of time steps");
  const S* row = dpooled + b * 3 * a.H;
  S* out = at<S>(a.in, t, b);
  for (int64_t h = threadIdx.x * N; h < a.H; h += kWarp * N) {
    Pack<S, N> d = {};
    if (t < length) {
      const Pack<S, N> last = pack_at<S, N>(row + h), top = pack_at<S, N>(row + a.H + h),
                       mean = pack_at<S, N>(row + 2 * a.H + h);
      for (int j = 0; j < N; ++j) {
        T sum = widen(mean.v[j]) / static_cast<T>(length);
        if (argmax[b * a.H + h + j] == t) sum += widen(top.v[j]);
        if (t == length - 1) sum += widen(last.v[j]);
        d.v[j] = narrow<S>(sum);
      }
    }
    store_pack<S, N>(out + h, d);
  }
}

}  // namespace

void concat_pool(const ConcatPool& a, void* pooled, int64_t* argmax, void* stream) {
  with_type(a.in.dtype, [&](auto type) {
    using S = decltype(type);
    launch("concat_pool", concat_pool_kernel<S>, Grid{a.B * ceil_div(a.H, kWarp)}, dim3(kWarp, kSlices),
           stream, a, static_cast<S*>(pooled), argmax);
  });
}

void concat_pool_backward(const ConcatPool& a, const void* dpooled, const int64_t* argmax, void* stream) {
  with_type(a.in.dtype, [&](auto type) {
    using S = decltype(type);
    constexpr int N = kPack<S>;
    const bool vectors = aligned<S>(dpooled, a.H) && aligned<S>(a.in.data, a.in.stride_t) &&
                         aligned<S>(a.in.data, a.in.stride_b);
    launch_warps(a.B * a.T, "concat_pool_backward",
                 vectors ? concat_pool_backward_kernel<S, N> : concat_pool_backward_kernel<S, 1>, stream, a,
                 static_cast<const S*>(dpooled), argmax);
  });
}

}  // namespace ulmfit_fast::cuda
