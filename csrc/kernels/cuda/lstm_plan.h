// How the persistent recurrence is split over a card: the rule, as plain C++ for the host, the kernels and
// the tests. No CUDA, no torch.
//
// One launch runs all time steps. Each thread block (CTA) keeps its slice of W_hh in shared memory; what
// crosses CTAs is h on the way forward, dgates on the way back. The batch falls into `parts` that never meet.
// Within a part, CTA c owns 2 * column_tiles hidden units: it computes their cells and keeps their state.
//
//   forward   CTA c multiplies h (rows, K = H) by its units' four gates: 8 * column_tiles columns of W_hh^T.
//   backward  K = 4H would have every CTA read every dgates. So four CTAs share a group of 8 * column_tiles
//             units, each multiplies the plane of one gate (K = H again), and the four sums meet in L2, or,
//             where the four can be a cluster, in their shared memory.
//
// So both directions multiply tiles of one shape, (16 * row_tiles, H) x (H, 8 * column_tiles), by the same
// code. Within a CTA each of 8 warps takes an eighth of K: every weight leaves shared memory, and every h
// leaves L2, once for a row block. Two warps for each of a multiprocessor's four schedulers, so that one
// computes while the other waits for memory; their sums meet pair by pair in shared memory, which has room
// for four.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>

#include "../views.h"
#include "../isa_namespace.h"

namespace ulmfit_fast::cuda {

// What is compiled, for elements of 2 bytes and of 4: 9 puts H = 1152 in 16 bits and 64 rows on two parts of
// 64 CTAs, 5 puts it in TF32 on one part of 116.
constexpr int kTileChoices = 5;
constexpr int kColumnTiles[2][kTileChoices] = {{2, 4, 6, 8, 9}, {2, 4, 5, 6, 8}};
constexpr auto& column_tiles_of(int element) { return kColumnTiles[element / 4]; }
constexpr int kRowTiles[] = {1, 2};
constexpr int kSplitWarps = 8, kSplitThreads = 32 * kSplitWarps;
constexpr int kSumWarps = kSplitWarps / 2;  // whose sums are kept; the others' are added to them
// The thread that publishes for its CTA. Of the last warp, which has the fewest items: the fence that comes
// with a flag holds its warp up.
constexpr int kPublisher = kSplitThreads - 32;
constexpr int kGroup = 4;  // CTAs that share columns on the way back: one for each gate
constexpr int kTileRows = 16, kTileColumns = 8;
constexpr int64_t kFragment = 16;  // bytes that a lane loads at once
// K of mma.sync: m16n8k16 for elements of 2 bytes, m16n8k8 for 4 (TF32). A chunk is two: 16 bytes of weights
// for a lane.
ULMFIT_HD constexpr int tile_k(int element) { return 32 / element; }
ULMFIT_HD constexpr int chunk_k(int element) { return 2 * tile_k(element); }

enum class Direction { forward, backward };

// Where everything is. `row` counts from the part's first row, `unit` from 0 to H.
struct LstmSplit {
  Direction direction = Direction::forward;
  DType dtype = DType::bf16;  // x's
  int64_t B = 0, H = 0;
  int column_tiles = 0, row_tiles = 0;
  bool clusters = false;    // whether groups are clusters, and leave their sums in shared memory
  int passes = 0;           // row blocks of a part, one after the other in every step
  int parts = 0, ctas = 0;  // ctas of each part

  ULMFIT_HD int element() const { return dtype == DType::f32 ? 4 : 2; }  // bytes
  ULMFIT_HD int chunk() const { return chunk_k(element()); }
  ULMFIT_HD int block_rows() const { return kTileRows * row_tiles; }
  ULMFIT_HD int part_rows() const { return block_rows() * passes; }
  ULMFIT_HD int64_t padded_rows() const { return static_cast<int64_t>(parts) * part_rows(); }
  ULMFIT_HD int cta_units() const { return 2 * column_tiles; }
  ULMFIT_HD int columns() const { return kTileColumns * column_tiles; }
  ULMFIT_HD int chunks() const { return static_cast<int>((H + chunk() - 1) / chunk()); }
  ULMFIT_HD int64_t padded_h() const { return static_cast<int64_t>(chunks()) * chunk(); }
  ULMFIT_HD int groups() const { return ctas / kGroup; }

