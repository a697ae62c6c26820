#include "../linear_cross_entropy_inputs.h"
#include "glue.h"

namespace ulmfit_fast {
namespace {

// row_gradient (N), or nullptr: no gradient wanted.
LinearCrossEntropyResults run(const LinearCrossEntropyInputs& in, bool high, const Tensor* row_gradient,
                              bool need_dw) {
  check_range(in.op, "target", ids_of(in.target), in.N, 0, in.V, in.ignore_index);
  LinearCrossEntropyResults out(in, row_gradient != nullptr, need_dw, true);
  use_huge_pages({out.dh});
  LinearCrossEntropy a;
  a.N = in.N;
  a.E = in.E;
  a.V = in.V;
  a.h = matrix_of(in.op, "h", in.h);
  a.weight = matrix_of(in.op, "weight", in.weight);
  a.bias = in.bias_data();
  a.target = ids_of(in.target);
  a.ignore_index = in.ignore_index;
  a.label_smoothing = in.label_smoothing;
  a.high = high;
  a.gradient = row_gradient != nullptr;
  a.weight_gradient = a.gradient && need_dw;
  a.row_gradient = a.gradient ? data_of(*row_gradient) : nullptr;
  a.loss = data_of(out.loss);
  a.dh = data_of(out.dh);
  a.dbias = out.dbias.numel() > 0 ? data_of(out.dbias) : nullptr;
  std::pair results(&in, &out);
  a.results = &results;
  a.new_dweight = [](void* memory) {
    const auto& [in, out] = *static_cast<decltype(results)*>(memory);
    out->dweight = lent(in->weight, {in->V, in->E}, in->weight.scalar_type());
    return data_of(out->dweight);
  };
  kernels().linear_cross_entropy(a, torch_pool());
  return out;
}

// In order and in double, whatever the number of threads; torch's sum splits long vectors by it.
Tensor sum_of(const Tensor& losses) {
  const bool is_double = losses.scalar_type() == ScalarType::Double;
  double total = 0;
  for (int64_t i = 0; i < losses.numel(); ++i) {
    total += is_double ? static_cast<const double*>(losses.data_ptr())[i]
                       : static_cast<const float*>(losses.data_ptr())[i];
  }
  Tensor sum = torch::stable::new_empty(losses, {});
  // torch's fill_ refuses what a float cannot hold; that is inf here, as in torch's sum
  if (is_double) {
    *static_cast<double*>(sum.data_ptr()) = total;
  } else {
    *static_cast<float*>(sum.data_ptr()) = static_cast<float>(total);
  }
  return sum;
}

// chunk_rows is CUDA's: here the kernel takes a few rows at a time, always.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& h, const Tensor& weight,
                                                                const OptionalTensor& bias,
                                                                const Tensor& target, int64_t ignore_index,
                                                                double label_smoothing, int64_t reduction,
                                                                bool high, bool grad, bool need_dw,
                                                                int64_t chunk_rows) {
  const LinearCrossEntropyInputs in("linear_cross_entropy", h, weight, bias, target, ignore_index,
                                    label_smoothing);
  check_reduction(in.op, reduction, grad);
  Tensor ones = empty_like(h, {grad ? in.N : 0}, compute_type(h));
  torch::stable::fill_(ones, 1.0);
  const auto out = run(in, high, grad ? &ones : nullptr, need_dw);
  return {reduction == kSum ? sum_of(out.loss) : out.loss, out.dh, out.dweight, out.dbias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(const Tensor& dloss, const Tensor& h,
                                                                 const Tensor& weight,
                                                                 const OptionalTensor& bias,
                                                                 const Tensor& target, int64_t ignore_index,
                                                                 double label_smoothing, bool high,
                                                                 bool need_dw, int64_t chunk_rows) {
  const LinearCrossEntropyInputs in("linear_cross_entropy_backward", h, weight, bias, target, ignore_index,
                                    label_smoothing);
  const Tensor upstream = checked_row_gradient(in, dloss);
  const auto out = run(in, high, &upstream, need_dw);
  return {out.dh, out.dweight, out.dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
}

}  // namespace ulmfit_fast
