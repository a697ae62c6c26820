// From torch tensors to the plain arguments of the CPU kernels.
#pragma once
#include "../kernels/cpu/kernels.h"
#include "../kernels/cpu/workspace.h"
#include "../views.h"

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

// A tensor that was just allocated and will be written whole.
inline void use_huge_pages(std::initializer_list<Tensor> outputs) {
  for (const Tensor& t : outputs)
    if (t.numel() > 0) prefer_huge_pages(t.data_ptr(), t.numel() * t.element_size());
}

inline uint64_t seed_of(const Tensor& seed) {
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
}

// lengths (B), each in 0..T, contiguous; nullptr where the batch is empty.
inline const int64_t* lengths_of(const char* op, const Tensor& lengths, int64_t time) {
  check_range(op, "lengths", ids_of(lengths), lengths.numel(), 0, time + 1);
  return ids_of(lengths);
}

}  // namespace ulmfit_fast
