#include <optional>
#include <tuple>

#include "glue.h"

namespace ulmfit_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The tensors both directions take, checked, with contiguous rows, kept alive while the kernel runs.
struct Inputs {
  const char* op;
  bool batch_first;
  Tensor x, h0, c0, w_ih, w_hh, lengths;
  LstmShape shape;

  Inputs(const char* op_name, const Tensor& x_in, const Tensor& h0_in, const Tensor& c0_in,
         const Tensor& w_ih_in, const Tensor& w_hh_in, const OptionalTensor& lengths_in, const Tensor& seed,
         double weight_p, bool is_batch_first, bool reverse, bool high)
      : op(op_name), batch_first(is_batch_first) {
    check_dim(op, "x", x_in, 3);
    check_dim(op, "w_hh", w_hh_in, 2);
    const int64_t T = x_in.size(batch_first ? 1 : 0), B = x_in.size(batch_first ? 0 : 1), I = x_in.size(2);
    const int64_t H = w_hh_in.size(1);
    ULMFIT_CHECK(H > 0, op, "w_hh must have shape (4H, H) with H > 0, got ", shape_text(w_hh_in.sizes()));
    x = checked("x", x_in, x_in.scalar_type());
    h0 = checked("h0", h0_in, x_in.scalar_type(), {B, H});
    c0 = checked("c0", c0_in, x_in.scalar_type(), {B, H});
    w_hh = checked("w_hh", w_hh_in, w_hh_in.scalar_type(), {4 * H, H});
    w_ih = checked("w_ih", w_ih_in, w_hh_in.scalar_type(), {4 * H, I});
    ULMFIT_CHECK(w_hh.scalar_type() == x.scalar_type() ||
                     (w_hh.scalar_type() == ScalarType::Float && size_of(dtype_of(op, "x", x)) == 2),
                 op, "w_hh must be ", name_of(x.scalar_type()),
                 ", as x is, or float32 where x is 16-bit, got ", name_of(w_hh.scalar_type()));
    check_probability(op, "weight_p", weight_p);
    shape = {T, B, I, H, reverse, nullptr, weight_p > 0 ? seed_of(op, seed) : 0, weight_p, high};
    if (lengths_in.has_value()) {
      lengths = torch::stable::contiguous(*lengths_in);
      shape.lengths = lengths_of(op, lengths, B, T);
      // An empty batch has a null pointer, which would read as "no lengths"; it has no step either.
    }
  }

