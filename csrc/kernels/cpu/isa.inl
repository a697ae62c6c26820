// Everything one instruction set needs: an ISA file defines ULMFIT_ISA and ULMFIT_LANES, opens its target
// region and includes this. ULMFIT_BF16 says that it has AVX-512's bf16 instructions, ULMFIT_AMX that it has
// AMX tiles besides.
#pragma once
#include "lstm_forward.inl"
#include "lstm_backward.inl"
#include "linear_cross_entropy.inl"
#include "logits.inl"
#include "concat_pool.inl"
#include "embedding_dropout.inl"
#include "variational_dropout.inl"
#include "roof.inl"
#if defined(ULMFIT_AMX)
#include "gemm_split.inl"
#elif defined(ULMFIT_BF16)
#include "gemm_dot.inl"
#endif

ULMFIT_BEGIN

#if defined(ULMFIT_AMX)
using Bf16Tile = AmxTile;
using HighTile = SplitTile;
#elif defined(ULMFIT_BF16)
using Bf16Tile = DotTile;
using HighTile = FmaTile<float>;
#else
using Bf16Tile = FmaTile<float>;  // 16-bit storage, fp32 arithmetic
using HighTile = FmaTile<float>;
#endif

// Calls kernel with the tile to compute with, which follows the activations' storage type.
template <class Kernel>
inline void with_tile(DType dtype, bool high, Kernel&& kernel) {
  if (dtype == DType::f64) return kernel(FmaTile<double>());
  if (dtype == DType::bf16) return kernel(Bf16Tile());
  if (dtype == DType::f32 && high) return kernel(HighTile());
  return kernel(FmaTile<float>());
}

// The same for the product with W_hh, beside the tile of the others. kVecs: of a sparse panel.
template <int kVecs, class Tile, class Kernel>
inline void with_recurrent_tile(Tile tile, const LstmShape& shape, Kernel&& kernel) {
  if constexpr (std::is_same_v<Tile, FmaTile<float>>) {
    if (SparseTile<kVecs>::pays(shape)) return kernel(SparseTile<kVecs>());
  }
  kernel(tile);
}

inline void run_lstm(const LstmForward& args, const Parallel& parallel) {
  const bool few = args.shape.T * args.shape.B <= FmaTile<float>::kUnpackedRows && args.shape.weight_p == 0;
  with_tile(args.x.dtype, args.shape.high && !few, [&](auto tile) {
    with_recurrent_tile<4>(tile, args.shape, [&](auto h_tile) {  // the four gates
      lstm_forward<decltype(tile), decltype(h_tile)>(args, parallel);
    });
  });
}
inline void run_lstm_backward(const LstmBackward& args, const Parallel& parallel) {
  with_tile(args.x.dtype, args.shape.high, [&](auto tile) {
    // Narrow panels: as its rows are not cut, a step has few items for many threads otherwise.
    with_recurrent_tile<2>(tile, args.shape, [&](auto h_tile) {
      lstm_backward<decltype(tile), decltype(h_tile)>(args, parallel);
    });
  });
}
inline void run_linear_cross_entropy(const LinearCrossEntropy& args, const Parallel& parallel) {
  const bool few = !args.gradient && args.N <= FmaTile<float>::kUnpackedRows;
  with_tile(args.h.dtype, args.high && !few,
            [&](auto tile) { linear_cross_entropy<decltype(tile)>(args, parallel); });
}
inline void run_logits(const Logits& args, const Parallel& parallel) {
  const bool few = args.N <= FmaTile<float>::kUnpackedRows;
  with_tile(args.h.dtype, args.high && !few, [&](auto tile) { logits<decltype(tile)>(args, parallel); });
}
inline double run_in_cache(DType dtype, bool high, int64_t repeats) {
  double operations = 0;
  with_tile(dtype, high, [&](auto tile) { operations = multiply_in_cache<decltype(tile)>(repeats); });
  return operations;
}

#define ULMFIT_STRING_(x) #x
#define ULMFIT_STRING(x) ULMFIT_STRING_(x)

inline const Kernels& table() {
  static const Kernels kernels = {ULMFIT_STRING(ULMFIT_ISA),
                                  dropout_mask,
                                  variational_dropout,
                                  embedding_dropout,
                                  embedding_dropout_backward,
                                  concat_pool,
                                  concat_pool_backward,
                                  run_lstm,
                                  run_lstm_backward,
                                  run_linear_cross_entropy,
                                  run_logits,
                                  run_in_cache};
  return kernels;
}

ULMFIT_END
