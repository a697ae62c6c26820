// From torch tensors to the plain arguments of the CPU kernels.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "../kernels/cpu/workspace.h"

namespace ulmfit_fast {

// torch's thread pool. It hands the whole range to one thread inside another parallel region, and an
// exception thrown by the body reaches the caller.
inline Parallel torch_pool() {
  Parallel parallel;
  parallel.threads = static_cast<int>(torch::stable::get_num_threads());
  parallel.run = [](void*, int64_t n, void (*body)(void*, int64_t, int64_t), void* arg) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(arg, begin, end); });
  };
  return parallel;
}

inline void* data_of(const Tensor& t) { return t.numel() == 0 ? nullptr : t.data_ptr(); }

// A tensor that was just allocated and will be written whole.
inline Tensor with_huge_pages(Tensor t) {
  if (t.numel() > 0) prefer_huge_pages(t.data_ptr(), t.numel() * t.element_size());
  return t;
}

inline const int64_t* ids_of(const Tensor& t) { return static_cast<const int64_t*>(data_of(t)); }

inline uint64_t seed_of(const char* op, const Tensor& seed) {
  check_cpu(op, "seed", seed);
  check_dtype(op, "seed", seed, ScalarType::Long);
  check_dim(op, "seed", seed, 0);
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
}

// A tensor whose last dimension lies contiguous: itself where it can be, whatever its other strides.
inline Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.numel() == 0 || t.size(last) == 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// A 3-D tensor with contiguous rows, in either layout. It must outlive what is returned.
inline Sequence sequence_of(const char* op, const char* name, const Tensor& t, bool batch_first) {
  return {data_of(t), dtype_of(op, name, t), t.stride(batch_first ? 1 : 0), t.stride(batch_first ? 0 : 1)};
}

// lengths (B), each in 0..T, contiguous; nullptr where there are none.
inline const int64_t* lengths_of(const char* op, const Tensor& lengths, int64_t batch, int64_t time) {
  check_cpu(op, "lengths", lengths);
  check_dtype(op, "lengths", lengths, ScalarType::Long);
  check_shape(op, "lengths", lengths, {batch});
  check_range(op, "lengths", ids_of(lengths), batch, 0, time + 1);
  return ids_of(lengths);
}

}  // namespace ulmfit_fast
