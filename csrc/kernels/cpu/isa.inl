// Everything one instruction set needs: an ISA file defines ULMFIT_ISA and ULMFIT_LANES, opens its target
// region and includes this. ULMFIT_BF16 says that it has AVX-512's bf16 instructions, ULMFIT_AMX that it has
// AMX tiles besides. ULMFIT_PARENT names the instruction set that it only adds to: products by the same tile
// are taken from there, as compiling them again would double what such an instruction set adds to the
// library.
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

#define ULMFIT_STRING_(x) #x
#define ULMFIT_STRING(x) ULMFIT_STRING_(x)
#define ULMFIT_TABLE_(isa) isa##_kernels
#define ULMFIT_TABLE(isa) ULMFIT_TABLE_(isa)
#ifdef ULMFIT_PARENT
namespace ulmfit_fast {
const Kernels& ULMFIT_TABLE(ULMFIT_PARENT)();
}
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

inline const Kernels& table();
#ifdef ULMFIT_PARENT
constexpr bool kHasParent = true;
inline const Kernels& parent() { return ULMFIT_TABLE(ULMFIT_PARENT)(); }
#else
constexpr bool kHasParent = false;
inline const Kernels& parent() { return table(); }  // never asked
#endif
// Whether the parent multiplies by the same tile.
template <class Tile>
constexpr bool kInherited =
    kHasParent && (std::is_same_v<Tile, FmaTile<float>> || std::is_same_v<Tile, FmaTile<double>>);

// So few rows that the weight is not packed for them: then float32 products cost no more than three bf16
// ones.
inline bool few(int64_t rows) { return rows <= FmaTile<float>::kUnpackedRows; }

// Calls kernel with the tile to compute with, which follows the activations' storage type, or of_parent with
// the parent's table.
template <class Kernel, class OfParent>
inline void with_tile(DType dtype, bool high, Kernel&& kernel, OfParent&& of_parent) {
  auto call = [&]<class Tile>(Tile tile) {
    if constexpr (kInherited<Tile>) {
      of_parent(parent());
    } else {
      kernel(tile);
    }
  };
  if (dtype == DType::f64) return call(FmaTile<double>());
  if (dtype == DType::bf16) return call(Bf16Tile());
  if (dtype == DType::f32 && high) return call(HighTile());
  return call(FmaTile<float>());
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
  const bool unpacked = few(args.shape.T * args.shape.B) && args.shape.weight_p == 0;
  with_tile(
      args.x.dtype, args.shape.high && !unpacked,
      [&](auto tile) {
        with_recurrent_tile<4>(tile, args.shape, [&](auto h_tile) {  // the four gates
          lstm_forward<decltype(tile), decltype(h_tile)>(args, parallel);
        });
      },
      [&](const Kernels& parent) { parent.lstm(args, parallel); });
}
inline void run_lstm_backward(const LstmBackward& args, const Parallel& parallel) {
  with_tile(
      args.x.dtype, args.shape.high,
      [&](auto tile) {
        // Narrow panels: as its rows are not cut, a step has few items for many threads otherwise.
        with_recurrent_tile<2>(tile, args.shape, [&](auto h_tile) {
          lstm_backward<decltype(tile), decltype(h_tile)>(args, parallel);
        });
      },
      [&](const Kernels& parent) { parent.lstm_backward(args, parallel); });
}
inline void run_linear_cross_entropy(const LinearCrossEntropy& args, const Parallel& parallel) {
  const bool unpacked = few(args.N) && !args.gradient;
  with_tile(
      args.h.dtype, args.high && !unpacked,
      [&](auto tile) { linear_cross_entropy<decltype(tile)>(args, parallel); },
      [&](const Kernels& parent) { parent.linear_cross_entropy(args, parallel); });
}
inline void run_logits(const Logits& args, const Parallel& parallel) {
  with_tile(
      args.h.dtype, args.high && !few(args.N), [&](auto tile) { logits<decltype(tile)>(args, parallel); },
      [&](const Kernels& parent) { parent.logits(args, parallel); });
}
inline double run_in_cache(DType dtype, bool high, int64_t repeats) {
  double operations = 0;
  with_tile(
      dtype, high, [&](auto tile) { operations = multiply_in_cache<decltype(tile)>(repeats); },
      [&](const Kernels& parent) { operations = parent.multiply_in_cache(dtype, high, repeats); });
  return operations;
}

inline const Kernels& table() {
  static const Kernels kernels = {.isa = ULMFIT_STRING(ULMFIT_ISA),
                                  .dropout_mask = dropout_mask,
                                  .variational_dropout = variational_dropout,
                                  .embedding_dropout = embedding_dropout,
                                  .embedding_dropout_backward = embedding_dropout_backward,
                                  .concat_pool = concat_pool,
                                  .concat_pool_backward = concat_pool_backward,
                                  .lstm = run_lstm,
                                  .lstm_backward = run_lstm_backward,
                                  .linear_cross_entropy = run_linear_cross_entropy,
                                  .logits = run_logits,
                                  .multiply_in_cache = run_in_cache};
  return kernels;
}

ULMFIT_END