  // The chunks of K that a warp multiplies, and the CTAs that own their units. The first warps take one more
  // where they do not divide evenly: warp w runs on scheduler w % 4, so no scheduler has two more than
  // another.
  ULMFIT_HD int first_chunk(int warp) const {
    const int more = chunks() % kSplitWarps;
    return chunks() / kSplitWarps * warp + (warp < more ? warp : more);
  }
  ULMFIT_HD int first_source(int warp) const { return chunk() * first_chunk(warp) / cta_units(); }
  ULMFIT_HD int end_source(int warp) const {
    const int first = first_chunk(warp), end = first_chunk(warp + 1);
    const int sources = (chunk() * end + cta_units() - 1) / cta_units();
    return first == end ? first_source(warp) : sources < ctas ? sources : ctas;
  }

  // Items of a CTA and row block: two neighbouring units of one row, dealt out to the threads in turn.
  ULMFIT_HD int items() const { return block_rows() * column_tiles; }
  ULMFIT_HD int item_row(int item) const { return item / column_tiles; }
  ULMFIT_HD int item_unit(int item) const { return 2 * (item % column_tiles); }

  // The row of W_hh that is column n of a forward CTA's product: a tile's 8 columns are two units' four
  // gates.
  ULMFIT_HD int64_t weight_row(int cta, int n) const {
    return n % 4 * H + static_cast<int64_t>(cta) * cta_units() + n / 4;
  }
  // Backward: the unit that is column n of the product of a CTA; its gate is cta % kGroup.
  ULMFIT_HD int64_t group_unit(int cta, int n) const {
    return static_cast<int64_t>(cta / kGroup) * columns() + n;
  }

  // Words of 4 bytes that an item's cells take: forward the projections of two units; backward their gates,
  // as stored, and their cells of two steps.
  ULMFIT_HD int input_words() const { return direction == Direction::forward ? 8 : 2 * element() + 4; }

  // Bytes of shared memory: the weights, the warps' sums, the states of all items (16 bytes each), the inputs
  // of a row block's items, the bias, a cluster's sums of all row blocks.
  ULMFIT_HD int64_t weight_bytes() const {
    return static_cast<int64_t>(chunks()) * column_tiles * 32 * kFragment;
  }
  ULMFIT_HD int64_t sum_bytes() const {
    return static_cast<int64_t>(kSumWarps) * row_tiles * column_tiles * 32 * kFragment;
  }
  ULMFIT_HD int64_t state_bytes() const { return static_cast<int64_t>(passes) * items() * 16; }
  ULMFIT_HD int64_t input_bytes() const { return static_cast<int64_t>(items()) * input_words() * 4; }
  ULMFIT_HD int64_t bias_bytes() const { return 4 * columns(); }
  ULMFIT_HD int64_t group_sum_bytes() const { return clusters ? passes * sum_bytes() / kSumWarps : 0; }
  ULMFIT_HD int64_t shared_memory() const {
    return weight_bytes() + sum_bytes() + state_bytes() + input_bytes() + bias_bytes() + group_sum_bytes();
  }

