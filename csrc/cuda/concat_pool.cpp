#include "../concat_pool_inputs.h"

#include <tuple>

#include "glue.h"

namespace ulmfit_fast::cuda {
namespace {

std::tuple<Tensor, Tensor> concat_pool_op(const Tensor& out, const Tensor& lengths) {
  constexpr const char* op = "concat_pool";
  const Device device(out);
  const ConcatPoolInputs in(op, out, lengths);
  const ConcatPool a{in.T, in.B, in.H, ids_of(in.lengths), sequence_of(op, "out", in.out, true)};
  concat_pool(a, data_of(in.pooled), static_cast<int64_t*>(data_of(in.argmax)), device.stream);
  return {in.pooled, in.argmax};
}

Tensor concat_pool_backward_op(const Tensor& dpooled, const Tensor& lengths, const Tensor& argmax,
                               int64_t time) {
  constexpr const char* op = "concat_pool_backward";
  const Device device(dpooled);
  const ConcatPoolGradients in(op, dpooled, lengths, argmax, time);
  const ConcatPool a{in.T, in.B, in.H, ids_of(in.lengths), sequence_of(op, "dpooled", in.dout, true)};
  concat_pool_backward(a, data_of(in.dpooled), ids_of(in.argmax), device.stream);
  return in.dout;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, ULMFIT_CUDA_KEY, m) {
  m.impl("concat_pool", TORCH_BOX(&concat_pool_op));
  m.impl("concat_pool_backward", TORCH_BOX(&concat_pool_backward_op));
}

}  // namespace ulmfit_fast::cuda
