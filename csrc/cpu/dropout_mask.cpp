#include <vector>

#include "glue.h"

namespace ulmfit_fast {
namespace {

Tensor dropout_mask(const Tensor& seed, std::vector<int64_t> shape, double p,
                    std::optional<ScalarType> dtype) {
  constexpr const char* op = "dropout_mask";
  check_probability(op, "p", p);
  const ScalarType type = dtype.value_or(ScalarType::Float);
  const DType storage = dtype_of(op, "dtype", type);
  check_seed(op, seed, seed);
  const uint64_t key = seed_of(seed);
  for (const int64_t n : shape)
    ULMFIT_CHECK(n >= 0, op, "shape must have sizes >= 0, got ", shape_text(shape));
  Tensor mask = torch::stable::empty(shape, type);
  kernels().dropout_mask(key, p, mask.numel(), storage, data_of(mask), torch_pool());
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) { m.impl("dropout_mask", TORCH_BOX(&dropout_mask)); }

}  // namespace ulmfit_fast
