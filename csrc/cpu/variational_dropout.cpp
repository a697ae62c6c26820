#include "glue.h"

namespace ulmfit_fast {
namespace {

Tensor apply(const char* op, const char* name, const Tensor& x, const Tensor& seed, double p,
             bool batch_first) {
  check_probability(op, "p", p);
  check_cpu(op, name, x);
  dtype_of(op, name, x);
  ULMFIT_CHECK(x.dim() >= 2, op, name, " must have at least 2 dimensions, got shape ", shape_text(x.sizes()));
  VariationalDropout a;
  a.seed = seed_of(op, seed);
  a.p = p;
  a.B = x.size(batch_first ? 0 : 1);
  a.T = x.size(batch_first ? 1 : 0);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (y.numel() == 0) return y;
  a.F = x.numel() / (a.B * a.T);

  // (B, T, F) or (T, B, F); for the usual 3-D input the view is x itself, with its strides
  const int64_t flat[] = {x.size(0), x.size(1), a.F};
  const Tensor rows = with_contiguous_rows(x.dim() == 3 ? x : torch::stable::reshape(x, flat));
  a.in = sequence_of(op, name, rows, batch_first);
  a.out = sequence_of(op, name, torch::stable::view(y, flat), batch_first);
  kernels().variational_dropout(a, torch_pool());
  return y;
}

Tensor variational_dropout(const Tensor& x, const Tensor& seed, double p, bool batch_first) {
  return apply("variational_dropout", "x", x, seed, p, batch_first);
}

// The mask is constant, so the gradient is the op itself.
Tensor variational_dropout_backward(const Tensor& dy, const Tensor& seed, double p, bool batch_first) {
  return apply("variational_dropout_backward", "dy", dy, seed, p, batch_first);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) {
  m.impl("variational_dropout", TORCH_BOX(&variational_dropout));
  m.impl("variational_dropout_backward", TORCH_BOX(&variational_dropout_backward));
}

}  // namespace ulmfit_fast
