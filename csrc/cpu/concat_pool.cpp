#include "../concat_pool_inputs.h"

#include <tuple>

#include "glue.h"

namespace ulmfit_fast {
namespace {

std::tuple<Tensor, Tensor> concat_pool(const Tensor& out, const Tensor& lengths) {
  constexpr const char* op = "concat_pool";
  const ConcatPoolInputs in(op, out, lengths);
  const ConcatPool a{in.T, in.B, in.H, lengths_of(op, in.lengths, in.T),
                     sequence_of(op, "out", in.out, true)};
  if (in.pooled.numel() > 0) {
    kernels().concat_pool(a, data_of(in.pooled), static_cast<int64_t*>(data_of(in.argmax)), torch_pool());
  }
  return {in.pooled, in.argmax};
}

Tensor concat_pool_backward(const Tensor& dpooled, const Tensor& lengths, const Tensor& argmax,
                            int64_t time) {
  constexpr const char* op = "concat_pool_backward";
  const ConcatPoolGradients in(op, dpooled, lengths, argmax, time);
  const ConcatPool a{in.T, in.B, in.H, lengths_of(op, in.lengths, in.T),
                     sequence_of(op, "dpooled", in.dout, true)};
  if (in.dout.numel() > 0) {
    kernels().concat_pool_backward(a, {data_of(in.dpooled), a.in.dtype, 3 * in.H}, ids_of(in.argmax),
                                   torch_pool());
  }
  return in.dout;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) {
  m.impl("concat_pool", TORCH_BOX(&concat_pool));
  m.impl("concat_pool_backward", TORCH_BOX(&concat_pool_backward));
}

}  // namespace ulmfit_fast
