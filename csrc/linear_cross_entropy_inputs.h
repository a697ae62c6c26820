// Checks and results of linear_cross_entropy, on any device.
#pragma once
#include <tuple>

#include "views.h"

namespace ulmfit_fast {

enum Reduction : int64_t { kNone = 0, kSum = 2 };  // a mean is a sum that Python divides

struct LinearCrossEntropyInputs {
  const char* op;
  Tensor h, weight, target;  // with contiguous rows
  OptionalTensor bias;
  int64_t N, E, V, ignore_index;
  double label_smoothing;

  // That each target is in 0..V-1, or ignored, is for the device to check.
  LinearCrossEntropyInputs(const char* op, const Tensor& h_in, const Tensor& weight_in,
                           const OptionalTensor& bias_in, const Tensor& target_in, int64_t ignore_index,
                           double label_smoothing)
      : op(op), h(h_in), weight(weight_in), ignore_index(ignore_index), label_smoothing(label_smoothing) {
    check_device(op, "weight", weight, h);
    check_dim(op, "h", h, 2);
    check_dim(op, "weight", weight, 2);
    N = h.size(0), E = h.size(1), V = weight.size(0);
    check_weight_dtype(op, "weight", weight, "h", h);
    ULMFIT_CHECK(V > 0, op, "weight must have shape (V, E) with V > 0, got ", shape_text(weight.sizes()));
    check_shape(op, "weight", weight, {V, E});
    check_device(op, "target", target_in, h);
    check_dtype(op, "target", target_in, ScalarType::Long);
    check_shape(op, "target", target_in, {N});
    ULMFIT_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, "label_smoothing must be in [0, 1], got ",
                 label_smoothing);
    target = torch::stable::contiguous(target_in);
    bias = checked_bias(op, bias_in, weight);
    h = with_contiguous_rows(h);
    weight = with_contiguous_rows(weight);
  }

  const void* bias_data() const { return bias.has_value() ? data_of(*bias) : nullptr; }
};

// Unwritten; the gradients are empty unless wanted, those of weight and bias unless need_dw.
struct LinearCrossEntropyResults {
  Tensor loss, dh, dweight, dbias;

  LinearCrossEntropyResults(const LinearCrossEntropyInputs& in, bool grad, bool need_dw,
                            bool dweight_later = false)
      : loss(empty_like(in.h, {in.N}, compute_type(in.h))),
        dh(grad ? empty_like(in.h, {in.N, in.E}) : empty_like(in.h, {0})),
        dweight(grad && need_dw && !dweight_later ? empty_like(in.weight, {in.V, in.E})
                                                  : empty_like(in.weight, {0})),
        dbias(empty_like(in.weight, {grad && need_dw && in.bias.has_value() ? in.V : 0})) {}
};

inline void check_reduction(const char* op, int64_t reduction, bool grad) {
  ULMFIT_CHECK(reduction == kNone || reduction == kSum, op, "reduction must be 0 (none) or 2 (sum), got ",
               reduction);
  ULMFIT_CHECK(!(grad && reduction == kNone), op, "grad must be False where reduction is 0 (none)");
}

// The upstream gradient of each row's loss, contiguous.
inline Tensor checked_row_gradient(const LinearCrossEntropyInputs& in, const Tensor& dloss) {
  check_device(in.op, "dloss", dloss, in.h);
  check_dtype(in.op, "dloss", dloss, compute_type(in.h));
  check_shape(in.op, "dloss", dloss, {in.N});
  return torch::stable::contiguous(dloss);
}

}  // namespace ulmfit_fast
