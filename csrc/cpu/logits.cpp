#include "glue.h"

namespace ulmfit_fast {
namespace {

Tensor logits(const Tensor& h_in, const Tensor& weight_in, const OptionalTensor& bias_in, bool high) {
  constexpr const char* op = "logits";
  check_dim(op, "h", h_in, 2);
  check_dim(op, "weight", weight_in, 2);
  check_device(op, "weight", weight_in, h_in);
  check_weight_dtype(op, "weight", weight_in, "h", h_in);
  const Tensor h = with_contiguous_rows(h_in), weight = with_contiguous_rows(weight_in);
  Logits a;
  a.N = h.size(0), a.E = h.size(1), a.V = weight.size(0);
  a.h = matrix_of(op, "h", h);
  a.weight = matrix_of(op, "weight", weight);
  check_shape(op, "weight", weight, {a.V, a.E});
  const OptionalTensor bias = checked_bias(op, bias_in, weight);
  a.bias = bias.has_value() ? data_of(*bias) : nullptr;
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
