// Op schemas and the Python module's init. The kernels register themselves in csrc/<device>/<op>.cpp; fake
// kernels and autograd formulas are in ulmfit_fast/ops/<op>.py, where each op's arguments are explained.
#ifndef ULMFIT_FAST_NO_PYTHON  // CMake builds the ops for libtorch, which has no Python
#include <Python.h>
#endif
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ulmfit_fast, m) {
  m.def("dropout_mask(Tensor seed, SymInt[] shape, float p, ScalarType? dtype=None) -> Tensor");

  m.def("variational_dropout(Tensor x, Tensor seed, float p, bool batch_first) -> Tensor");
  m.def("variational_dropout_backward(Tensor dy, Tensor seed, float p, bool batch_first) -> Tensor");

  m.def("embedding_dropout(Tensor weight, Tensor ids, Tensor seed, float p, int padding_idx) -> Tensor");
  m.def(
      "embedding_dropout_backward(Tensor dy, Tensor ids, Tensor seed, float p, int padding_idx, "
      "SymInt num_embeddings) -> Tensor");

  m.def("concat_pool(Tensor out, Tensor lengths) -> (Tensor pooled, Tensor argmax)");
  m.def("concat_pool_backward(Tensor dpooled, Tensor lengths, Tensor argmax, SymInt time) -> Tensor");

  m.def(
      "lstm(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? lengths, Tensor seed, Tensor dropout_seed, float weight_p, float dropout_p, bool batch_first, "
      "bool reverse, bool high, bool save) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor dropped, Tensor gates, Tensor cells)");
  m.def(
      "lstm_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? ddropped, "
      "Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? lengths, Tensor seed, "
      "Tensor dropout_seed, Tensor y, Tensor gates, Tensor cells, float weight_p, float dropout_p, "
      "bool batch_first, bool reverse, bool high, bool need_dx, bool need_dw) "
      "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db)");

  m.def(
      "linear_cross_entropy(Tensor h, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
      "float label_smoothing, int reduction, bool high, bool grad, bool need_dw, int chunk_rows) "
      "-> (Tensor loss, Tensor dh, Tensor dweight, Tensor dbias)");
  m.def(
      "linear_cross_entropy_backward(Tensor dloss, Tensor h, Tensor weight, Tensor? bias, Tensor target, "
      "int ignore_index, float label_smoothing, bool high, bool need_dw, int chunk_rows) "
      "-> (Tensor dh, Tensor dweight, Tensor dbias)");

  m.def("logits(Tensor h, Tensor weight, Tensor? bias, bool high) -> Tensor");  // CPU alone, no gradient

  // CUDA alone: how the persistent recurrence of x (T, B, I) would be split over this device, in words
  m.def("lstm_plan(Tensor x, int hidden, bool high, bool backward) -> str");

  m.def("cpu_isa() -> str");               // the instruction set in use
  m.def("cpu_isas() -> str");              // those this machine can run, newest first, comma-separated
  m.def("release_workspace() -> int");     // scratch memory kept for the next call: bytes given back
  m.def("lent_like(Tensor t) -> Tensor");  // unwritten, like t, in memory that the CPU's workspace lends
}

#ifndef ULMFIT_FAST_NO_PYTHON
// `from ulmfit_fast import _C` loads this library, which registers the ops; the module itself is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
