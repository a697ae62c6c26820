// ulmfit_fast._kernels: the torch-free CPU kernels on numpy arrays, for kernel tests and micro-benchmarks.
//
// Every function takes the instruction set by name and runs on the calling thread. numpy's float64, float32
// and float16 are themselves; bf16, which numpy lacks, is a uint16 array of its bits. Arrays must be
// C-contiguous; shapes are checked here, because a kernel trusts its caller. Shapes and meanings:
// csrc/kernels/cpu/kernels.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace py = pybind11;
using namespace ulmfit_fast;

namespace {

using Shape = std::vector<py::ssize_t>;
using Lengths = std::optional<py::array_t<int64_t, py::array::c_style>>;

const Kernels& table(const std::string& isa) {
  const Kernels* kernels = kernels_for(isa.c_str());
  if (kernels == nullptr)
    throw py::value_error("isa is '" + isa + "', but this machine can run: " + available_isas());
  return *kernels;
}

DType dtype_of(const py::array& a, const char* name) {
  const char kind = a.dtype().kind();
  const auto size = a.itemsize();
  if (kind == 'f' && size == 8) return DType::f64;
  if (kind == 'f' && size == 4) return DType::f32;
  if (kind == 'f' && size == 2) return DType::f16;
  if (kind == 'u' && size == 2) return DType::bf16;
  throw py::type_error(std::string(name) + " must be float64, float32, float16 or uint16 (the bits of bf16)");
}

// Of weights, beside activations of dtype x.
DType weight_dtype_of(const py::array& a, const char* name, DType x) {
  const DType w = dtype_of(a, name);
  if (w != x && !(w == DType::f32 && size_of(x) == 2))
    throw py::type_error(std::string(name) +
                         " must have the activations' dtype, or float32 where they have 16 bits");
  return w;
}

double probability(double p, const char* name) {
  if (!(p >= 0 && p < 1))
    throw py::value_error(std::string(name) + " must be in [0, 1), got " + std::to_string(p));
  return p;
}

std::string to_string(const Shape& shape) {
  std::string text = "(";
  for (auto n : shape) text += std::to_string(n) + ", ";
  return text + ")";
}

// The array's data, after a look at its shape, dtype and layout.
void* data(const py::array& a, const char* name, const Shape& shape, DType dtype) {
  const Shape got(a.shape(), a.shape() + a.ndim());
  if (got != shape)
    throw py::value_error(std::string(name) + " has shape " + to_string(got) + ", not " + to_string(shape));
  if (dtype_of(a, name) != dtype)
    throw py::type_error(std::string(name) + " has another dtype than it must have");
  if (!(a.flags() & py::array::c_style)) throw py::value_error(std::string(name) + " must be C-contiguous");
  return const_cast<void*>(a.data());
}
void* data(const std::optional<py::array>& a, const char* name, const Shape& shape, DType dtype) {
  return a ? data(*a, name, shape, dtype) : nullptr;
}

const int64_t* lengths_data(const Lengths& lengths, int64_t T, int64_t B) {
  if (!lengths) return nullptr;
  if (lengths->ndim() != 1 || lengths->shape(0) != B) throw py::value_error("lengths must have shape (B,)");
  for (int64_t b = 0; b < B; ++b)
    if (lengths->at(b) < 0 || lengths->at(b) > T) throw py::value_error("lengths must be within 0..T");
  return lengths->data();
}

py::array zeros(const py::dtype& dtype, const Shape& shape) {
  py::array a(dtype, shape);
  std::memset(a.mutable_data(), 0, a.nbytes());
  return a;
}
py::dtype state_dtype(DType storage) {  // cell state and losses: fp32 for the 16-bit types
  return storage == DType::f64 ? py::dtype::of<double>() : py::dtype::of<float>();
}
Sequence sequence(void* data, DType dtype, int64_t B, int64_t width) {  // (T, B, width), contiguous
  return {data, dtype, B * width, width};
}

py::array dropout_mask(const std::string& isa, uint64_t seed, double p, int64_t n, const py::dtype& dtype) {
  py::array mask = zeros(dtype, {n});
  table(isa).dropout_mask(seed, probability(p, "p"), n, dtype_of(mask, "dtype"), mask.mutable_data(),
                          Parallel{});
  return mask;
}

struct LstmArrays {
  py::array x, h0, c0, w_ih, w_hh;
  std::optional<py::array> b_ih, b_hh;
  Lengths lengths;
};

LstmShape lstm_shape(const LstmArrays& a, uint64_t seed, double weight_p, bool reverse) {
  if (a.x.ndim() != 3 || a.x.shape(2) == 0 || a.h0.ndim() != 2 || a.h0.shape(1) == 0)
    throw py::value_error("x must be (T, B, I) and h0 (B, H), with I and H > 0");
  const int64_t T = a.x.shape(0), B = a.x.shape(1), I = a.x.shape(2), H = a.h0.shape(1);
  return {.T = T,
          .B = B,
          .I = I,
          .H = H,
          .reverse = reverse,
          .lengths = lengths_data(a.lengths, T, B),
          .seed = seed,
          .weight_p = probability(weight_p, "weight_p")};
}

// -> y, h_n, c_n, gates, cells
py::tuple lstm(const std::string& isa, const py::array& x, const py::array& h0, const py::array& c0,
               const py::array& w_ih, const py::array& w_hh, const std::optional<py::array>& b_ih,
               const std::optional<py::array>& b_hh, const Lengths& lengths, uint64_t seed, double weight_p,
               bool reverse) {
  const LstmShape s = lstm_shape({x, h0, c0, w_ih, w_hh, b_ih, b_hh, lengths}, seed, weight_p, reverse);
  const DType t = dtype_of(x, "x"), w = weight_dtype_of(w_ih, "w_ih", t);
  py::array y = zeros(x.dtype(), {s.T, s.B, s.H}), h_n = zeros(x.dtype(), {s.B, s.H}),
            c_n = zeros(x.dtype(), {s.B, s.H});
  py::array gates = zeros(x.dtype(), {s.T, s.B, 4 * padded_units(s.H)}),
            cells = zeros(state_dtype(t), {s.T, s.B, padded_units(s.H)});
  LstmForward f{};
  f.shape = s;
  f.x = sequence(data(x, "x", {s.T, s.B, s.I}, t), t, s.B, s.I);
  f.h0 = {data(h0, "h0", {s.B, s.H}, t), t, s.H};
  f.c0 = {data(c0, "c0", {s.B, s.H}, t), t, s.H};
  f.w_ih = {data(w_ih, "w_ih", {4 * s.H, s.I}, w), w, s.I};
  f.w_hh = {data(w_hh, "w_hh", {4 * s.H, s.H}, w), w, s.H};
  f.b_ih = data(b_ih, "b_ih", {4 * s.H}, w);
  f.b_hh = data(b_hh, "b_hh", {4 * s.H}, w);
  f.y = sequence(y.mutable_data(), t, s.B, s.H);
  f.h_n = h_n.mutable_data();
  f.c_n = c_n.mutable_data();
  f.gates = gates.mutable_data();
  f.cells = cells.mutable_data();
  {
    py::gil_scoped_release release;
    table(isa).lstm(f, Parallel{});
  }
  return py::make_tuple(y, h_n, c_n, gates, cells);
}

// -> dx, dh0, dc0, dw_ih, dw_hh, db
py::tuple lstm_backward(const std::string& isa, const py::array& dy, const py::array& x, const py::array& h0,
                        const py::array& c0, const py::array& w_ih, const py::array& w_hh, const py::array& y,
                        const py::array& gates, const py::array& cells, const Lengths& lengths, uint64_t seed,
                        double weight_p, bool reverse) {
  const LstmShape s = lstm_shape({x, h0, c0, w_ih, w_hh, {}, {}, lengths}, seed, weight_p, reverse);
  const DType t = dtype_of(x, "x"), w = weight_dtype_of(w_ih, "w_ih", t),
              state = t == DType::f64 ? DType::f64 : DType::f32;
  py::array dx = zeros(x.dtype(), {s.T, s.B, s.I}), dh0 = zeros(x.dtype(), {s.B, s.H}),
            dc0 = zeros(x.dtype(), {s.B, s.H});
  py::array dw_ih = zeros(w_ih.dtype(), {4 * s.H, s.I}), dw_hh = zeros(w_ih.dtype(), {4 * s.H, s.H});
  py::array db = zeros(w_ih.dtype(), {4 * s.H});
  LstmBackward b{};
  b.shape = s;
  b.dy = sequence(data(dy, "dy", {s.T, s.B, s.H}, t), t, s.B, s.H);
  b.dh_n = {nullptr, t, s.H};
  b.dc_n = {nullptr, t, s.H};
  b.x = sequence(data(x, "x", {s.T, s.B, s.I}, t), t, s.B, s.I);
  b.y = sequence(data(y, "y", {s.T, s.B, s.H}, t), t, s.B, s.H);
  b.h0 = {data(h0, "h0", {s.B, s.H}, t), t, s.H};
  b.c0 = {data(c0, "c0", {s.B, s.H}, t), t, s.H};
  b.w_ih = {data(w_ih, "w_ih", {4 * s.H, s.I}, w), w, s.I};
  b.w_hh = {data(w_hh, "w_hh", {4 * s.H, s.H}, w), w, s.H};
  b.gates = data(gates, "gates", {s.T, s.B, 4 * padded_units(s.H)}, t);
  b.cells = data(cells, "cells", {s.T, s.B, padded_units(s.H)}, state);
  b.dx = sequence(dx.mutable_data(), t, s.B, s.I);
  b.dh0 = dh0.mutable_data();
  b.dc0 = dc0.mutable_data();
  b.dw_ih = dw_ih.mutable_data();
  b.dw_hh = dw_hh.mutable_data();
  b.db = db.mutable_data();
  {
    py::gil_scoped_release release;
    table(isa).lstm_backward(b, Parallel{});
  }
  return py::make_tuple(dx, dh0, dc0, dw_ih, dw_hh, db);
}

// -> loss (N), dh (N, E), dweight (V, E), dbias (V) for a gradient of 1 for every row
py::tuple linear_cross_entropy(const std::string& isa, const py::array& h, const py::array& weight,
                               const py::array& bias, const py::array_t<int64_t, py::array::c_style>& target,
                               double label_smoothing, int64_t ignore_index) {
  if (h.ndim() != 2 || weight.ndim() != 2) throw py::value_error("h must be (N, E) and weight (V, E)");
  const int64_t N = h.shape(0), E = h.shape(1), V = weight.shape(0);
  const DType t = dtype_of(h, "h"), w = weight_dtype_of(weight, "weight", t);
  if (target.ndim() != 1 || target.shape(0) != N) throw py::value_error("target must have shape (N,)");
  for (int64_t n = 0; n < N; ++n)
    if ((target.at(n) < 0 || target.at(n) >= V) && target.at(n) != ignore_index)
      throw py::value_error("target must be within 0..V-1, or ignore_index");
  py::array loss = zeros(state_dtype(t), {N}), dh = zeros(h.dtype(), {N, E});
  py::array dweight = zeros(weight.dtype(), {V, E}), dbias = zeros(weight.dtype(), {V}),
            ones = zeros(state_dtype(t), {N});
  for (int64_t n = 0; n < N; ++n) {
    if (t == DType::f64)
      static_cast<double*>(ones.mutable_data())[n] = 1;
    else
      static_cast<float*>(ones.mutable_data())[n] = 1;
  }
  LinearCrossEntropy c{};
  c.N = N, c.E = E, c.V = V;
  c.h = {data(h, "h", {N, E}, t), t, E};
  c.weight = {data(weight, "weight", {V, E}, w), w, E};
  c.bias = data(bias, "bias", {V}, w);
  c.target = target.data();
  c.ignore_index = ignore_index;
  c.label_smoothing = label_smoothing;
  c.gradient = c.weight_gradient = true;
  c.row_gradient = ones.data();
  c.loss = loss.mutable_data();
  c.dh = dh.mutable_data();
  c.results = dweight.mutable_data();
  c.new_dweight = [](void* memory) { return memory; };
  c.dbias = dbias.mutable_data();
  {
    py::gil_scoped_release release;
    table(isa).linear_cross_entropy(c, Parallel{});
  }
  return py::make_tuple(loss, dh, dweight, dbias);
}

double multiply_in_cache(const std::string& isa, const py::dtype& dtype, bool high, int64_t repeats) {
  const DType t = dtype_of(zeros(dtype, {0}), "dtype");
  py::gil_scoped_release release;
  return table(isa).multiply_in_cache(t, high, repeats);
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "The torch-free CPU kernels on numpy arrays, one thread, instruction set by name.";
  m.def("isas", &available_isas, "Comma-separated names of what this machine can run, newest first.");
  m.def("dropout_mask", &dropout_mask, py::arg("isa"), py::arg("seed"), py::arg("p"), py::arg("n"),
        py::arg("dtype") = py::dtype::of<float>());
  m.def("lstm", &lstm, py::arg("isa"), py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("w_ih"),
        py::arg("w_hh"), py::arg("b_ih") = py::none(), py::arg("b_hh") = py::none(),
        py::arg("lengths") = py::none(), py::arg("seed") = 0, py::arg("weight_p") = 0.0,
        py::arg("reverse") = false, "-> y, h_n, c_n, gates, cells");
  m.def("lstm_backward", &lstm_backward, py::arg("isa"), py::arg("dy"), py::arg("x"), py::arg("h0"),
        py::arg("c0"), py::arg("w_ih"), py::arg("w_hh"), py::arg("y"), py::arg("gates"), py::arg("cells"),
        py::arg("lengths") = py::none(), py::arg("seed") = 0, py::arg("weight_p") = 0.0,
        py::arg("reverse") = false, "-> dx, dh0, dc0, dw_ih, dw_hh, db");
  m.def("linear_cross_entropy", &linear_cross_entropy, py::arg("isa"), py::arg("h"), py::arg("weight"),
        py::arg("bias"), py::arg("target"), py::arg("label_smoothing") = 0.0, py::arg("ignore_index") = -100,
        "-> loss, dh, dweight, dbias for a gradient of 1 for every row");
  m.def("multiply_in_cache", &multiply_in_cache, py::arg("isa"), py::arg("dtype"), py::arg("high"),
        py::arg("repeats"), "Products of blocks that stay in L2, in one thread -> their operations");
}
