#include <optional>
#include <tuple>

#include "glue.h"

namespace ulmfit_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;
enum Reduction : int64_t { kNone = 0, kSum = 2 };  // a mean is a sum that Python divides

// Checks and runs either op. row_gradient (N), or nullptr: no gradient wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const char* op, const Tensor& h, const Tensor& weight,
                                               const OptionalTensor& bias, const Tensor& target,
                                               int64_t ignore_index, double label_smoothing, bool high,
                                               const void* row_gradient, Tensor loss) {
  check_cpu(op, "h", h);
  check_cpu(op, "weight", weight);
  check_dim(op, "h", h, 2);
  check_dim(op, "weight", weight, 2);
  const int64_t N = h.size(0), E = h.size(1), V = weight.size(0);
  const DType dtype = dtype_of(op, "h", h), weight_type = dtype_of(op, "weight", weight);
  ULMFIT_CHECK(weight_type == dtype || (weight_type == DType::f32 && size_of(dtype) == 2), op,
               "weight must be ", name_of(h.scalar_type()), ", as h is, or float32 where h is 16-bit, got ",
               name_of(weight.scalar_type()));
  ULMFIT_CHECK(V > 0, op, "weight must have shape (V, E) with V > 0, got ", shape_text(weight.sizes()));
  check_shape(op, "weight", weight, {V, E});
  check_cpu(op, "target", target);
  check_dtype(op, "target", target, ScalarType::Long);
  check_shape(op, "target", target, {N});
  ULMFIT_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, "label_smoothing must be in [0, 1], got ",
               label_smoothing);
  const Tensor targets = torch::stable::contiguous(target);
  check_range(op, "target", ids_of(targets), N, 0, V, ignore_index);
  Tensor bias_values;
  if (bias.has_value()) {
    check_cpu(op, "bias", *bias);
    check_dtype(op, "bias", *bias, weight.scalar_type());
    check_shape(op, "bias", *bias, {V});
    bias_values = torch::stable::contiguous(*bias);
  }
  const Tensor h_rows = with_contiguous_rows(h), weight_rows = with_contiguous_rows(weight);
  const bool grad = row_gradient != nullptr;
  const int64_t nothing[] = {0}, h_shape[] = {N, E}, weight_shape[] = {V, E},
                bias_shape[] = {bias.has_value() ? V : 0};
  const auto shaped = [&](const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
    return with_huge_pages(
        torch::stable::new_empty(like, grad ? shape : torch::headeronly::IntHeaderOnlyArrayRef(nothing, 1)));
  };
  Tensor dh = shaped(h, {h_shape, 2}), dweight = shaped(weight, {weight_shape, 2}),
         dbias = shaped(weight, {bias_shape, 1});
  LinearCrossEntropy a;
  a.N = N;
  a.E = E;
  a.V = V;
  a.h = {data_of(h_rows), dtype, N > 1 ? h_rows.stride(0) : E};
  a.weight = {data_of(weight_rows), weight_type, V > 1 ? weight_rows.stride(0) : E};
  a.bias = bias.has_value() ? data_of(bias_values) : nullptr;
  a.target = ids_of(targets);
  a.ignore_index = ignore_index;
  a.label_smoothing = label_smoothing;
  a.high = high;
  a.row_gradient = row_gradient;
  a.loss = data_of(loss);
  a.dh = data_of(dh);
  a.dweight = data_of(dweight);
  a.dbias = grad && bias.has_value() ? data_of(dbias) : nullptr;
  kernels().linear_cross_entropy(a, torch_pool());
  return {loss, dh, dweight, dbias};
}

ScalarType statistics_type(const Tensor& h) {
  return h.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
Tensor vector_like(const Tensor& h, int64_t n) {
  const int64_t shape[] = {n};
  return torch::stable::new_empty(h, shape, statistics_type(h));
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
  return torch::stable::fill_(sum, total);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& h, const Tensor& weight,
                                                                const OptionalTensor& bias,
                                                                const Tensor& target, int64_t ignore_index,
                                                                double label_smoothing, int64_t reduction,
                                                                bool high, bool grad) {
  constexpr const char* op = "linear_cross_entropy";
  ULMFIT_CHECK(reduction == kNone || reduction == kSum, op, "reduction must be 0 (none) or 2 (sum), got ",
               reduction);
  ULMFIT_CHECK(!(grad && reduction == kNone), op, "grad must be False where reduction is 0 (none)");
  Tensor loss = vector_like(h, target.numel());
  Tensor upstream = vector_like(h, grad ? target.numel() : 0);
  torch::stable::fill_(upstream, 1.0);
  // An empty batch still has a gradient, zeros; any pointer says that one is wanted.
  const void* row_gradient = !grad ? nullptr : target.numel() > 0 ? data_of(upstream) : &reduction;
  auto result = run(op, h, weight, bias, target, ignore_index, label_smoothing, high, row_gradient, loss);
  if (reduction == kSum) std::get<0>(result) = sum_of(loss);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(const Tensor& dloss, const Tensor& h,
                                                                 const Tensor& weight,
                                                                 const OptionalTensor& bias,
                                                                 const Tensor& target, int64_t ignore_index,
                                                                 double label_smoothing, bool high) {
  constexpr const char* op = "linear_cross_entropy_backward";
  check_cpu(op, "dloss", dloss);
  check_dtype(op, "dloss", dloss, statistics_type(h));
  check_shape(op, "dloss", dloss, {target.numel()});
  const Tensor upstream = torch::stable::contiguous(dloss);
  const void* row_gradient = target.numel() > 0 ? data_of(upstream) : &op;
  auto [loss, dh, dweight, dbias] = run(op, h, weight, bias, target, ignore_index, label_smoothing, high,
                                        row_gradient, vector_like(h, target.numel()));
  return {dh, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
}

}  // namespace ulmfit_fast
