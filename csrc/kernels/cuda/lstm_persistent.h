// What both directions of the persistent recurrence share: where a thread block stands, its weights in shared
// memory, the product, and how items are reached. The split, its words and its reasons: lstm_plan.h.
#pragma once
#include "cell.h"
#include "mma.h"

namespace ulmfit_fast::cuda {

template <class S>
using Pair = Pack<S, 2>;  // two neighbouring units

// value, as if the compiler did not know it: so that it computes addresses again rather than keep dozens of
// them in registers that the products need.
inline __device__ int recomputed(int value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#endif
  return value;
}
template <class T>
__device__ T* recomputed(T* value) {
#ifdef __CUDACC__
  asm volatile("" : "+l"(value));
#endif
  return value;
}

// Stores a pack in one instruction; its 16-bit members would be stored one by one.
template <class S, int N>
__device__ void store_whole(S* to, const Pack<S, N>& pack) {
#ifdef __CUDACC__
  using Word = std::conditional_t<sizeof pack == 4, uint32_t, uint2>;
  static_assert(sizeof(Word) == sizeof pack);
  *reinterpret_cast<Word*>(to) = reinterpret_cast<const Word&>(pack);
#else
  pack_at<S, N>(to) = pack;
#endif
}
template <class S>
__device__ Pair<S> narrow_pair(float a, float b) {
  return {{narrow<S>(a), narrow<S>(b)}};
}

// A thread block of a persistent launch. MT, NT: the split's row_tiles and column_tiles, known to the
// compiler.
template <class S, int MT, int NT>
struct Block {
  static constexpr int kItems = (kTileRows * MT * NT + kSplitThreads - 1) / kSplitThreads;  // of a thread
  static constexpr int kSums = MT * NT * 32;  // fragments of 4 floats: a product
  static constexpr int kTileK = tile_k(sizeof(S));
  static constexpr int kNeighbours = kTileK / 4;  // units next to each other that a lane holds of a tile
  static constexpr int kOfWord = 4 / sizeof(S);   // of 4 bytes
  static constexpr int kPairWords = 2 / kOfWord;

  LstmSplit split;
  int part, cta;
  Fragment* weights;       // (chunks, NT, 32 lanes)
  Pack<float, 4>* sums;    // (kSumWarps, MT, NT, 32 lanes)
  Pack<float, 4>* states;  // (passes, items)
  uint32_t* inputs;        // (words, items): what a row block's cells take, on its way while the block waits
  float* bias;             // (8 * NT), by column
  Pack<float, 4>* group_sums;  // (passes, MT, NT, 32 lanes), where the group is a cluster

  __device__ explicit Block(const LstmSteps& a) : split(a.split) {
    split.row_tiles = MT, split.column_tiles = NT;
    part = blockIdx.x / split.ctas, cta = blockIdx.x % split.ctas;
    char* memory = dynamic_shared_memory();
    weights = reinterpret_cast<Fragment*>(memory);
    sums = reinterpret_cast<Pack<float, 4>*>(memory += split.weight_bytes());
    states = reinterpret_cast<Pack<float, 4>*>(memory += split.sum_bytes());
    inputs = reinterpret_cast<uint32_t*>(memory += split.state_bytes());
    bias = reinterpret_cast<float*>(memory += split.input_bytes());
    group_sums = reinterpret_cast<Pack<float, 4>*>(memory += split.bias_bytes());
  }

  // f(i, place) for this thread's items of a row block that lie within the batch and the padded units.
  struct Place {
    int item, row;  // row within the block
    int64_t b, unit;
  };
  template <class F>
  __device__ void for_items(const LstmSteps& a, int pass, F&& f) const {
    ULMFIT_UNROLL_ALL
    for (int i = 0; i < kItems; ++i) {
      Place p;
      p.item = recomputed(threadIdx.x) + i * kSplitThreads;
      p.row = split.item_row(p.item);
      p.b = first_row(pass) + p.row;
      p.unit = static_cast<int64_t>(cta) * split.cta_units() + split.item_unit(p.item);
      if (p.item < split.items() && p.b < split.B && p.unit < a.units) f(i, p);
    }
  }
  __device__ int64_t first_row(int pass) const {
    return static_cast<int64_t>(part) * split.part_rows() + pass * split.block_rows();
  }
  // The word'th 4 bytes that an item's cells take: T is float, or a pair of 16-bit elements.
  template <class T>
  __device__ T& input(const Place& p, int word) const {
    static_assert(sizeof(T) == 4);
    return *reinterpret_cast<T*>(&inputs[word * split.items() + p.item]);
  }
  // Of the pair'th Pair<S> among them, unit u.
  __device__ float input_of_pair(const Place& p, int pair, int u) const {
    if constexpr (kPairWords == 1) {
      const uint32_t word = inputs[pair * split.items() + p.item];  // both at once
      Pair<S> both;
      std::memcpy(&both, &word, sizeof both);
      return widen(both.v[u]);
    } else {
      return input<S>(p, kPairWords * pair + u);
    }
  }
  __device__ Pack<float, 4>& state(int pass, const Place& p) const {
    return states[pass * split.items() + p.item];
  }

