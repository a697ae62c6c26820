// The LSTM. What has no order in time is one product of torch's library each.
// The recurrence is a product and a fused kernel for every step, for any size
// and card; or, where it is asked for, one kernel (lstm_persistent.h).
#include "lstm_persistent.h"

namespace ulmfit_fast::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_op(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& lengths, const Tensor& seed,
    const Tensor& dropout_seed, double weight_p, double dropout_p, bool batch_first, bool reverse, bool high,
    bool save) {
  const LstmInputs in("lstm", x, h0, c0, w_ih, w_hh, lengths, seed, weight_p, dropout_seed, dropout_p,
                      batch_first);
  const ScalarType weight_type = in.w_hh.scalar_type();
  const OptionalTensor bias_ih = in.checked("b_ih", b_ih, weight_type, {4 * in.H}),
                       bias_hh = in.checked("b_hh", b_hh, weight_type, {4 * in.H});
  const LstmOutputs out(in, dropout_p > 0, save);
  if (in.B == 0) return out.all();
  const Layer layer(in, seed, dropout_seed, weight_p, dropout_p, reverse);
  void* stream = layer.device.stream;

  const Tensor first_cell = layer.state("c0", in.c0);
  Tensor h = out.h_n, recurrent = empty_like(in.x, {in.B, 4 * in.H}, layer.sums), bias;
  masked_copy(in.op, in.matrix("h0", in.h0), in.B, in.H, Mask(), layer.dtype, data_of(h), stream);
  if (bias_ih.has_value() || bias_hh.has_value()) {
    const OptionalTensor& one = bias_ih.has_value() ? bias_ih : bias_hh;
    bias = empty_like(in.x, {4 * in.H}, layer.sums);
    add(in.op, data_of(*one), bias_ih.has_value() && bias_hh.has_value() ? data_of(*bias_hh) : nullptr,
        dtype_of(in.op, "b_ih", *one), dtype_of(in.op, "b_ih", bias), 4 * in.H, data_of(bias), stream);
  }
  Tensor projected = layer.sequence(4 * in.H, layer.sums);
  if (in.T > 0) {
    Tensor rows = as_rows(projected);
    multiply(as_rows(torch::stable::contiguous(in.x)), transposed(layer.operand("w_ih", in.w_ih, Mask())),
             rows);
  }
  const LstmPlan plan = plan_recurrence(layer, high, Direction::forward);
  if (plan.fits() && persistent_forward(layer, plan, projected, bias, first_cell, save, out))
    return out.all();
  const Tensor w = transposed(layer.dropped_w_hh());
  const int64_t units = padded_units(in.H), cell_size = in.B * units;
  const Tensor rolling = save ? Tensor() : empty_like(in.x, {in.B, units}, layer.sums);
  const auto cell = [&](int64_t step) {
    if (step < 0) return data_of(first_cell);
    return save ? layer.at(out.cells, layer.time_of(step) * cell_size) : data_of(rolling);
  };
  for (int64_t i = 0; i < in.T; ++i) {
    multiply(h, w, recurrent);
    LstmStepForward a;
    a.step = layer.step(i);
    a.projected = in.sequence("x", projected);
    a.recurrent = data_of(recurrent);
    a.bias = bias.defined() ? data_of(bias) : nullptr;
    a.c_prev = cell(i - 1);
    a.c_prev_stride = i == 0 ? in.H : units;
    a.c = cell(i);
    a.h = data_of(h);
    a.y = in.sequence("y", out.y);
    a.gates = save ? layer.at(out.gates, layer.time_of(i) * 4 * cell_size) : nullptr;
    lstm_step(a, stream);
  }
  masked_copy(in.op, {cell(in.T - 1), dtype_of(in.op, "c0", first_cell), in.T > 0 ? units : in.H}, in.B, in.H,
              Mask(), layer.dtype, data_of(out.c_n), stream);
  if (dropout_p > 0) layer.drop_output("y", out.y, out.dropped);
  return out.all();
}

