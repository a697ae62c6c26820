// Torch tensors as the kernels see them (kernels/views.h), on any device.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "check.h"

namespace ulmfit_fast {

using OptionalTensor = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

inline void* data_of(const Tensor& t) { return t.numel() == 0 ? nullptr : t.data_ptr(); }
inline const int64_t* ids_of(const Tensor& t) { return static_cast<const int64_t*>(data_of(t)); }

inline Tensor empty_like(const Tensor& t, Sizes sizes) {
  return torch::stable::new_empty(t, {sizes.begin(), sizes.size()});
}
inline Tensor empty_like(const Tensor& t, Sizes sizes, ScalarType dtype) {
  return torch::stable::new_empty(t, {sizes.begin(), sizes.size()}, dtype);
}
using NewTensor = Tensor (*)(const Tensor& like, Sizes, ScalarType);

// A tensor whose last dimension lies contiguous: itself where it can be, whatever its other strides.
inline Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.numel() == 0 || t.size(last) == 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// A 2-D tensor with contiguous rows; like the next one, it must outlive what is returned.
inline Matrix matrix_of(const char* op, const char* name, const Tensor& t) {
  return {data_of(t), dtype_of(op, name, t), t.size(0) > 1 ? t.stride(0) : t.size(1)};
}
// A 3-D tensor with contiguous rows, in either layout.
inline Sequence sequence_of(const char* op, const char* name, const Tensor& t, bool batch_first) {
  return {data_of(t), dtype_of(op, name, t), t.stride(batch_first ? 1 : 0), t.stride(batch_first ? 0 : 1)};
}

inline void check_seed(const char* op, const Tensor& seed, const Tensor& first) {
  check_device(op, "seed", seed, first);
  check_dtype(op, "seed", seed, ScalarType::Long);
  check_dim(op, "seed", seed, 0);
}

// Weights have the dtype of the activations, or are float32 where these have 16 bits.
inline void check_weight_dtype(const char* op, const char* name, const Tensor& weight, const char* x_name,
                               const Tensor& x) {
  const DType own = dtype_of(op, name, weight), other = dtype_of(op, x_name, x);
  ULMFIT_CHECK(own == other || (own == DType::f32 && size_of(other) == 2), op, name, " must be ",
               name_of(x.scalar_type()), ", as ", x_name, " is, or float32 where ", x_name,
               " is 16-bit, got ", name_of(weight.scalar_type()));
}
// The bias of a weight (V, E), contiguous, or nothing.
inline OptionalTensor checked_bias(const char* op, const OptionalTensor& bias, const Tensor& weight) {
  if (!bias.has_value()) return bias;
  check_device(op, "bias", *bias, weight);
  check_dtype(op, "bias", *bias, weight.scalar_type());
  check_shape(op, "bias", *bias, {weight.size(0)});
  return torch::stable::contiguous(*bias);
}

// lengths (B) as int64; that each is in 0..T is for the device to check.
inline void check_lengths(const char* op, const Tensor& lengths, int64_t batch, const Tensor& first) {
  check_device(op, "lengths", lengths, first);
  check_dtype(op, "lengths", lengths, ScalarType::Long);
  check_shape(op, "lengths", lengths, {batch});
}

// What sums, states and losses of x are kept in.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace ulmfit_fast