  // Element of an exchange buffer, (2, planes, padded_rows / 16, padded_h / kTileK, 32 lanes, 16 bytes): as
  // the lanes load it. A lane's 16 bytes are an operand a of mma: neighbouring units, word by word, of rows r
  // and r + 8 in turn.
  __device__ int64_t exchanged(int buffer, int planes, int plane, int64_t row, int64_t unit) const {
    const int r = row % kTileRows, k = unit % kTileK;
    const int64_t plane_rows = (static_cast<int64_t>(buffer) * planes + plane) * split.padded_rows();
    return (plane_rows + row - r) * split.padded_h() + (unit - k) * kTileRows +
           (r % 8 * 4 + k / kNeighbours) * 2 * kNeighbours +
           (k % kNeighbours / kOfWord * 2 + r / 8) * kOfWord + k % kOfWord;
  }
  // Writes a pair of units there.
  __device__ static void send(S* to, Pair<S> values) {
    if constexpr (kOfWord == 2) {
      store_whole(to, values);
    } else {
      to[0] = as_operand(values.v[0]), to[2] = as_operand(values.v[1]);
    }
  }

  // The lengths of this thread's items of a row block, T where there are none: fetched before the block
  // waits, once where there is one row block.
  __device__ void load_lengths(const LstmSteps& a, int pass, int (&lengths)[kItems]) const {
    for_items(a, pass, [&](int i, const Place& p) {
      lengths[i] = static_cast<int>(a.lengths == nullptr ? a.T : a.lengths[p.b]);
    });
  }

  // Which of this thread's items of a row block y's dropout keeps: bit 2 * i + u is unit u of item i. Made
  // once where there is one row block; ten rounds of Philox for every step would be felt.
  __device__ unsigned kept_items(const LstmSteps& a, const Dropout& drop, int pass) const {
    static_assert(2 * kItems <= 32);
    unsigned bits = 0;
    for_items(a, pass, [&](int i, const Place& p) {
      for (int u = 0; u < 2; ++u)
        if (drop.kept(static_cast<uint64_t>(p.b * split.H + p.unit + u))) bits |= 1u << (2 * i + u);
    });
    return bits;
  }
  // What unit u of item i is multiplied by.
  __device__ static float factor(unsigned kept, const Dropout& drop, int i, int u) {
    return kept >> (2 * i + u) & 1 ? static_cast<float>(drop.scale) : 0.0f;
  }

  // The four-float fragment position of (row, column): which fragment, and which of its two pairs. Lanes
  // stand in an order that differs from tile to tile: the cells of neighbouring threads are of neighbouring
  // tiles, and the same lane's fragments, 512 bytes apart, would share their banks.
  __device__ static int sum_lane(int lane, int column_tile) { return lane ^ column_tile % 8; }
  __device__ int sum_fragment(int row, int column) const {
    const int tile = column / kTileColumns, lane = row % 8 * 4 + column % kTileColumns / 2;
    return (row / kTileRows * NT + tile) * 32 + sum_lane(lane, tile);
  }
  __device__ int sum_pair(int row) const { return row % kTileRows / 8; }

  // Waits until those whose units this warp multiplies have published `value`.
  __device__ void wait_for_sources(const Flag* flags, unsigned value) const {
    const int warp = recomputed(threadIdx.x) / kWarp;
    wait_for_flags(flags, split.first_source(warp), split.end_source(warp), value);
  }

