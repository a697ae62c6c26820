#include <tuple>

#include "glue.h"

namespace ulmfit_fast {
namespace {

std::tuple<Tensor, Tensor> concat_pool(const Tensor& out, const Tensor& lengths) {
  constexpr const char* op = "concat_pool";
  check_cpu(op, "out", out);
  check_dim(op, "out", out, 3);
  dtype_of(op, "out", out);
  const int64_t B = out.size(0), T = out.size(1), H = out.size(2);
  ULMFIT_CHECK(T < INT32_MAX, op, "out must have fewer than 2^31 - 1 time steps, got ", T);
  const Tensor rows = with_contiguous_rows(out), counts = torch::stable::contiguous(lengths);
  const ConcatPool a{T, B, H, lengths_of(op, counts, B, T), sequence_of(op, "out", rows, true)};
  const int64_t pooled_shape[] = {B, 3 * H}, argmax_shape[] = {B, H};
  Tensor pooled = torch::stable::new_empty(out, pooled_shape);
  Tensor argmax = torch::stable::new_empty(lengths, argmax_shape);
  if (pooled.numel() > 0) {
    kernels().concat_pool(a, data_of(pooled), static_cast<int64_t*>(data_of(argmax)), torch_pool());
  }
  return {pooled, argmax};
}

Tensor concat_pool_backward(const Tensor& dpooled, const Tensor& lengths, const Tensor& argmax,
                            int64_t time) {
  constexpr const char* op = "concat_pool_backward";
  check_cpu(op, "dpooled", dpooled);
  check_cpu(op, "argmax", argmax);
  check_dtype(op, "argmax", argmax, ScalarType::Long);
  check_dim(op, "argmax", argmax, 2);
  const int64_t B = argmax.size(0), H = argmax.size(1);
  check_shape(op, "dpooled", dpooled, {B, 3 * H});
  ULMFIT_CHECK(time >= 0 && time < INT32_MAX, op, "time must be in 0..2^31 - 2, got ", time);
  const Tensor gradient = torch::stable::contiguous(dpooled), steps = torch::stable::contiguous(argmax);
  const Tensor counts = torch::stable::contiguous(lengths);
  const int64_t shape[] = {B, time, H};
  Tensor dout = torch::stable::new_empty(dpooled, shape);
  const ConcatPool a{time, B, H, lengths_of(op, counts, B, time), sequence_of(op, "dpooled", dout, true)};
  if (dout.numel() > 0) {
    kernels().concat_pool_backward(a, {data_of(gradient), a.in.dtype, 3 * H}, ids_of(steps), torch_pool());
  }
  return dout;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) {
  m.impl("concat_pool", TORCH_BOX(&concat_pool));
  m.impl("concat_pool_backward", TORCH_BOX(&concat_pool_backward));
}

}  // namespace ulmfit_fast
