#include "../lstm_inputs.h"
#include "glue.h"

namespace ulmfit_fast {
namespace {

LstmShape shape_of(const LstmInputs& in, const Tensor& seed, const Tensor& dropout_seed, double weight_p,
                   double dropout_p, bool reverse, bool high) {
  LstmShape shape = {.T = in.T,
                     .B = in.B,
                     .I = in.I,
                     .H = in.H,
                     .reverse = reverse,
                     .weight_p = weight_p,
                     .high = high,
                     .dropout_p = dropout_p};
  if (weight_p > 0) shape.seed = seed_of(seed);
  if (dropout_p > 0) shape.dropout_seed = seed_of(dropout_seed);
  // An empty batch has a null pointer, which would read as "no lengths"; it has no step either.
  if (in.lengths.has_value()) shape.lengths = lengths_of(in.op, *in.lengths, in.T);
  return shape;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& lengths, const Tensor& seed,
    const Tensor& dropout_seed, double weight_p, double dropout_p, bool batch_first, bool reverse, bool high,
    bool save) {
  const LstmInputs in("lstm", x, h0, c0, w_ih, w_hh, lengths, seed, weight_p, dropout_seed, dropout_p,
                      batch_first);
  const ScalarType weight_type = in.w_hh.scalar_type();
  const OptionalTensor bias_ih = in.checked("b_ih", b_ih, weight_type, {4 * in.H}),
                       bias_hh = in.checked("b_hh", b_hh, weight_type, {4 * in.H});
  const LstmOutputs out(in, dropout_p > 0, save, lent);
  use_huge_pages({out.y, out.dropped});
  LstmForward a;
  a.shape = shape_of(in, seed, dropout_seed, weight_p, dropout_p, reverse, high);
  a.x = in.sequence("x", in.x);
  a.h0 = in.matrix("h0", in.h0);
  a.c0 = in.matrix("c0", in.c0);
  a.w_ih = in.matrix("w_ih", in.w_ih);
  a.w_hh = in.matrix("w_hh", in.w_hh);
  a.b_ih = bias_ih.has_value() ? data_of(*bias_ih) : nullptr;
  a.b_hh = bias_hh.has_value() ? data_of(*bias_hh) : nullptr;
  a.y = in.sequence("y", out.y);
  if (dropout_p > 0) a.dropped = in.sequence("dropped", out.dropped);
  a.h_n = data_of(out.h_n);
  a.c_n = data_of(out.c_n);
  a.gates = data_of(out.gates);
  a.cells = data_of(out.cells);
  if (in.B > 0) kernels().lstm(a, torch_pool());
  return out.all();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
    const OptionalTensor& ddropped, const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
    const Tensor& w_hh, const OptionalTensor& lengths, const Tensor& seed, const Tensor& dropout_seed,
    const Tensor& y, const Tensor& gates, const Tensor& cells, double weight_p, double dropout_p,
    bool batch_first, bool reverse, bool high, bool need_dx, bool need_dw) {
  const LstmInputs in("lstm_backward", x, h0, c0, w_ih, w_hh, lengths, seed, weight_p, dropout_seed,
                      dropout_p, batch_first);
  const ScalarType dtype = x.scalar_type();
  const Tensor y_rows = in.checked("y", y, dtype, {x.size(0), x.size(1), in.H});
  const Tensor gate_rows = in.saved_gates(gates), cell_rows = in.saved_cells(cells);
  const OptionalTensor dy_rows = in.checked("dy", dy, dtype, {x.size(0), x.size(1), in.H}),
                       ddropped_rows = in.checked("ddropped", ddropped, dtype, {x.size(0), x.size(1), in.H}),
                       dh_rows = in.checked("dh_n", dh_n, dtype, {in.B, in.H}),
                       dc_rows = in.checked("dc_n", dc_n, dtype, {in.B, in.H});
  const LstmGradients out(in, need_dx, need_dw);
  use_huge_pages({out.dx, out.dw_ih, out.dw_hh});
  LstmBackward a;
  a.shape = shape_of(in, seed, dropout_seed, weight_p, dropout_p, reverse, high);
  if (dy_rows.has_value()) a.dy = in.sequence("dy", *dy_rows);
  if (ddropped_rows.has_value()) a.ddropped = in.sequence("ddropped", *ddropped_rows);
  if (dh_rows.has_value()) a.dh_n = in.matrix("dh_n", *dh_rows);
  if (dc_rows.has_value()) a.dc_n = in.matrix("dc_n", *dc_rows);
  a.x = in.sequence("x", in.x);
  a.y = in.sequence("y", y_rows);
  a.h0 = in.matrix("h0", in.h0);
  a.c0 = in.matrix("c0", in.c0);
  a.w_ih = in.matrix("w_ih", in.w_ih);
  a.w_hh = in.matrix("w_hh", in.w_hh);
  a.gates = data_of(gate_rows);
  a.cells = data_of(cell_rows);
  if (out.dx.numel() > 0) a.dx = in.sequence("dx", out.dx);
  a.dh0 = data_of(out.dh0);
  a.dc0 = data_of(out.dc0);
  a.dw_ih = data_of(out.dw_ih);
  a.dw_hh = data_of(out.dw_hh);
  a.db = data_of(out.db);
  kernels().lstm_backward(a, torch_pool());
  return out.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) {
  m.impl("lstm", TORCH_BOX(&lstm));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
}

}  // namespace ulmfit_fast
