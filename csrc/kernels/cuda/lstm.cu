// What the LSTM does between its products: gates and state of one step, forward and backward, and the
// sequence of states before each step.
#include "cell.h"

namespace ulmfit_fast::cuda {
namespace {

// Whether step t of sequence b counts; `step.first` is the launch that looks at the lengths.
__device__ bool active(const LstmStep& step, int64_t b) {
  if (step.lengths == nullptr) return true;
  const int64_t length = step.lengths[b];
  if (step.first) check_length(length, step.T);
  return step.t < length;
}

template <class S>
__global__ void lstm_step_kernel(LstmStepForward a) {
  using T = Compute<S>;
  const int64_t H = a.step.H, units = a.step.units, b = blockIdx.x, unit = matrix_column();
  if (unit >= units) return;
  const T c_prev = unit < H ? static_cast<const T*>(a.c_prev)[b * a.c_prev_stride + unit] : T(0);
  LstmCell<T> state = {};
  state.c = c_prev;
  S h = narrow<S>(T(0));
  if (unit < H && active(a.step, b)) {
    const T* projected = at<const T>(a.projected, a.step.t, b) + unit;
    const T* recurrent = static_cast<const T*>(a.recurrent) + b * 4 * H + unit;
    T pre[4];
    for (int g = 0; g < 4; ++g) {
      pre[g] = projected[g * H] + recurrent[g * H];
      if (a.bias != nullptr) pre[g] += static_cast<const T*>(a.bias)[g * H + unit];
    }
    state = lstm_cell_forward(pre[0], pre[1], pre[2], pre[3], c_prev);
    h = narrow<S>(state.h);
    static_cast<S*>(a.h)[b * H + unit] = h;
  }
  if (unit < H) at<S>(a.y, a.step.t, b)[unit] = h;
  static_cast<T*>(a.c)[b * units + unit] = state.c;
  if (a.gates == nullptr) return;
  S* gates = static_cast<S*>(a.gates) + b * 4 * units + unit;
  gates[0] = narrow<S>(state.i);
  gates[units] = narrow<S>(state.f);
  gates[2 * units] = narrow<S>(state.g);
  gates[3 * units] = narrow<S>(state.o);
}

template <class S>
__global__ void lstm_step_backward_kernel(LstmStepBackward a) {
  using T = Compute<S>;
  const int64_t H = a.step.H, units = a.step.units, b = blockIdx.x, unit = matrix_column();
  const int64_t item = b * H + unit;
  if (unit >= H) return;
  T* dh_kept = static_cast<T*>(a.dh) + item;
  T dh = *dh_kept;
  if (a.recurrent != nullptr) dh += static_cast<const T*>(a.recurrent)[item];
  LstmCellGrad<T> d = {};
  if (active(a.step, b)) {
    if (a.dy.data != nullptr) dh += widen(at<const S>(a.dy, a.step.t, b)[unit]);
    const S* gates = static_cast<const S*>(a.gates) + b * 4 * units + unit;
    T* dc = static_cast<T*>(a.dc) + item;
    d = lstm_cell_backward<T>(widen(gates[0]), widen(gates[units]), widen(gates[2 * units]),
                              widen(gates[3 * units]),
                              static_cast<const T*>(a.c_prev)[b * a.c_prev_stride + unit],
                              static_cast<const T*>(a.c)[b * units + unit], dh, *dc);
    *dc = d.c_prev;
    dh = 0;
  }
  *dh_kept = dh;
  S* out = at<S>(a.dgates, a.step.t, b) + unit;
  S* next = static_cast<S*>(a.dgates_step) + b * 4 * H + unit;
  out[0] = next[0] = narrow<S>(d.a_i);
  out[H] = next[H] = narrow<S>(d.a_f);
  out[2 * H] = next[2 * H] = narrow<S>(d.a_g);
  out[3 * H] = next[3 * H] = narrow<S>(d.a_o);
}

template <class S>
__global__ void states_before_kernel(StatesBefore a) {
  const int64_t unit = matrix_column(), b = blockIdx.x % a.B, t = blockIdx.x / a.B;
  if (unit >= a.H) return;
  const int64_t length = a.lengths == nullptr ? a.T : a.lengths[b];
  S value = narrow<S>(0);
  if (t < length) {
    if (a.h0.data == nullptr) {
      value = at<const S>(a.in, t, b)[unit];
    } else if (t == (a.reverse ? length - 1 : 0)) {
      value = static_cast<const S*>(a.h0.data)[b * a.h0.stride + unit];
    } else {
      value = at<const S>(a.in, a.reverse ? t + 1 : t - 1, b)[unit];
    }
  }
  at<S>(a.out, t, b)[unit] = value;
}

template <class In, class Out>
__global__ void add_kernel(const In* a, const In* b, int64_t n, Out* out) {
  const int64_t i = item_index();
  if (i >= n) return;
  out[i] = narrow<Out>(widen(a[i]) + (b == nullptr ? 0 : widen(b[i])));
}

}  // namespace

void lstm_step(const LstmStepForward& a, void* stream) {
  with_type(a.step.dtype, [&](auto type) {
    launch_matrix(a.step.B, a.step.units, "lstm", lstm_step_kernel<decltype(type)>, stream, a);
  });
}

void lstm_step_backward(const LstmStepBackward& a, void* stream) {
  with_type(a.step.dtype, [&](auto type) {
    launch_matrix(a.step.B, a.step.H, "lstm_backward", lstm_step_backward_kernel<decltype(type)>, stream, a);
  });
}

void states_before(const StatesBefore& a, void* stream) {
  with_type(a.in.dtype, [&](auto type) {
    launch_matrix(a.T * a.B, a.H, "lstm_backward", states_before_kernel<decltype(type)>, stream, a);
  });
}

void add(const char* op, const void* a, const void* b, DType in_type, DType out_type, int64_t n, void* out,
         void* stream) {
  with_types(in_type, out_type, [&](auto from, auto to) {
    using In = decltype(from);
    using Out = decltype(to);
    launch_over(n, op, add_kernel<In, Out>, stream, static_cast<const In*>(a), static_cast<const In*>(b), n,
                static_cast<Out*>(out));
  });
}

}  // namespace ulmfit_fast::cuda