class Backward {
 public:
  Backward(const LstmInputs& in, const Layer& layer, const Tensor& y, const Tensor& gates,
           const Tensor& cells, const LstmGradients& out)
      : in(in),
        layer(layer),
        y(torch::stable::contiguous(y)),
        gates(gates),
        cells(cells),
        out(out),
        dgates(layer.sequence(4 * in.H, layer.type)) {}

  // From the last step to the first: dgates of every step, dh0 and dc0.
  void recurrence(OptionalTensor dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                  const OptionalTensor& ddropped, bool tf32) {
    const Tensor dh = layer.state("dh_n", dh_n), dc = layer.state("dc_n", dc_n);
    const Tensor first_cell = layer.state("c0", in.c0), w = layer.dropped_w_hh();
    const Sequence upstream = dy.has_value() ? in.sequence("dy", *dy) : Sequence(),
                   through = ddropped.has_value() ? in.sequence("ddropped", *ddropped) : Sequence();
    for (const bool clusters : {true, false}) {
      const LstmPlan plan = plan_recurrence(layer, tf32, Direction::backward, clusters);
      if (plan.fits() && persistent_backward(layer, plan, upstream, through, dh, dc, first_cell, w, gates,
                                             cells, dgates, out))
        return;
      if (!plan.split.clusters) break;
    }
    if (ddropped.has_value()) dy = with_dropped(dy, *ddropped);
    const Tensor dgates_step = empty_like(in.x, {in.B, 4 * in.H});
    Tensor recurrent = empty_like(in.x, {in.B, in.H}, layer.sums);
    const int64_t units = padded_units(in.H), cell_size = in.B * units;
    const auto cell = [&](int64_t step) {
      return step < 0 ? data_of(first_cell) : layer.at(cells, layer.time_of(step) * cell_size);
    };
    for (int64_t i = in.T - 1; i >= 0; --i) {
      LstmStepBackward a;
      a.step = layer.step(i);
      if (dy.has_value()) a.dy = in.sequence("dy", *dy);
      a.recurrent = i == in.T - 1 ? nullptr : data_of(recurrent);
      a.dh = data_of(dh);
      a.dc = data_of(dc);
      a.gates = layer.at(gates, layer.time_of(i) * 4 * cell_size);
      a.c_prev = cell(i - 1);
      a.c_prev_stride = i == 0 ? in.H : units;
      a.c = cell(i);
      a.dgates = in.sequence("dgates", dgates);
      a.dgates_step = data_of(dgates_step);
      lstm_step_backward(a, layer.device.stream);
      multiply(dgates_step, w, recurrent);
    }
    const DType sums = dtype_of(in.op, "dh_n", dh);
    add(in.op, data_of(dh), in.T > 0 ? data_of(recurrent) : nullptr, sums, layer.dtype, in.B * in.H,
        data_of(out.dh0), layer.device.stream);
    add(in.op, data_of(dc), nullptr, sums, layer.dtype, in.B * in.H, data_of(out.dc0), layer.device.stream);
  }

  void input_gradient() {
    Tensor dx = as_rows(out.dx);
    multiply(as_rows(dgates), layer.operand("w_ih", in.w_ih, Mask()), dx);
  }

  void weight_gradients() {
    const Tensor columns = transposed(as_rows(dgates));
    // x's padding may hold anything, and 0 * NaN is NaN
    const Tensor x = in.lengths.has_value() ? before(in.x, in.I, Matrix()) : torch::stable::contiguous(in.x);
    gradient(columns, as_rows(x), out.dw_ih, Mask());
    gradient(columns, as_rows(before(y, in.H, in.matrix("h0", in.h0))), out.dw_hh, layer.mask);
    const int64_t rows[] = {0};
    const Tensor db = torch::stable::sum(as_rows(dgates), rows, false, layer.sums);
    add(in.op, data_of(db), nullptr, dtype_of(in.op, "db", db), dtype_of(in.op, "db", out.db), 4 * in.H,
        data_of(out.db), layer.device.stream);
  }

