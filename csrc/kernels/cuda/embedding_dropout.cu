// Embedding lookup with whole rows of the vocabulary dropped; its gradient without atomics.
#include "device.h"

namespace ulmfit_fast::cuda {
namespace {

constexpr int kSlices = 8;  // warps that share out the occurrences of a word

template <class S, int N>
__global__ void embedding_dropout_kernel(EmbeddingDropout a, DeviceMask mask, const S* weight, S* out) {
  using T = Compute<S>;
  using P = Pack<S, N>;
  const int64_t i = warp_index();
  if (i >= a.n) return;
  const int64_t id = a.ids[i];
  ULMFIT_DEVICE_CHECK(id >= 0 && id < a.V,
                      "ulmfit_fast.embedding_dropout: ids must be in 0..V-1, the vocabulary");
  const T m = mask.key().factor<T>(id);
  for (int64_t e = threadIdx.x * N; e < a.E; e += kWarp * N) {
    P row = pack_at<S, N>(weight + id * a.E + e);
    for (int j = 0; j < N; ++j) row.v[j] = narrow<S>(widen(row.v[j]) * m);
    store_pack<S, N>(out + i * a.E + e, row);
  }
}

// Where the run of ids[head] ends in sorted ids: known at once, the loads below do not wait for each other.
__device__ int64_t end_of_run(const int64_t* ids, int64_t head, int64_t n) {
  int64_t in = head, out = n;  // ids[in] is of the run, ids[out] is not
  for (int64_t step = 1; in + step < out; step *= 2) {
    (ids[in + step] == ids[head] ? in : out) = in + step;
  }
  while (out - in > 1) {
    const int64_t middle = in + (out - in) / 2;
    (ids[middle] == ids[head] ? in : out) = middle;
  }
  return out;
}

// Block x stands at sorted position x, and works if a word begins there: it sums dy over the word's
// occurrences, each warp every kSlices-th of them, then the warps in order. block.y: which columns.
template <class S, int N>
__global__ void embedding_dropout_backward_kernel(EmbeddingDropout a, DeviceMask mask, int64_t padding_idx,
                                                  const int64_t* order, const S* dy, S* dweight) {
  using T = Compute<S>;
  using P = Pack<S, N>;
  __shared__ T sums[kSlices][kWarp * N];
  const int64_t head = blockIdx.x, id = a.ids[head];
  if ((head > 0 && a.ids[head - 1] == id) || id == padding_idx) return;
  ULMFIT_DEVICE_CHECK(id >= 0 && id < a.V,
                      "ulmfit_fast.embedding_dropout_backward: ids must be in 0..V-1, the vocabulary");
  const T m = mask.key().factor<T>(id);
  if (m == 0) return;  // dweight holds zeros
  const int64_t end = end_of_run(a.ids, head, a.n);
  const int64_t e = (static_cast<int64_t>(blockIdx.y) * kWarp + threadIdx.x) * N;
  T sum[N] = {};
  if (e < a.E) {
    ULMFIT_UNROLL
    for (int64_t i = head + threadIdx.y; i < end; i += kSlices) {
      const P row = pack_at<S, N>(dy + order[i] * a.E + e);
      for (int j = 0; j < N; ++j) sum[j] += widen(row.v[j]);
    }
  }
  for (int j = 0; j < N; ++j) sums[threadIdx.y][threadIdx.x * N + j] = sum[j];
  __syncthreads();
  if (threadIdx.y > 0 || e >= a.E) return;
  P out;
  for (int j = 0; j < N; ++j) {
    T total = sum[j];
    for (int s = 1; s < kSlices; ++s) total += sums[s][threadIdx.x * N + j];
    out.v[j] = narrow<S>(total * m);
  }
  store_pack<S, N>(dweight + id * a.E + e, out);
}

}  // namespace

void embedding_dropout(const EmbeddingDropout& a, const void* weight, void* out, void* stream) {
  with_type(a.dtype, [&](auto type) {
    using S = decltype(type);
    const bool vectors = aligned<S>(weight, a.E) && aligned<S>(out, a.E);
    launch_warps(a.n, "embedding_dropout",
                 vectors ? embedding_dropout_kernel<S, kPack<S>> : embedding_dropout_kernel<S, 1>, stream, a,
                 DeviceMask(a.mask), static_cast<const S*>(weight), static_cast<S*>(out));
  });
}

void embedding_dropout_backward(const EmbeddingDropout& a, int64_t padding_idx, const int64_t* order,
                                const void* dy, void* dweight, void* stream) {
  with_type(a.dtype, [&](auto type) {
    using S = decltype(type);
    const bool vectors = aligned<S>(dy, a.E) && aligned<S>(dweight, a.E);
    const int64_t columns = kWarp * (vectors ? kPack<S> : 1);
    launch("embedding_dropout_backward",
           vectors ? embedding_dropout_backward_kernel<S, kPack<S>> : embedding_dropout_backward_kernel<S, 1>,
           Grid{a.n, ceil_div(a.E, columns)}, dim3(kWarp, kSlices), stream, a, DeviceMask(a.mask),
           padding_idx, order, static_cast<const S*>(dy), static_cast<S*>(dweight));
  });
}

}  // namespace ulmfit_fast::cuda
