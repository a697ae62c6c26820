// The persistent recurrence: when it is taken, and its buffers.
//
// ULMFIT_FAST_RECURRENCE, read at every call, says which recurrence runs:
//   general      the default: the persistent kernels have not run on a GPU yet
//   auto         persistent wherever the plan fits this device, else general
//   persistent   persistent, or an error that says why it cannot be
#pragma once
#include <cstdlib>
#include <iomanip>
#include <sstream>
#include <string>

#include "lstm_layer.h"

namespace ulmfit_fast::cuda {

inline std::string wanted_recurrence(const Layer& layer) {
  const char* wish = std::getenv("ULMFIT_FAST_RECURRENCE");
  const std::string wanted = wish == nullptr || *wish == '\0' ? "general" : wish;
  ULMFIT_CHECK(wanted == "general" || wanted == "auto" || wanted == "persistent", layer.in.op,
               "ULMFIT_FAST_RECURRENCE must be general, auto or persistent, got ", wanted);
  return wanted;
}

// Whether f() has launched. The device's numbers may promise too much: of its multiprocessors a green context
// has a share, how many clusters it runs is not guaranteed, and only the launch finds out. After clusters
// there is another plan to try.
template <class F>
bool launched(const Layer& layer, const LstmPlan& plan, F&& f) {
  try {
    f();
    return true;
  } catch (const LaunchTooLarge& error) {
    ULMFIT_CHECK(plan.split.clusters || wanted_recurrence(layer) == "auto", layer.in.op,
                 "ULMFIT_FAST_RECURRENCE=persistent, but ", error.what());
    return false;
  }
}

// tf32: whether torch allows it for float32 products.
inline LstmPlan plan_recurrence(const Layer& layer, bool tf32, Direction direction, bool clusters = true) {
  LstmPlan none;
  const std::string wanted = wanted_recurrence(layer);
  if (wanted == "general" || layer.in.T == 0) return none;
  DeviceLimits limits = device_limits();
  if (!clusters) limits.clusters = nullptr;
  LstmPlan plan = plan_lstm(layer.in.B, layer.in.H, layer.dtype, tf32, direction, limits);
  if (plan.fits() && layer.in.T > INT32_MAX / plan.split.passes) {  // its flags count in 32 bits
    plan = none;
    plan.why_not = "T = " + std::to_string(layer.in.T) + " is too many time steps for one launch";
  }
  ULMFIT_CHECK(plan.fits() || wanted == "auto", layer.in.op, "ULMFIT_FAST_RECURRENCE=persistent, but ",
               plan.why_not);
  return plan;
}

// What the device offers and the plan takes of it, for those who measure.
inline std::string lstm_plan(const Tensor& x, int64_t hidden, bool high, bool backward) {
  check_dim("lstm_plan", "x", x, 3);
  ULMFIT_CHECK(hidden > 0, "lstm_plan", "hidden must be 1 or more, got ", hidden);
  const Device device(x);
  const DeviceLimits limits = device_limits();
  const LstmPlan plan = plan_lstm(x.size(1), hidden, dtype_of("lstm_plan", "x", x), high,
                                  backward ? Direction::backward : Direction::forward, limits);
  std::ostringstream text;
  text << std::fixed << std::setprecision(1) << limits.multiprocessors << " multiprocessors with "
       << limits.shared_memory / 1024 << " KB, compute capability " << limits.capability / 10.0
       << ", kernels for " << limits.compiled / 10.0 << "; ";
  if (!plan.fits()) return text.str() + plan.why_not;
  LstmSplit split = plan.split;
  text << split.parts << " x " << split.ctas << " thread blocks of " << split.shared_memory() / 1024
       << " KB, each with " << split.columns() << " columns and " << split.passes << " x "
       << split.block_rows() << " rows";
  if (backward) {
    text << ", sums in " << (split.clusters ? "clusters" : "L2");
    split.clusters = true;
    text << "; " << (limits.clusters ? limits.clusters(split) : 0) << " clusters of such blocks run at once";
  }
  return text.str();
}

// w keeps its tensor alive; flags are zeros in every launch, and in every replay of a graph.
struct PersistentBuffers {
  Tensor w, exchange, flags;
  LstmSteps steps;

  PersistentBuffers(const Layer& layer, const LstmSplit& split, const Tensor& w) : w(w) {
    const int64_t elements[] = {split.exchange_elements()},
                  words[] = {split.flags() * int64_t{sizeof(Flag) / 4}};
    exchange = torch::stable::new_zeros(layer.in.x, elements);
    flags = torch::stable::new_zeros(layer.in.x, words, ScalarType::Int);
    const LstmInputs& in = layer.in;
    steps = {split,
             in.T,
             padded_units(in.H),
             layer.reverse,
             in.lengths.has_value() ? ids_of(*in.lengths) : nullptr,
             in.matrix("w_hh", w),
             layer.dropout,
             reinterpret_cast<Flag*>(flags.data_ptr())};
  }
};

// These two say whether they have launched; where not, another plan is due or the general recurrence.
inline bool persistent_forward(const Layer& layer, const LstmPlan& plan, const Tensor& projected,
                               const Tensor& bias, const Tensor& first_cell, bool save,
                               const LstmOutputs& out) {
  const PersistentBuffers buffers(layer, plan.split, layer.dropped_w_hh());
  LstmPersistentForward a;
  a.steps = buffers.steps;
  a.projected = layer.in.sequence("x", projected);
  a.bias = bias.defined() ? static_cast<const float*>(data_of(bias)) : nullptr;
  a.h0 = layer.in.matrix("h0", layer.in.h0);
  a.c0 = static_cast<const float*>(data_of(first_cell));
  a.y = layer.in.sequence("y", out.y);
  if (layer.dropout.p > 0) a.dropped = layer.in.sequence("dropped", out.dropped);
  a.gates = save ? data_of(out.gates) : nullptr;
  a.cells = save ? static_cast<float*>(data_of(out.cells)) : nullptr;
  a.h_n = data_of(out.h_n);
  a.c_n = data_of(out.c_n);
  a.exchange = data_of(buffers.exchange);
  return launched(layer, plan, [&] { lstm_persistent(a, layer.device.stream); });
}

inline bool persistent_backward(const Layer& layer, const LstmPlan& plan, const Sequence& dy,
                                const Sequence& ddropped, const Tensor& dh_n, const Tensor& dc_n,
                                const Tensor& first_cell, const Tensor& w, const Tensor& gates,
                                const Tensor& cells, const Tensor& dgates, const LstmGradients& out) {
  const PersistentBuffers buffers(layer, plan.split, w);
  const Tensor sums = empty_like(layer.in.x, {plan.split.sums_elements()}, layer.sums);
  LstmPersistentBackward a;
  a.steps = buffers.steps;
  a.dy = dy;
  a.ddropped = ddropped;
  a.dh_n = static_cast<const float*>(data_of(dh_n));
  a.dc_n = static_cast<const float*>(data_of(dc_n));
  a.c0 = static_cast<const float*>(data_of(first_cell));
  a.gates = data_of(gates);
  a.cells = static_cast<const float*>(data_of(cells));
  a.dgates = layer.in.sequence("dgates", dgates);
  a.dh0 = data_of(out.dh0);
  a.dc0 = data_of(out.dc0);
  a.exchange = data_of(buffers.exchange);
  a.sums = static_cast<float*>(data_of(sums));
  return launched(layer, plan, [&] { lstm_persistent_backward(a, layer.device.stream); });
}

}  // namespace ulmfit_fast::cuda
