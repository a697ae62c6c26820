// From torch tensors to launches: device, stream, the library's products.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <stdexcept>

#include "../kernels/cuda/kernels.h"
#include "../views.h"

#ifndef ULMFIT_ON_CPU
#define ULMFIT_CUDA_KEY CUDA
// Weak: a wheel built here also loads into a torch without CUDA, which lacks it and never comes this way.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#else
#define ULMFIT_CUDA_KEY CPU  // tests: tensors of the CPU, kernels run by tests/cpp/cuda_on_cpu.h
#endif

namespace ulmfit_fast::cuda {

// Makes the tensor's device the current one for as long as it lives, and knows that device's current stream.
class Device {
 public:
#ifndef ULMFIT_ON_CPU
  explicit Device(const Tensor& t) : guard(t.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr)
      throw std::runtime_error("ulmfit_fast: this torch has no CUDA part, yet a tensor on a GPU");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
#else
  explicit Device(const Tensor&) {}
#endif
  void* stream = nullptr;
};

inline Mask mask_of(const Tensor& seed, double p) {
  return {p > 0 ? static_cast<const int64_t*>(seed.data_ptr()) : nullptr, p};
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// out = a @ b by torch's library. out is a's dtype, or fp32 where a and b are 16-bit; it may have a row
// stride. TF32, where a is fp32, is as torch allows it; so is the rounding of partial sums, where the library
// cuts a long product into pieces, to a 16-bit out (allow_bf16_reduced_precision_reduction).
inline void multiply(const Tensor& a, const Tensor& b, Tensor& out) {
  using torch::stable::detail::from;
  const auto call = [](const char* overload, StableIValue* stack) {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", overload, stack, TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // frees the handle
  };
  if (out.scalar_type() == a.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    call("out", stack.data());
  } else {
#ifndef ULMFIT_ON_CPU
    std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
    call("dtype_out", stack.data());
#else  // torch's CPU part has no such product
    multiply(torch::stable::to(a, out.scalar_type()), torch::stable::to(b, out.scalar_type()), out);
#endif
  }
}

inline Tensor product(const Tensor& a, const Tensor& b, ScalarType dtype) {
  Tensor out = empty_like(a, {a.size(0), b.size(1)}, dtype);
  multiply(a, b, out);
  return out;
}

}  // namespace ulmfit_fast::cuda
