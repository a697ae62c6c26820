// Cross-entropy of rows of logits that become their own gradient, in place; and the two copies that bring the
// bias into the products: logits = [h | 1] @ [W | b]^T, so [dW | db] = dlogits^T @ [h | 1] needs no pass of
// its own over the logits.
#include "device.h"

namespace ulmfit_fast::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocks = 2;  // of a multiprocessor: what leaves registers for the loads on their way

// Largest logit, sum of exp(logit - largest) and sum of the logits, of some columns of a row.
template <class T>
struct RowStatistics {
  T top, sum, total;

  // What exponents are taken from: the largest, or 0 while nothing but -infinity was seen.
  static __device__ T base(T top) { return top == -static_cast<T>(INFINITY) ? T(0) : top; }

  template <int N>
  __device__ void take(const T (&x)[N]) {
    T above = top;
    for (int j = 0; j < N; ++j) above = x[j] > above ? x[j] : above;
    const T from = base(above);
    sum *= exp(top - from);
    for (int j = 0; j < N; ++j) {
      sum += exp(x[j] - from);
      total += x[j];
    }
    top = above;
  }
  __device__ RowStatistics from_partner(int mask) const {
    return {__shfl_xor_sync(~0u, top, mask), __shfl_xor_sync(~0u, sum, mask),
            __shfl_xor_sync(~0u, total, mask)};
  }
};

template <class T>
struct Merge {
  __device__ RowStatistics<T> operator()(const RowStatistics<T>& a, const RowStatistics<T>& b) const {
    const T top = a.top > b.top ? a.top : b.top, from = RowStatistics<T>::base(top);
    const T sum = a.sum * exp(a.top - from) + b.sum * exp(b.top - from);
    return {top, sum, a.total + b.total};
  }
};

// f(first column, values[N or 1]) over a row; what it leaves in the values is written back if `write`. A
// thread has kAhead loads on their way before it takes the first: f is long, and memory would idle meanwhile.
// In fp64 it has one: the exponentials alone take all registers, and longer than memory.
template <class S, int N, class F>
__device__ void over_row(S* row, int64_t columns, bool write, F&& f) {
  using T = Compute<S>;
  constexpr int kAhead = sizeof(S) == 8 ? 1 : 4, kStep = kThreads * N;
  const auto take = [&]<int n>(int64_t first, Pack<S, n> stored) {
    T values[n];
    for (int j = 0; j < n; ++j) values[j] = widen(stored.v[j]);
    f(first, values);
    if (!write) return;
    for (int j = 0; j < n; ++j) stored.v[j] = narrow<S>(values[j]);
    store_pack<S, n>(row + first, stored);
  };
  const int64_t whole = columns / N * N;
  int64_t j = threadIdx.x * N;
  for (; j + (kAhead - 1) * kStep < whole; j += kAhead * kStep) {
    Pack<S, N> stored[kAhead];
    ULMFIT_UNROLL_ALL
    for (int k = 0; k < kAhead; ++k) stored[k] = pack_at<S, N>(row + j + k * kStep);
    ULMFIT_UNROLL_ALL
    for (int k = 0; k < kAhead; ++k) take(j + k * kStep, stored[k]);
  }
  for (; j < whole; j += kStep) take(j, pack_at<S, N>(row + j));
  for (j = whole + threadIdx.x; j < columns; j += kThreads) take(j, pack_at<S, 1>(row + j));
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads, kBlocks) cross_entropy_kernel(CrossEntropy a) {
  using T = Compute<S>;
  const int64_t r = blockIdx.x, target = a.target[r];
  S* row = static_cast<S*>(a.logits) + r * a.stride;
  T* loss = static_cast<T*>(a.loss) + r;
  // the products that take the gradient may look at what pads a row: torch's on the CPU do
  for (int64_t j = a.V + threadIdx.x; j < a.stride; j += kThreads) row[j] = narrow<S>(T(0));
  if (target == a.ignore_index) {
    if (threadIdx.x == 0) *loss = 0;
    if (a.row_gradient != nullptr)
      over_row<S, N>(row, a.V, true, [](int64_t, auto& values) {
        for (T& value : values) value = 0;
      });
    return;
  }
  ULMFIT_DEVICE_CHECK(
      target >= 0 && target < a.V,
      "ulmfit_fast.linear_cross_entropy: target must be in 0..V-1, the vocabulary, or ignore_index");
  RowStatistics<T> s{-static_cast<T>(INFINITY), 0, 0};
  over_row<S, N>(row, a.V, false, [&](int64_t, auto& values) { s.take(values); });
  s = block_reduce(s, Merge<T>());
  const T smoothing = static_cast<T>(a.label_smoothing), even = smoothing / static_cast<T>(a.V);
  const T log_sum = s.top + log(s.sum), wanted = widen(row[target]);
  if (threadIdx.x == 0) {
    *loss = log_sum - (1 - smoothing) * wanted - (smoothing > 0 ? even * s.total : T(0));
  }
  if (a.row_gradient == nullptr) return;
  __syncthreads();  // row[target] is read above by all, and written below by one
  const T upstream = static_cast<const T*>(a.row_gradient)[r], scale = 1 / s.sum;
  over_row<S, N>(row, a.V, true, [&](int64_t j, auto& values) {
    for (T& value : values) {
      const T p = exp(value - s.top) * scale;
      value = upstream * (p - even - (j++ == target ? 1 - smoothing : T(0)));
    }
  });
}

