#include <vector>

#include "glue.h"

namespace ulmfit_fast::cuda {
namespace {

Tensor dropout_mask_op(const Tensor& seed, std::vector<int64_t> shape, double p,
                       std::optional<ScalarType> dtype) {
  constexpr const char* op = "dropout_mask";
  check_probability(op, "p", p);
  const ScalarType type = dtype.value_or(ScalarType::Float);
  const DType storage = dtype_of(op, "dtype", type);
  check_seed(op, seed, seed);
  for (const int64_t n : shape)
    ULMFIT_CHECK(n >= 0, op, "shape must have sizes >= 0, got ", shape_text(shape));
  const Device device(seed);
  const Tensor mask = torch::stable::new_empty(seed, shape, type);
  dropout_mask(mask_of(seed, p), mask.numel(), storage, data_of(mask), device.stream);
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, ULMFIT_CUDA_KEY, m) {
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask_op));
}

}  // namespace ulmfit_fast::cuda