  // Elements of the buffers in global memory, zeros on entry.
  int64_t exchange_elements() const {  // two buffers; a plane for each gate on the way back
    return 2 * padded_rows() * padded_h() * (direction == Direction::forward ? 1 : 4);
  }
  bool sums_in_l2() const { return direction == Direction::backward && !clusters; }
  int64_t sums_elements() const {
    return sums_in_l2() ? static_cast<int64_t>(parts) * ctas * part_rows() * columns() : 0;
  }
  int64_t flags() const {  // for h or dgates, then for the sums in L2
    return static_cast<int64_t>(parts) * ctas * (sums_in_l2() ? 2 : 1);
  }
};

struct DeviceLimits {
  int multiprocessors = 0;    // what this process may use: a MIG slice's, not the card's
  int64_t shared_memory = 0;  // bytes that one CTA may ask for
  int capability = 0;         // 10 * major + minor
  bool cooperative = false;   // whether a launch can promise that all its CTAs run at once
  // How many clusters of kGroup CTAs of this split run at once: often fewer than multiprocessors / kGroup, as
  // a cluster does not cross the borders of the card's processing clusters. None: no clusters here.
  std::function<int(const LstmSplit&)> clusters;
  // For what the kernels were compiled, as capability is written: where the driver had to make them for this
  // device from PTX of an older one, what needs the newer device is not in them.
  int compiled = 1 << 30;
};

struct LstmPlan {
  LstmSplit split;
  std::string why_not;  // where it does not fit
  double cycles = 0;    // of a step, an estimate that only ranks the splits
  bool fits() const { return split.parts > 0; }
};

// What a step is thought to take: the L2 traffic of the exchange (about 3000 bytes a cycle for the whole
// card; sums are written and read there once), the products (1024 multiply-adds a cycle and multiprocessor,
// half as many in TF32, and as long to read the weights from shared memory for 16 rows), the cells (1000
// cycles for each item of the busiest thread: a number from a model of the compiled code's latencies, not a
// measured one), and what a row block costs besides.
inline double estimated_cycles(const LstmSplit& s) {
  const double read = 1.0 * s.element() * s.part_rows() * s.padded_h() * s.ctas * s.parts;
  const double products =
      static_cast<double>(s.part_rows()) * s.columns() * s.padded_h() * s.element() / 2048;
  const double sums = 8.0 * s.sums_elements();
  const int rounds = (s.items() + kSplitThreads - 1) / kSplitThreads;
  return (read + sums) / 3000 + products + (1000.0 * rounds + 600) * s.passes;
}

// Among the splits that are compiled and fit, the one with the fewest estimated cycles. tf32: whether float32
// products may be made in it; there are no others here.
inline LstmPlan plan_lstm(int64_t B, int64_t H, DType dtype, bool tf32, Direction direction,
                          const DeviceLimits& device) {
  LstmPlan best;
  if (dtype == DType::f64) {
    best.why_not = "its kernels are for bfloat16, float16 and float32";
  } else if (dtype == DType::f32 && !tf32) {
    best.why_not =
        "float32 needs TF32, which torch does not allow now: torch.set_float32_matmul_precision('high')";
  } else if (device.capability < 80) {
    best.why_not = "its kernels need compute capability 8.0 or newer";
  } else if (device.compiled < 80) {
    best.why_not = "its kernels were compiled for compute capability " +
                   std::to_string(device.compiled / 10) + "." + std::to_string(device.compiled % 10) +
                   ": name 8.0 or newer in TORCH_CUDA_ARCH_LIST and build again";
  } else if (!device.cooperative) {
    best.why_not = "the device cannot launch cooperatively";
  } else if (H < 1 || H > 1 << 15) {
    best.why_not = "H = " + std::to_string(H) + " does not fit on any card";
  }
  if (!best.why_not.empty()) return best;
  const auto consider = [&](int columns, int rows, bool clusters) {
    LstmPlan plan;
    LstmSplit& s = plan.split;
    s.direction = direction, s.dtype = dtype, s.B = B, s.H = H;
    s.column_tiles = columns, s.row_tiles = rows, s.clusters = clusters;
    const int64_t together = direction == Direction::forward ? 1 : kGroup;
    s.ctas = static_cast<int>(round_up(ceil_div(padded_units(H), s.cta_units()), together));
    const int64_t blocks = ceil_div(B, s.block_rows()), most = device.multiprocessors / s.ctas;
    if (most == 0 || B == 0) return;
    s.passes = static_cast<int>(ceil_div(blocks, most));
    s.parts = static_cast<int>(ceil_div(blocks, s.passes));
    plan.cycles = estimated_cycles(s);
    if (best.fits() && plan.cycles >= best.cycles) return;
    if (s.shared_memory() > device.shared_memory) return;
    if (clusters && s.parts * s.groups() > device.clusters(s)) return;
    best = plan;
  };
  const bool may_cluster = direction == Direction::backward &&
                           std::min(device.capability, device.compiled) >= 90 && device.clusters;
  for (const int columns : column_tiles_of(static_cast<int>(size_of(dtype)))) {
    for (const int rows : kRowTiles) {
      consider(columns, rows, false);
      if (may_cluster) consider(columns, rows, true);
    }
  }
  if (!best.fits()) {
    best.why_not = "no split of W_hh for H = " + std::to_string(H) + " and batch " + std::to_string(B) +
                   " fits " + std::to_string(device.multiprocessors) + " multiprocessors with " +
                   std::to_string(device.shared_memory / 1024) + " KB of shared memory each";
  }
  return best;
}

}  // namespace ulmfit_fast::cuda