template <class In, class Out, int N>
__global__ void append_column_kernel(const In* in, int64_t stride, int64_t rows, int64_t columns,
                                     const In* column, Out* out, int64_t width) {
  const int64_t r = warp_index();
  if (r >= rows) return;
  for (int64_t c = threadIdx.x * N; c < width; c += kWarp * N) {
    Pack<Out, N> values;
    if (c + N <= columns) {
      const Pack<In, N> loaded = pack_at<In, N>(in + r * stride + c);
      for (int j = 0; j < N; ++j) values.v[j] = narrow<Out>(widen(loaded.v[j]));
    } else {
      for (int j = 0; j < N; ++j) {
        Compute<Out> value = 0;
        if (c + j < columns) value = widen(in[r * stride + c + j]);
        if (c + j == columns) value = column == nullptr ? 1 : widen(column[r]);
        values.v[j] = narrow<Out>(value);
      }
    }
    store_pack<Out, N>(out + r * width + c, values);
  }
}

template <class In, class Out, int N>
__global__ void split_column_kernel(const In* in, int64_t stride, int64_t rows, int64_t columns, Out* out,
                                    Out* column) {
  const int64_t r = warp_index();
  if (r >= rows) return;
  for (int64_t c = threadIdx.x * N; c < columns; c += kWarp * N) {
    const Pack<In, N> loaded = pack_at<In, N>(in + r * stride + c);
    Pack<Out, N> values;
    for (int j = 0; j < N; ++j) values.v[j] = narrow<Out>(widen(loaded.v[j]));
    store_pack<Out, N>(out + r * columns + c, values);
  }
  if (threadIdx.x == 0) column[r] = narrow<Out>(widen(in[r * stride + columns]));
}

}  // namespace

void cross_entropy(const CrossEntropy& a, void* stream) {
  with_type(a.dtype, [&](auto type) {
    using S = decltype(type);
    const bool vectors = aligned<S>(a.logits, a.stride);
    launch("linear_cross_entropy", vectors ? cross_entropy_kernel<S, kPack<S>> : cross_entropy_kernel<S, 1>,
           Grid{a.rows}, dim3(kThreads), stream, a);
  });
}

void append_column(const Matrix& in, int64_t rows, int64_t columns, const void* column, DType out_type,
                   void* out, int64_t width, void* stream) {
  with_types(in.dtype, out_type, [&](auto from, auto to) {
    using In = decltype(from);
    using Out = decltype(to);
    constexpr int N = kPack<Out>;
    const bool vectors = aligned<In, N>(in.data, in.stride) && aligned<Out>(out, width);
    launch_warps(rows, "linear_cross_entropy",
                 vectors ? append_column_kernel<In, Out, N> : append_column_kernel<In, Out, 1>, stream,
                 static_cast<const In*>(in.data), in.stride, rows, columns, static_cast<const In*>(column),
                 static_cast<Out*>(out), width);
  });
}

void split_column(const Matrix& in, int64_t rows, int64_t columns, DType out_type, void* out, void* column,
                  void* stream) {
  with_types(in.dtype, out_type, [&](auto from, auto to) {
    using In = decltype(from);
    using Out = decltype(to);
    constexpr int N = kPack<Out>;
    const bool vectors = aligned<In, N>(in.data, in.stride) && aligned<Out>(out, columns);
    launch_warps(rows, "linear_cross_entropy",
                 vectors ? split_column_kernel<In, Out, N> : split_column_kernel<In, Out, 1>, stream,
                 static_cast<const In*>(in.data), in.stride, rows, columns, static_cast<Out*>(out),
                 static_cast<Out*>(column));
  });
}

}  // namespace ulmfit_fast::cuda
