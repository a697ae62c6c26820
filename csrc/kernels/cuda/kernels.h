// The CUDA kernels' border: plain pointers into device memory, one launcher for each kernel.
//
// Nothing here knows torch, and no launcher waits: each puts its kernel on `stream` (a cudaStream_t) of the
// current device and returns; a launch that fails throws std::runtime_error. Callers allocate every result;
// shapes stand beside each pointer, rows are contiguous unless a stride is given. T = time steps, B = batch,
// I = inputs, H = hidden units, V = vocabulary. Products are the caller's: they go through torch's library.
#pragma once
#include <stdexcept>

#include "../views.h"
#include "lstm_plan.h"

namespace ulmfit_fast::cuda {

// The seed lies in device memory: nobody waits for it, and a graph's replay finds a new one there.
struct Mask {
  const int64_t* seed = nullptr;  // not read where p is 0
  double p = 0;
};

void dropout_mask(const Mask&, int64_t n, DType, void* out, void* stream);

struct VariationalDropout {
  int64_t T, B, F;   // one mask element per (b, f), index b * F + f, for all T
  Sequence in, out;  // (T, B, F)
  Mask mask;
};
void variational_dropout(const VariationalDropout&, void* stream);

struct EmbeddingDropout {
  int64_t n, V, E;     // n ids
  const int64_t* ids;  // (n), 0..V-1: an assertion of the kernel
  Mask mask;           // one element per vocabulary row
  DType dtype;
};
void embedding_dropout(const EmbeddingDropout&, const void* weight, void* out, void* stream);
// a.ids sorted, order (n): where each stood before, ascending among equal ids. dweight (V, E): zeros on
// entry.
void embedding_dropout_backward(const EmbeddingDropout& a, int64_t padding_idx, const int64_t* order,
                                const void* dy, void* dweight, void* stream);

struct ConcatPool {
  int64_t T, B, H;
  const int64_t* lengths;  // (B), 0..T: an assertion of the kernel
  Sequence in;             // (T, B, H); the gradient's own on the way back
};
void concat_pool(const ConcatPool&, void* pooled, int64_t* argmax, void* stream);
void concat_pool_backward(const ConcatPool&, const void* dpooled, const int64_t* argmax, void* stream);

// out (rows, columns) = in * mask, in out's dtype. May be in place where the dtypes are equal, or the mask
// may be none: then it is a cast. One of the dtypes is fp32, or both are the same. op: whose error it is.
void masked_copy(const char* op, const Matrix& in, int64_t rows, int64_t columns, const Mask&, DType out_type,
                 void* out, void* stream);
// out (rows, width) = [in | column | 0...]: in (rows, columns), column (rows) in in's dtype, nullptr: ones.
void append_column(const Matrix& in, int64_t rows, int64_t columns, const void* column, DType out_type,
                   void* out, int64_t width, void* stream);
// The way back: in (rows, width) -> out (rows, columns) and column (rows), both of out_type.
void split_column(const Matrix& in, int64_t rows, int64_t columns, DType out_type, void* out, void* column,
                  void* stream);

struct CrossEntropy {
  int64_t rows, V, stride;  // stride of the logits' rows, in elements
  DType dtype;
  void* logits;           // (rows, V); becomes its own gradient where row_gradient is given
  const int64_t* target;  // (rows), 0..V-1 or ignore_index: an assertion of the kernel
  int64_t ignore_index;
  double label_smoothing;
  const void* row_gradient;  // (rows) fp32 (fp64 for fp64), nullptr: none wanted
  void* loss;                // (rows) fp32 (fp64), 0 where ignored
};
void cross_entropy(const CrossEntropy&, void* stream);

// One step of the recurrence. Sums, states and what products give are fp32 (fp64 for fp64), "wide" below.
struct LstmStep {
  int64_t B, H, t;
  int64_t units;           // padded_units(H): the length of a row of cells, or of one of its gates
  DType dtype;             // x's
  const int64_t* lengths;  // (B); nullptr: every step counts
  bool first;              // this step checks the lengths, against T
  int64_t T;
};
struct LstmStepForward {
  LstmStep step;
  Sequence projected;     // (T, B, 4H) wide: x @ W_ih^T, gates i, f, g, o
  const void* recurrent;  // (B, 4H) wide: h @ W_hh^T
  const void* bias;       // (4H) wide, or nullptr
  const void* c_prev;     // (B, H) wide, rows c_prev_stride apart: the first state lies closer
  int64_t c_prev_stride;
  void* c;      // (B, units) wide, may be c_prev itself; zeros past H
  void* h;      // (B, H) dtype: state, stays where a step is padding
  Sequence y;   // (T, B, H) dtype
  void* gates;  // (B, 4, units) dtype, activated, zeros past H; or nullptr
};
void lstm_step(const LstmStepForward&, void* stream);

struct LstmStepBackward {
  LstmStep step;
  Sequence dy;            // (T, B, H) dtype; data may be nullptr
  const void* recurrent;  // (B, H) wide: dgates of the step after @ W_hh; nullptr at the last step
  void *dh, *dc;          // (B, H) wide: dh is what bypasses the product: dh_n, and the carry through padding
  const void* gates;      // (B, 4, units) dtype
  const void *c_prev, *c;  // (B, H) and (B, units) wide
  int64_t c_prev_stride;
  Sequence dgates;    // (T, B, 4H) dtype
  void* dgates_step;  // (B, 4H) dtype: the same once more, as the next product wants it
};
void lstm_step_backward(const LstmStepBackward&, void* stream);

// Counts what a thread block of a persistent launch has finished.
#ifndef ULMFIT_FLAG_BYTES
#define ULMFIT_FLAG_BYTES 4  // from flag to flag; benchmarks/lstm_parts.py times others
#endif
struct alignas(ULMFIT_FLAG_BYTES) Flag {
  unsigned count = 0;
};

// All steps of the recurrence in one launch, split as the plan says (lstm_plan.h). float32 is multiplied as
// TF32.
struct LstmSteps {
  LstmSplit split;  // B, H and the dtype are in it
  int64_t T;
  int64_t units;  // padded_units(H)
  bool reverse;
  const int64_t* lengths;  // (B); nullptr: every step counts
  Matrix w;                // W_hh (4H, H) dtype, dropped
  Mask dropout;            // of y: one element per (b, unit), index b * H + unit, for all T
  Flag* flags;             // split.flags(), zeros on entry
};
struct LaunchTooLarge : std::runtime_error {
  LaunchTooLarge() : std::runtime_error("this context may use fewer multiprocessors than the device says") {}
};
struct LstmPersistentForward {
  LstmSteps steps;
  Sequence projected;  // (T, B, 4H) fp32: x @ W_ih^T, gates i, f, g, o
  const float* bias;   // (4H), or nullptr
  Matrix h0;           // (B, H) dtype
  const float* c0;     // (B, H)
  Sequence y;          // (T, B, H) dtype
  Sequence dropped;    // (T, B, H) dtype: y after its dropout; data may be nullptr: not wanted
  void* gates;         // (T, B, 4, units) dtype, activated, zeros past H; or nullptr
  float* cells;        // (T, B, units), zeros past H; nullptr where gates is
  void *h_n, *c_n;     // (B, H) dtype
  void* exchange;      // split.exchange_elements() dtype, zeros on entry: h by padded rows and units
};
// Both directions throw LaunchTooLarge, with nothing launched, where its CTAs cannot all run at once.
void lstm_persistent(const LstmPersistentForward&, void* stream);

struct LstmPersistentBackward {
  LstmSteps steps;
  Sequence dy, ddropped;          // (T, B, H) dtype; data may be nullptr
  const float *dh_n, *dc_n, *c0;  // (B, H)
  const void* gates;              // as forward left them
  const float* cells;
  Sequence dgates;  // (T, B, 4H) dtype
  void *dh0, *dc0;  // (B, H) dtype
  void* exchange;   // split.exchange_elements() dtype, zeros on entry: dgates by gate, row and unit
  float* sums;      // split.sums_elements(): what each CTA of a group adds to its units' dh, in no cluster
};
void lstm_persistent_backward(const LstmPersistentBackward&, void* stream);

// What the current device offers a persistent launch.
DeviceLimits device_limits();

// out[b] = in[t, b] of the step that comes before (t, b), or h0[b], zeros where (t, b) is padding: (T, B, H).
// With h0.data == nullptr the step itself: in without its padding, which may hold anything.
struct StatesBefore {
  int64_t T, B, H;
  bool reverse;
  const int64_t* lengths;
  Sequence in, out;
  Matrix h0;
};
void states_before(const StatesBefore&, void* stream);

// out (n) in out_type = a + b, both in in_type; b may be nullptr, out may be either where the dtypes are
// equal. op: whose error it is.
void add(const char* op, const void* a, const void* b, DType in_type, DType out_type, int64_t n, void* out,
         void* stream);

}  // namespace ulmfit_fast::cuda
