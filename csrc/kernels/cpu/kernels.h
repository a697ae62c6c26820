// The CPU kernels' border: plain pointers in, plain pointers
// out, one table of entry points per instruction set.
//
// Nothing here knows torch. Callers allocate every result; shapes stand beside each pointer, rows are
// contiguous unless a stride is given, and no result may alias an input. T = time steps, B = batch, I =
// inputs, H = hidden units, V = vocabulary. Kernels run their parallel loops on the caller's thread pool,
// handed in as `Parallel`.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../views.h"

namespace ulmfit_fast {

// Runs body(begin, end) over [0, n) on somebody's threads. Every kernel gives the same bits for every split.
struct Parallel {
  int threads = 1;
  void* pool = nullptr;
  void (*run)(void* pool, int64_t n, void (*body)(void*, int64_t, int64_t), void* arg) = nullptr;

  template <class F>
  void operator()(int64_t n, F&& f) const {
    if (n <= 0) return;
    if (run == nullptr || n == 1) return f(int64_t{0}, n);
    using Body = std::remove_reference_t<F>;
    run(pool, n, [](void* arg, int64_t b, int64_t e) { (*static_cast<Body*>(arg))(b, e); }, &f);
  }
};

struct LstmShape {
  int64_t T, B, I, H;
  bool reverse;  // from each sequence's last valid step back to its first
  // (B), 0..T; nullptr: all T. A step at or past it carries the state and gives zeros out.
  const int64_t* lengths = nullptr;
  uint64_t seed = 0;  // of the DropConnect mask of w_hh, element index row * H + column
  double weight_p = 0;
  bool high = false;          // fp32: products of torch's "high" precision will do, where they are faster
  uint64_t dropout_seed = 0;  // of the variational dropout of y, element index b * H + unit for all steps
  double dropout_p = 0;
};

struct LstmForward {
  LstmShape shape;
  Sequence x;               // (T, B, I)
  Matrix h0, c0;            // (B, H), in x's dtype
  Matrix w_ih, w_hh;        // (4H, I), (4H, H): gates i, f, g, o
  const void *b_ih, *b_hh;  // (4H) in w_ih's dtype, or nullptr
  Sequence y;               // (T, B, H), x's dtype
  Sequence dropped;         // (T, B, H), y after its dropout; data may be nullptr: not wanted
  void *h_n, *c_n;          // (B, H), x's dtype
  // What backward needs of the forward pass; nullptr: nothing is saved. The order follows the vector length,
  // so only the instruction set that saved them can read them.
  void* gates;  // T * B * 4 * padded_units(H) activated gates in x's dtype
  void* cells;  // T * B * padded_units(H) cell states after each step, fp64 for fp64 and else fp32
};

struct LstmBackward {
  LstmShape shape;
  Sequence dy, ddropped;  // (T, B, H); data may be nullptr: zeros. So may dh_n's and dc_n's
  Matrix dh_n, dc_n;      // (B, H)
  Sequence x, y;          // as in forward
  Matrix h0, c0, w_ih, w_hh;
  const void *gates, *cells;
  Sequence dx;               // (T, B, I), data nullptr: not wanted
  void *dh0, *dc0;           // (B, H), x's dtype
  void *dw_ih, *dw_hh, *db;  // (4H, I), (4H, H), (4H) in w_ih's dtype, or nullptr: not wanted
};

struct LinearCrossEntropy {
  int64_t N, E, V;
  Matrix h;               // (N, E)
  Matrix weight;          // (V, E)
  const void* bias;       // (V) in weight's dtype, or nullptr
  const int64_t* target;  // (N), 0..V-1 or ignore_index
  int64_t ignore_index;
  double label_smoothing;
  bool high = false;             // as LstmShape's
  bool gradient = false;         // wanted: an empty batch has one too, zeros
  bool weight_gradient = false;  // dweight and dbias are wanted too
  const void* row_gradient;      // (N) upstream gradient of each row's loss, fp32 (fp64 for fp64)
  void* loss;                    // (N) fp32 (fp64): each row's loss, 0 where ignored
  void *dh, *dbias;              // (N, E) in h's dtype, (V) in weight's or nullptr
  // Returns where dweight goes, (V, E) in weight's dtype. Asked last, once the packed weights and logits are
  // given back: it may lie in their memory.
  void* (*new_dweight)(void* results);
  void* results;
};

struct Logits {
  int64_t N, E, V;
  Matrix h;           // (N, E)
  Matrix weight;      // (V, E)
  const void* bias;   // (V) in weight's dtype, or nullptr
  bool high = false;  // as LstmShape's
  DType out_type;     // h's, or what its products are summed in
  void* out;          // (N, V)
};

struct EmbeddingDropout {
  int64_t n, V, E;      // n ids
  const int64_t* ids;   // (n), 0..V-1, checked by the caller
  int64_t padding_idx;  // its row gets no gradient; -1: none
  uint64_t seed;        // the mask has one element per vocabulary row
  double p;
  DType dtype;
};

struct VariationalDropout {
  int64_t T, B, F;   // one mask element per (b, f), index b * F + f, for all T
  Sequence in, out;  // (T, B, F)
  uint64_t seed;
  double p;
};

struct ConcatPool {
  int64_t T, B, H;
  const int64_t* lengths;  // (B), 0..T; nullptr: all T
  Sequence in;             // (T, B, H); the gradient's own on the way back
};

struct Kernels {
  const char* isa;
  void (*dropout_mask)(uint64_t seed, double p, int64_t n, DType, void* out, const Parallel&);
  void (*variational_dropout)(const VariationalDropout&, const Parallel&);
  void (*embedding_dropout)(const EmbeddingDropout&, const void* weight, void* out, const Parallel&);
  void (*embedding_dropout_backward)(const EmbeddingDropout&, const void* dy, void* dweight, const Parallel&);
  void (*concat_pool)(const ConcatPool&, void* pooled, int64_t* argmax, const Parallel&);
  void (*concat_pool_backward)(const ConcatPool&, Matrix dpooled, const int64_t* argmax, const Parallel&);
  void (*lstm)(const LstmForward&, const Parallel&);
  void (*lstm_backward)(const LstmBackward&, const Parallel&);
  void (*linear_cross_entropy)(const LinearCrossEntropy&, const Parallel&);
  void (*logits)(const Logits&, const Parallel&);
  double (*multiply_in_cache)(DType, bool high, int64_t repeats);  // -> floating-point operations done
};

// The table in use: the best the machine has, or the one ULMFIT_FAST_ISA names (read once, at the first
// call). Throws std::runtime_error when that name is unknown or the machine cannot run it.
const Kernels& kernels();
// The table of one instruction set, nullptr where the machine cannot run it: for tests and benchmarks.
const Kernels* kernels_for(const char* isa);
// Comma-separated names of the instruction sets this machine can run, newest first.
const char* available_isas();

}  // namespace ulmfit_fast
