// What both directions and both paths of the LSTM share:
// where a step is, and the weights as products take them.
#pragma once
#include "../lstm_inputs.h"
#include "glue.h"

namespace ulmfit_fast::cuda {

// The rows (T * B, width) of a contiguous sequence, in the order they lie in.
inline Tensor as_rows(const Tensor& sequence) {
  const int64_t flat[] = {sequence.size(0) * sequence.size(1), sequence.size(2)};
  return torch::stable::view(sequence, flat);
}

struct Layer {
  const LstmInputs& in;
  const Device device;
  const DType dtype;
  const ScalarType type, sums;  // of x, and of what products give
  const Mask mask, dropout;     // of w_hh and of y
  const bool reverse;

  Layer(const LstmInputs& in, const Tensor& seed, const Tensor& dropout_seed, double weight_p,
        double dropout_p, bool reverse)
      : in(in),
        device(in.x),
        dtype(in.dtype()),
        type(in.x.scalar_type()),
        sums(compute_type(in.x)),
        mask(mask_of(seed, weight_p)),
        dropout(mask_of(dropout_seed, dropout_p)),
        reverse(reverse) {}

  int64_t time_of(int64_t step) const { return reverse ? in.T - 1 - step : step; }

  LstmStep step(int64_t step) const {
    const int64_t* lengths = in.lengths.has_value() ? ids_of(*in.lengths) : nullptr;
    return {.B = in.B,
            .H = in.H,
            .t = time_of(step),
            .units = padded_units(in.H),
            .dtype = dtype,
            .lengths = lengths,
            .first = step == 0,
            .T = in.T};
  }

  // A weight in x's dtype, dropped if there is a mask; itself where nothing is to be done.
  Tensor operand(const char* name, const Tensor& weight, const Mask& dropped) const {
    if (dropped.p == 0 && weight.scalar_type() == type) return weight;
    const Tensor result = empty_like(weight, {weight.size(0), weight.size(1)}, type);
    masked_copy(in.op, in.matrix(name, weight), weight.size(0), weight.size(1), dropped, dtype,
                data_of(result), device.stream);
    return result;
  }
  Tensor dropped_w_hh() const { return operand("w_hh", in.w_hh, mask); }

  // A (B, H) state in what sums are kept in; none gives zeros.
  Tensor state(const char* name, const OptionalTensor& given) const {
    if (!given.has_value()) {
      const int64_t shape[] = {in.B, in.H};
      return torch::stable::new_zeros(in.x, shape, sums);
    }
    const Tensor result = empty_like(in.x, {in.B, in.H}, sums);
    masked_copy(in.op, in.matrix(name, *given), in.B, in.H, Mask(), dtype_of(in.op, name, result),
                data_of(result), device.stream);
    return result;
  }

  // out = in after y's dropout.
  void drop_output(const char* name, const Tensor& from, const Tensor& out) const {
    variational_dropout({.T = in.T,
                         .B = in.B,
                         .F = in.H,
                         .in = in.sequence(name, from),
                         .out = in.sequence(name, out),
                         .mask = dropout},
                        device.stream);
  }

  // (T, B, width) in the layout of x, unwritten.
  Tensor sequence(int64_t width, ScalarType dtype) const {
    return empty_like(in.x, {in.x.size(0), in.x.size(1), width}, dtype);
  }
  void* at(const Tensor& t, int64_t element) const {
    return static_cast<char*>(t.data_ptr()) + element * t.element_size();
  }
};

}  // namespace ulmfit_fast::cuda
