// One mask for all time steps: a thread makes the mask of a few features once and walks along the time.
#include <algorithm>

#include "device.h"

namespace ulmfit_fast::cuda {
namespace {

constexpr int64_t kSteps =
    8;  // that a thread takes, unless T is above 8 * 65535: they share one making of the mask

template <class S, int N>
__global__ void variational_dropout_kernel(VariationalDropout a, DeviceMask mask) {
  using T = Compute<S>;
  using P = Pack<S, N>;
  const int64_t packs = a.F / N, item = item_index();
  if (item >= a.B * packs) return;
  const int64_t b = item / packs, f = item % packs * N;
  const Dropout drop = mask.key();
  T m[N];
  for (int j = 0; j < N; ++j) m[j] = drop.factor<T>(b * a.F + f + j);
  for (int64_t t = blockIdx.y; t < a.T; t += gridDim.y) {
    const P in = pack_at<S, N>(at<S>(a.in, t, b) + f);
    P out;
    for (int j = 0; j < N; ++j) out.v[j] = narrow<S>(widen(in.v[j]) * m[j]);
    store_pack<S, N>(at<S>(a.out, t, b) + f, out);
  }
}

}  // namespace

void variational_dropout(const VariationalDropout& a, void* stream) {
  with_type(a.in.dtype, [&](auto type) {
    using S = decltype(type);
    constexpr int N = kPack<S>;
    const auto packs = [](const Sequence& x) {
      return aligned<S>(x.data, x.stride_t) && aligned<S>(x.data, x.stride_b);
    };
    const bool vectors = a.F % N == 0 && packs(a.in) && packs(a.out);
    const int64_t items = a.B * a.F / (vectors ? N : 1);
    const Grid grid = {ceil_div(items, 128), std::min(ceil_div(a.T, kSteps), kMostBlocksY)};
    launch("variational_dropout",
           vectors ? variational_dropout_kernel<S, N> : variational_dropout_kernel<S, 1>, grid, dim3(128),
           stream, a, DeviceMask(a.mask));
  });
}

}  // namespace ulmfit_fast::cuda
