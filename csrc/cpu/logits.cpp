#include "glue.h"

namespace ulmfit_fast {
namespace {

Tensor logits(const Tensor& h_in, const Tensor& weight_in, const OptionalTensor& bias_in, bool high) {
  constexpr const char* op = "logits";
  check_dim(op, "h", h_in, 2);
  check_dim(op, "weight", weight_in, 2);
  check_device(op, "weight", weight_in, h_in);
  const Tensor h = with_contiguous_rows(h_in), weight = with_contiguous_rows(weight_in);
  Logits a;
  a.N = h.size(0), a.E = h.size(1), a.V = weight.size(0);
  a.h = matrix_of(op, "h", h);
  a.weight = matrix_of(op, "weight", weight);
  check_shape(op, "weight", weight, {a.V, a.E});
  ULMFIT_CHECK(a.weight.dtype == a.h.dtype || (a.weight.dtype == DType::f32 && size_of(a.h.dtype) == 2), op,
               "weight must be ", name_of(h.scalar_type()), ", as h is, or float32 where h is 16-bit, got ",
               name_of(weight.scalar_type()));
  Tensor bias;
  if (bias_in.has_value()) {
    check_device(op, "bias", *bias_in, h_in);
    check_dtype(op, "bias", *bias_in, weight.scalar_type());
    check_shape(op, "bias", *bias_in, {a.V});
    bias = torch::stable::contiguous(*bias_in);
  }
  a.bias = bias_in.has_value() ? data_of(bias) : nullptr;
  a.high = high;
  a.out_type = a.h.dtype;
  const Tensor out = empty_like(h, {a.N, a.V});
  use_huge_pages({out});
  a.out = data_of(out);
  if (a.N > 0 && a.V > 0) kernels().logits(a, torch_pool());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) { m.impl("logits", TORCH_BOX(&logits)); }

}  // namespace ulmfit_fast