  // rows: a row block of an exchange buffer; this warp's part of K, times the weights -> sums, of two warps
  // each. They are complete after the next __syncthreads().
  __device__ void multiply(const S* rows) const {
    constexpr int kDepth = MT == 1 ? 8 : 4;  // chunks on their way from L2: 64 KB for each multiprocessor
    constexpr int kOfChunk = 2 * 32;         // fragments from chunk to chunk
    const int thread = recomputed(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const int first = split.first_chunk(warp), count = split.first_chunk(warp + 1) - first;
    const int of_tile = split.chunks() * kOfChunk;  // fragments from one 16 rows to the next
    const Fragment* next = recomputed(reinterpret_cast<const Fragment*>(rows) + first * kOfChunk + lane);
    int w = recomputed(first * NT * 32 + lane);
    float sum[MT][NT][4] = {};
    Fragment ring[kDepth][MT][2];
    if (!kExchange) std::memcpy(ring, weights + lane, sizeof ring);  // anything but zeros
    const auto load = [&](Fragment(&to)[MT][2], const Fragment* from) {
      ULMFIT_UNROLL_ALL
      for (int j = 0; j < 2 * MT; ++j)
        if (kExchange) to[j / 2][j % 2] = load_shared_by_card(from + j / 2 * of_tile + j % 2 * 32);
    };
    ULMFIT_UNROLL_ALL
    for (int d = 0; d < kDepth; ++d)
      if (d < count) load(ring[d], next + d * kOfChunk);
    for (int left = count; left > 0; left -= kDepth) {
      next += kDepth * kOfChunk;
      ULMFIT_UNROLL_ALL
      for (int d = 0; d < kDepth; ++d) {
        if (d >= left) break;
        ULMFIT_UNROLL_ALL
        for (int n = 0; kProducts && n < NT; ++n) {
          ULMFIT_UNROLL_ALL
          for (int m = 0; m < MT; ++m) mma_chunk<S>(sum[m][n], ring[d][m], weights[w + (d * NT + n) * 32]);
        }
        if (d + kDepth < left) load(ring[d], next + d * kOfChunk);
      }
      w += kDepth * NT * 32;
    }
    const auto leave = [&](bool add) {
      ULMFIT_UNROLL_ALL
      for (int m = 0; m < MT; ++m) ULMFIT_UNROLL_ALL
      for (int n = 0; n < NT; ++n) {
        Pack<float, 4>& to = sums[warp % kSumWarps * kSums + (m * NT + n) * 32 + sum_lane(lane, n)];
        Pack<float, 4> value = {{sum[m][n][0], sum[m][n][1], sum[m][n][2], sum[m][n][3]}};
        for (int j = 0; add && j < 4; ++j) value.v[j] += to.v[j];
        to = value;
      }
    };
    if (warp >= kSumWarps) leave(/*add=*/false);
    __syncthreads();
    if (warp < kSumWarps) leave(/*add=*/true);
  }

  // The weights of this block: neighbours(column, k) are kNeighbours of them from k on, 0 where there is
  // none. A lane's 16 bytes are two operands b: neighbours of its column in each half of a chunk.
  template <class F>
  __device__ void load_weights(F&& neighbours) const {
    const int count = split.chunks() * NT * 32;
    ULMFIT_UNROLL
    for (int f = threadIdx.x; f < count; f += kSplitThreads) {
      const int column = f / 32 % NT * kTileColumns + f % 32 / 4;
      const int k = f / 32 / NT * 2 * kTileK + f % 4 * kNeighbours;
      auto* to = reinterpret_cast<Pack<S, kNeighbours>*>(weights + f);
      to[0] = neighbours(column, k);
      to[1] = neighbours(column, k + kTileK);
      ULMFIT_UNROLL_ALL
      for (int j = 0; j < 2 * kNeighbours; ++j)
        to[j / kNeighbours].v[j % kNeighbours] = as_operand(to[j / kNeighbours].v[j % kNeighbours]);
    }
  }
};

// f(S{}, MT, NT): the kernel's type and, as std::integral_constant, its tiles, for what the plan chose.
template <class S, class F, size_t... I>
void with_tiles(const LstmSplit& split, F&& f, std::index_sequence<I...>) {
  constexpr auto& kChoices = column_tiles_of(sizeof(S));
  const auto run = [&](auto nt) {
    if (split.column_tiles != nt()) return false;
    if (split.row_tiles == 1) {
      f(S{}, std::integral_constant<int, 1>{}, nt);
    } else {
      f(S{}, std::integral_constant<int, 2>{}, nt);
    }
    return true;
  };
  if (!(run(std::integral_constant<int, kChoices[I]>{}) || ...))
    throw std::runtime_error("ulmfit_fast.lstm: no kernel for this split");
}
template <class F>
void with_split(const LstmSplit& split, F&& f) {
  constexpr std::make_index_sequence<kTileChoices> kAll;
  if (split.dtype == DType::bf16) return with_tiles<bf16>(split, f, kAll);
#ifdef ULMFIT_ONLY_BF16  // benchmarks/lstm_parts.py compiles all kernels many times, and times these
  throw std::runtime_error("ulmfit_fast.lstm: compiled for bfloat16 alone");
#else
  if (split.dtype == DType::f16) return with_tiles<f16>(split, f, kAll);
  with_tiles<float>(split, f, kAll);
#endif
}

// How many clusters of this split's kernel, one for each group, the device can run at once, as far as is
// known.
int& lstm_backward_clusters(const LstmSplit& split);

}  // namespace ulmfit_fast::cuda