  Tensor checked(const char* name, const Tensor& t, ScalarType dtype) const {
    check_cpu(op, name, t);
    check_dtype(op, name, t, dtype);
    dtype_of(op, name, t);
    return with_contiguous_rows(t);
  }
  Tensor checked(const char* name, const Tensor& t, ScalarType dtype,
                 std::initializer_list<int64_t> sizes) const {
    check_shape(op, name, t, sizes);
    return checked(name, t, dtype);
  }
  Sequence sequence(const char* name, const Tensor& t) const { return sequence_of(op, name, t, batch_first); }
  Matrix matrix(const char* name, const Tensor& t) const {
    return {data_of(t), dtype_of(op, name, t), t.size(0) > 1 ? t.stride(0) : t.size(1)};
  }
  Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) const {
    return with_huge_pages(torch::stable::new_empty(like, {sizes.begin(), sizes.size()}));
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& lengths, const Tensor& seed,
    double weight_p, bool batch_first, bool reverse, bool high, bool save) {
  const Inputs in("lstm", x, h0, c0, w_ih, w_hh, lengths, seed, weight_p, batch_first, reverse, high);
  const auto& [T, B, I, H, is_reverse, steps, key, p, is_high] = in.shape;
  std::optional<Tensor> biases[2];
  const std::optional<Tensor>* given[2] = {&b_ih, &b_hh};
  for (int i = 0; i < 2; ++i)
    if (given[i]->has_value()) {
      const char* name = i == 0 ? "b_ih" : "b_hh";
      biases[i] = in.checked(name, **given[i], in.w_hh.scalar_type(), {4 * H});
    }
  const Tensor y = in.empty(x, {x.size(0), x.size(1), H});
  const Tensor h_n = in.empty(x, {B, H}), c_n = in.empty(x, {B, H});
  const Tensor gates = save ? in.empty(x, {T, B, 4 * padded_units(H)}) : in.empty(x, {0});
  const auto cell_type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t cells_shape[] = {T, B, padded_units(H)}, nothing[] = {0};
  const Tensor cells = save ? with_huge_pages(torch::stable::new_empty(x, cells_shape, cell_type))
                            : torch::stable::new_empty(x, nothing, cell_type);
  LstmForward a;
  a.shape = in.shape;
  a.x = in.sequence("x", in.x);
  a.h0 = in.matrix("h0", in.h0);
  a.c0 = in.matrix("c0", in.c0);
  a.w_ih = in.matrix("w_ih", in.w_ih);
  a.w_hh = in.matrix("w_hh", in.w_hh);
  a.b_ih = biases[0].has_value() ? data_of(*biases[0]) : nullptr;
  a.b_hh = biases[1].has_value() ? data_of(*biases[1]) : nullptr;
  a.y = in.sequence("y", y);
  a.h_n = data_of(h_n);
  a.c_n = data_of(c_n);
  a.gates = save ? data_of(gates) : nullptr;
  a.cells = save ? data_of(cells) : nullptr;
  if (B > 0) kernels().lstm(a, torch_pool());
  return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n, const Tensor& x,
    const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& lengths,
    const Tensor& seed, const Tensor& y, const Tensor& gates, const Tensor& cells, double weight_p,
    bool batch_first, bool reverse, bool high, bool need_dx, bool need_dw) {
  const Inputs in("lstm_backward", x, h0, c0, w_ih, w_hh, lengths, seed, weight_p, batch_first, reverse,
                  high);
  const auto& [T, B, I, H, is_reverse, steps, key, p, is_high] = in.shape;
  const ScalarType dtype = x.scalar_type();
  const Tensor y_rows = in.checked("y", y, dtype, {x.size(0), x.size(1), H});
  const Tensor gate_rows =
      torch::stable::contiguous(in.checked("gates", gates, dtype, {T, B, 4 * padded_units(H)}));
  const Tensor cell_rows = torch::stable::contiguous(in.checked(
      "cells", cells, dtype == ScalarType::Double ? dtype : ScalarType::Float, {T, B, padded_units(H)}));
  LstmBackward a;
  a.shape = in.shape;
  Tensor dy_rows, dh_rows, dc_rows;
  if (dy.has_value()) {
    dy_rows = in.checked("dy", *dy, dtype, {x.size(0), x.size(1), H});
    a.dy = in.sequence("dy", dy_rows);
  }
  if (dh_n.has_value()) {
    dh_rows = in.checked("dh_n", *dh_n, dtype, {B, H});
    a.dh_n = in.matrix("dh_n", dh_rows);
  }
  if (dc_n.has_value()) {
    dc_rows = in.checked("dc_n", *dc_n, dtype, {B, H});
    a.dc_n = in.matrix("dc_n", dc_rows);
  }
  const Tensor dx = need_dx ? in.empty(x, {x.size(0), x.size(1), I}) : in.empty(x, {0});
  const Tensor dh0 = in.empty(x, {B, H}), dc0 = in.empty(x, {B, H});
  const Tensor dw_ih = need_dw ? in.empty(w_ih, {4 * H, I}) : in.empty(w_ih, {0});
  const Tensor dw_hh = need_dw ? in.empty(w_hh, {4 * H, H}) : in.empty(w_hh, {0});
  const Tensor db = need_dw ? in.empty(w_hh, {4 * H}) : in.empty(w_hh, {0});
  a.x = in.sequence("x", in.x);
  a.y = in.sequence("y", y_rows);
  a.h0 = in.matrix("h0", in.h0);
  a.c0 = in.matrix("c0", in.c0);
  a.w_ih = in.matrix("w_ih", in.w_ih);
  a.w_hh = in.matrix("w_hh", in.w_hh);
  a.gates = data_of(gate_rows);
  a.cells = data_of(cell_rows);
  if (need_dx && dx.numel() > 0) a.dx = in.sequence("dx", dx);
  a.dh0 = data_of(dh0);
  a.dc0 = data_of(dc0);
  a.dw_ih = data_of(dw_ih);
  a.dw_hh = data_of(dw_hh);
  a.db = data_of(db);
  kernels().lstm_backward(a, torch_pool());
  return {dx, dh0, dc0, dw_ih, dw_hh, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) {
  m.impl("lstm", TORCH_BOX(&lstm));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
}

}  // namespace ulmfit_fast
