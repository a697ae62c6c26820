// The tensors that both directions of lstm take, on any device: checked, with contiguous rows, kept alive
// while kernels run.
#pragma once
#include <tuple>

#include "views.h"

namespace ulmfit_fast {

struct LstmInputs {
  const char* op;
  bool batch_first;
  Tensor x, h0, c0, w_ih, w_hh;
  OptionalTensor lengths;  // contiguous
  int64_t T, B, I, H;

  LstmInputs(const char* op, const Tensor& x_in, const Tensor& h0_in, const Tensor& c0_in,
             const Tensor& w_ih_in, const Tensor& w_hh_in, const OptionalTensor& lengths_in,
             const Tensor& seed, double weight_p, const Tensor& dropout_seed, double dropout_p,
             bool batch_first)
      : op(op), batch_first(batch_first), x(x_in) {
    check_dim(op, "x", x_in, 3);
    check_dim(op, "w_hh", w_hh_in, 2);
    T = x_in.size(batch_first ? 1 : 0), B = x_in.size(batch_first ? 0 : 1), I = x_in.size(2);
    H = w_hh_in.size(1);
    ULMFIT_CHECK(I > 0, op, "x must have at least one feature, got shape ", shape_text(x_in.sizes()));
    ULMFIT_CHECK(H > 0, op, "w_hh must have shape (4H, H) with H > 0, got ", shape_text(w_hh_in.sizes()));
    x = checked("x", x_in, x_in.scalar_type());
    h0 = checked("h0", h0_in, x_in.scalar_type(), {B, H});
    c0 = checked("c0", c0_in, x_in.scalar_type(), {B, H});
    w_hh = checked("w_hh", w_hh_in, w_hh_in.scalar_type(), {4 * H, H});
    w_ih = checked("w_ih", w_ih_in, w_hh_in.scalar_type(), {4 * H, I});
    check_weight_dtype(op, "w_hh", w_hh, "x", x);
    check_probability(op, "weight_p", weight_p);
    if (weight_p > 0) check_seed(op, seed, x);
    check_probability(op, "dropout_p", dropout_p);
    if (dropout_p > 0) check_seed(op, dropout_seed, x);
    if (lengths_in.has_value()) {
      check_lengths(op, *lengths_in, B, x);
      lengths = torch::stable::contiguous(*lengths_in);
    }
  }

  Tensor checked(const char* name, const Tensor& t, ScalarType dtype) const {
    check_device(op, name, t, x);
    check_dtype(op, name, t, dtype);
    dtype_of(op, name, t);
    return with_contiguous_rows(t);
  }
  Tensor checked(const char* name, const Tensor& t, ScalarType dtype, Sizes sizes) const {
    check_shape(op, name, t, sizes);
    return checked(name, t, dtype);
  }
  // One that may be missing; (4H) for the biases, contiguous.
  OptionalTensor checked(const char* name, const OptionalTensor& t, ScalarType dtype, Sizes sizes) const {
    if (!t.has_value()) return t;
    return checked(name, *t, dtype, sizes);
  }
  // What forward saved, as it was allocated.
  Tensor saved_gates(const Tensor& gates) const {
    return torch::stable::contiguous(checked("gates", gates, x.scalar_type(), {T, B, 4 * padded_units(H)}));
  }
  Tensor saved_cells(const Tensor& cells) const {
    return torch::stable::contiguous(checked("cells", cells, compute_type(x), {T, B, padded_units(H)}));
  }
  DType dtype() const { return dtype_of(op, "x", x); }
  Sequence sequence(const char* name, const Tensor& t) const { return sequence_of(op, name, t, batch_first); }
  Matrix matrix(const char* name, const Tensor& t) const { return matrix_of(op, name, t); }
};

// lstm's results, unwritten; dropped is empty unless y's dropout drops something; gates and cells, which only
// backward sees, are made by new_saved and empty unless saved.
struct LstmOutputs {
  Tensor y, h_n, c_n, dropped, gates, cells;

  LstmOutputs(const LstmInputs& in, bool drops, bool save, NewTensor new_saved = empty_like)
      : y(empty_like(in.x, {in.x.size(0), in.x.size(1), in.H})),
        h_n(empty_like(in.x, {in.B, in.H})),
        c_n(empty_like(in.x, {in.B, in.H})),
        dropped(drops ? empty_like(in.x, {in.x.size(0), in.x.size(1), in.H}) : empty_like(in.x, {0})),
        gates(save ? new_saved(in.x, {in.T, in.B, 4 * padded_units(in.H)}, in.x.scalar_type())
                   : empty_like(in.x, {0})),
        cells(save ? new_saved(in.x, {in.T, in.B, padded_units(in.H)}, compute_type(in.x))
                   : empty_like(in.x, {0}, compute_type(in.x))) {}
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> all() const {
    return {y, h_n, c_n, dropped, gates, cells};
  }
};

// lstm_backward's results, unwritten; those not wanted are empty.
struct LstmGradients {
  Tensor dx, dh0, dc0, dw_ih, dw_hh, db;

  LstmGradients(const LstmInputs& in, bool need_dx, bool need_dw)
      : dx(need_dx ? empty_like(in.x, {in.x.size(0), in.x.size(1), in.I}) : empty_like(in.x, {0})),
        dh0(empty_like(in.x, {in.B, in.H})),
        dc0(empty_like(in.x, {in.B, in.H})),
        dw_ih(need_dw ? empty_like(in.w_ih, {4 * in.H, in.I}) : empty_like(in.w_ih, {0})),
        dw_hh(need_dw ? empty_like(in.w_hh, {4 * in.H, in.H}) : empty_like(in.w_hh, {0})),
        db(need_dw ? empty_like(in.w_hh, {4 * in.H}) : empty_like(in.w_hh, {0})) {}
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> all() const {
    return {dx, dh0, dc0, dw_ih, dw_hh, db};
  }
};

}  // namespace ulmfit_fast