 private:
  // dy and what comes through y's dropout.
  Tensor with_dropped(const OptionalTensor& dy, const Tensor& ddropped) const {
    const Tensor sum = layer.sequence(in.H, layer.type);
    layer.drop_output("ddropped", ddropped, sum);
    if (!dy.has_value()) return sum;
    const Tensor rows = torch::stable::contiguous(*dy);
    add(in.op, data_of(sum), data_of(rows), layer.dtype, layer.dtype, in.T * in.B * in.H, data_of(sum),
        layer.device.stream);
    return sum;
  }

  // The sequence of states before each step, or without h0 the sequence itself; zeros where it is padding.
  Tensor before(const Tensor& sequence, int64_t width, const Matrix& h0) const {
    const Tensor result = layer.sequence(width, layer.type);
    StatesBefore a;
    a.T = in.T;
    a.B = in.B;
    a.H = width;
    a.reverse = layer.reverse;
    a.lengths = in.lengths.has_value() ? ids_of(*in.lengths) : nullptr;
    a.in = in.sequence("y", sequence);
    a.out = in.sequence("y", result);
    a.h0 = h0;
    states_before(a, layer.device.stream);
    return result;
  }

  // dw = mask * (dgates^T @ inputs), rounded to dw's dtype once.
  void gradient(const Tensor& columns, const Tensor& inputs, const Tensor& dw, const Mask& mask) const {
    if (mask.p == 0 || dw.scalar_type() == layer.sums) {
      Tensor result = dw;
      multiply(columns, inputs, result);
      if (mask.p > 0) masked(dw, mask, dw);
    } else {
      masked(product(columns, inputs, layer.sums), mask, dw);
    }
  }
  void masked(const Tensor& from, const Mask& mask, const Tensor& to) const {
    masked_copy(in.op, in.matrix("dw_hh", from), from.size(0), from.size(1), mask,
                dtype_of(in.op, "dw_hh", to), data_of(to), layer.device.stream);
  }

  const LstmInputs& in;
  const Layer& layer;
  const Tensor y, gates, cells;
  const LstmGradients& out;
  const Tensor dgates;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward_op(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
    const OptionalTensor& ddropped, const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
    const Tensor& w_hh, const OptionalTensor& lengths, const Tensor& seed, const Tensor& dropout_seed,
    const Tensor& y, const Tensor& gates, const Tensor& cells, double weight_p, double dropout_p,
    bool batch_first, bool reverse, bool high, bool need_dx, bool need_dw) {
  const LstmInputs in("lstm_backward", x, h0, c0, w_ih, w_hh, lengths, seed, weight_p, dropout_seed,
                      dropout_p, batch_first);
  const ScalarType type = x.scalar_type();
  const LstmGradients out(in, need_dx, need_dw);
  const Layer layer(in, seed, dropout_seed, weight_p, dropout_p, reverse);
  Backward pass(in, layer, in.checked("y", y, type, {x.size(0), x.size(1), in.H}), in.saved_gates(gates),
                in.saved_cells(cells), out);
  if (in.B > 0) {
    pass.recurrence(in.checked("dy", dy, type, {x.size(0), x.size(1), in.H}),
                    in.checked("dh_n", dh_n, type, {in.B, in.H}),
                    in.checked("dc_n", dc_n, type, {in.B, in.H}),
                    in.checked("ddropped", ddropped, type, {x.size(0), x.size(1), in.H}), high);
  }
  if (in.B > 0 && in.T > 0) {
    if (need_dx) pass.input_gradient();
    if (need_dw) pass.weight_gradients();
  } else {
    for (Tensor dw : {out.dw_ih, out.dw_hh, out.db}) torch::stable::zero_(dw);
  }
  return out.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, ULMFIT_CUDA_KEY, m) {
  m.impl("lstm", TORCH_BOX(&lstm_op));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward_op));
  m.impl("lstm_plan", TORCH_BOX(&lstm_plan));
}

}  // namespace ulmfit_fast::cuda
