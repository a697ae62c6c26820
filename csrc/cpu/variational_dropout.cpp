#include "../variational_dropout_inputs.h"

#include "glue.h"

namespace ulmfit_fast {
namespace {

Tensor apply(const char* op, const char* name, const Tensor& x, const Tensor& seed, double p,
             bool batch_first) {
  const VariationalDropoutInputs in(op, name, x, seed, p, batch_first);
  if (in.F == 0) return in.result;
  use_huge_pages({in.result});
  kernels().variational_dropout({in.T, in.B, in.F, sequence_of(op, name, in.x, batch_first),
                                 sequence_of(op, name, in.y, batch_first), seed_of(seed), p},
                                torch_pool());
  return in.result;
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
