#include "../variational_dropout_inputs.h"

#include "glue.h"

namespace ulmfit_fast::cuda {
namespace {

Tensor apply(const char* op, const char* name, const Tensor& x, const Tensor& seed, double p,
             bool batch_first) {
  const Device device(x);
  const VariationalDropoutInputs in(op, name, x, seed, p, batch_first);
  if (in.F == 0) return in.result;
  variational_dropout({in.T, in.B, in.F, sequence_of(op, name, in.x, batch_first),
                       sequence_of(op, name, in.y, batch_first), mask_of(seed, p)},
                      device.stream);
  return in.result;
}

Tensor variational_dropout_op(const Tensor& x, const Tensor& seed, double p, bool batch_first) {
  return apply("variational_dropout", "x", x, seed, p, batch_first);
}

// The mask is constant, so the gradient is the op itself.
Tensor variational_dropout_backward_op(const Tensor& dy, const Tensor& seed, double p, bool batch_first) {
  return apply("variational_dropout_backward", "dy", dy, seed, p, batch_first);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, ULMFIT_CUDA_KEY, m) {
  m.impl("variational_dropout", TORCH_BOX(&variational_dropout_op));
  m.impl("variational_dropout_backward", TORCH_BOX(&variational_dropout_backward_op));
}

}  // namespace ulmfit_fast::cuda
