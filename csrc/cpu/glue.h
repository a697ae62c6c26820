// From torch tensors to the plain arguments of the CPU kernels.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../kernels/cpu/kernels.h"
#include "../kernels/cpu/workspace.h"
#include "../views.h"

#if defined(__GNUC__)
// torch's from 2.11 on. Weak: a module built here also loads into 2.10, where it is missing.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
                int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);
#endif

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

// A new tensor in memory that the workspace lends for as long as the tensor lives, where torch can take such
// memory: for what an op saves for its backward, and for gradients as large as a vocabulary. Fresh pages for
// the former cost a tenth of the LSTM's forward, for the latter most of an embedding's backward.
inline Tensor lent(const Tensor& like, Sizes sizes, ScalarType dtype) {
#if defined(__GNUC__)
  int64_t strides[4], numel = 1;
  for (size_t i = sizes.size(); i-- > 0; numel *= sizes.begin()[i]) strides[i] = numel;
  if (torch_from_blob != nullptr && numel > 0) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    const auto type = to<int32_t>(from(dtype));
    void* memory = workspace_take(numel * static_cast<int64_t>(aoti_torch_dtype_element_size(type)));
    AtenTensorHandle handle = nullptr;
    const auto error = torch_from_blob(
        memory, static_cast<int64_t>(sizes.size()), sizes.begin(), strides, 0, type,
        aoti_torch_device_type_cpu(), like.get_device_index(), &handle, aoti_torch_layout_strided(), nullptr,
        0, [](void* data, void*) { workspace_give(data); }, nullptr);
    if (error != AOTI_TORCH_SUCCESS) workspace_give(memory);
    TORCH_ERROR_CODE_CHECK(error);
    return Tensor(handle);
  }
#endif
  Tensor t = empty_like(like, sizes, dtype);
  use_huge_pages({t});
  return t;
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
