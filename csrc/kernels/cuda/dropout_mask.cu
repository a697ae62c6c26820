// Dropout masks from Philox, alone and multiplied onto a matrix.
#include "device.h"

namespace ulmfit_fast::cuda {
namespace {

// One thread for each counter: its four words belong to elements 16 apart, so 16 threads write whole lines.
template <class S>
__global__ void mask_kernel(DeviceMask mask, int64_t n, S* out) {
  using T = Compute<S>;
  const int64_t counter = item_index(), first = counter / 16 * kMaskGroup + counter % 16;
  if (first >= n) return;
  const Dropout drop = mask.key();
  uint32_t words[4];
  drop.words(counter, words);
  const T scale = static_cast<T>(drop.scale);
  for (int w = 0; w < 4; ++w) {
    const int64_t e = first + 16 * w;
    if (e < n) out[e] = narrow<S>(words[w] >= drop.threshold ? scale : T(0));
  }
}

// No __restrict__: in and out may be one matrix.
template <class In, class Out>
__global__ void masked_copy_kernel(const In* in, int64_t stride, int64_t n, int64_t columns, DeviceMask mask,
                                   Out* out) {
  using T = Compute<Out>;
  const int64_t counter = item_index(), first = counter / 16 * kMaskGroup + counter % 16;
  if (first >= n) return;
  const Dropout drop = mask.key();
  uint32_t words[4] = {};
  if (drop.active()) drop.words(counter, words);
  const T scale = static_cast<T>(drop.scale);
  T values[4];  // all loads before the first store, which might have changed what the next load reads
  ULMFIT_UNROLL
  for (int w = 0; w < 4; ++w) {
    const int64_t e = first + 16 * w;
    const int64_t at = stride == columns ? e : e / columns * stride + e % columns;
    values[w] = e < n ? static_cast<T>(widen(in[at])) * (words[w] >= drop.threshold ? scale : T(0)) : T(0);
  }
  ULMFIT_UNROLL
  for (int w = 0; w < 4; ++w) {
    const int64_t e = first + 16 * w;
    if (e < n) out[e] = narrow<Out>(values[w]);
  }
}

int64_t counters(int64_t n) { return ceil_div(n, kMaskGroup) * 16; }

}  // namespace

void dropout_mask(const Mask& mask, int64_t n, DType dtype, void* out, void* stream) {
  with_type(dtype, [&](auto type) {
    using S = decltype(type);
    launch_over(counters(n), "dropout_mask", mask_kernel<S>, stream, DeviceMask(mask), n,
                static_cast<S*>(out));
  });
}

void masked_copy(const char* op, const Matrix& in, int64_t rows, int64_t columns, const Mask& mask,
                 DType out_type, void* out, void* stream) {
  with_types(in.dtype, out_type, [&](auto from, auto to) {
    using In = decltype(from);
    using Out = decltype(to);
    const int64_t n = rows * columns;
    launch_over(counters(n), op, masked_copy_kernel<In, Out>, stream, static_cast<const In*>(in.data),
                in.stride, n, columns, DeviceMask(mask), static_cast<Out*>(out));
  });
}

}  // namespace ulmfit_fast::cuda
