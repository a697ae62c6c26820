// The maths of one LSTM cell, forward and backward: the only copy, for every ISA and for CUDA.
//
// V is a scalar or a SIMD vector; sigmoid_(V) and tanh_(V) must be declared before this header is included.
// Gates are in torch's order i, f, g, o (torch.nn.LSTM's documentation has the formulas).
#pragma once
#include "isa_namespace.h"

ULMFIT_BEGIN

template <class V>
struct LstmCell {
  V i, f, g, o;  // activated gates
  V c;           // new cell state
  V h;           // new hidden state
};

// a_*: pre-activations (input projection + recurrent projection + biases); c_prev: previous cell state.
template <class V>
ULMFIT_HD LstmCell<V> lstm_cell_forward(V a_i, V a_f, V a_g, V a_o, V c_prev) {
  LstmCell<V> s;
  s.i = sigmoid_(a_i);
  s.f = sigmoid_(a_f);
  s.g = tanh_(a_g);
  s.o = sigmoid_(a_o);
  s.c = s.f * c_prev + s.i * s.g;
  s.h = s.o * tanh_(s.c);
  return s;
}

template <class V>
struct LstmCellGrad {
  V a_i, a_f, a_g, a_o;  // gradients of the pre-activations
  V c_prev;              // gradient of the previous cell state
};

// i, f, g, o: activated gates; c: new cell state; dh: gradient of h; dc: gradient of c from the step after.
template <class V>
ULMFIT_HD LstmCellGrad<V> lstm_cell_backward(V i, V f, V g, V o, V c_prev, V c, V dh, V dc) {
  const V tanh_c = tanh_(c);
  dc = dc + dh * o * (1 - tanh_c * tanh_c);
  LstmCellGrad<V> d;
  d.a_i = dc * g * i * (1 - i);
  d.a_f = dc * c_prev * f * (1 - f);
  d.a_g = dc * i * (1 - g * g);
  d.a_o = dh * tanh_c * o * (1 - o);
  d.c_prev = dc * f;
  return d;
}

ULMFIT_END
