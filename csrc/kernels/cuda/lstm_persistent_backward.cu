// The recurrence of the LSTM in one launch, backward (lstm_plan.h has the split): dgates of every step, dh0,
// dc0.
//
// A step of a block: wait for what the four blocks of its group made of the step before; the cell backward
// for its own units; store their dgates where all blocks read them, publish; with one row block, start to
// fetch what the next step's cells take, so that it comes while the block waits; then wait for one gate's
// plane of everybody's dgates, multiply it by that gate's weights for the group's units, store the sum for
// the group, publish. dgates lie in two buffers in turn, as h does on the way forward.
#include <array>
#include <map>

#include "lstm_sums.h"

namespace ulmfit_fast::cuda {
namespace {

struct Gradients {  // of a pair of units; only their own thread touches them
  float dh[2];      // what bypasses the product: dh_n, and the carry through padding
  float dc[2];
};

template <class S, int MT, int NT, template <class> class Sums>  // SumsInL2 or SumsInCluster
__global__ void __launch_bounds__(kSplitThreads, 1)
    lstm_persistent_backward_kernel(LstmPersistentBackward a, DeviceMask dropout) {
  using B = Block<S, MT, NT>;
  if (!kMatrixUnitsCompiled || !Sums<B>::kCompiled) return __trap();
  const B block(a.steps);
  const Sums<B> group_sums(a, block);
  const LstmSplit& split = block.split;
  const int T = static_cast<int>(a.steps.T);
  const int64_t H = split.H, units = a.steps.units;
  const int gate = block.cta % kGroup;
  Flag* dgates_flags = a.steps.flags + block.part * split.ctas;  // how many row blocks are published
  S* exchange = static_cast<S*>(a.exchange);
  const Dropout drop = dropout.key();
  const bool dropped = a.ddropped.data != nullptr;
  unsigned kept = dropped ? block.kept_items(a.steps, drop, 0) : 0;
  int lengths[B::kItems] = {};
  block.load_lengths(a.steps, 0, lengths);
  constexpr int kCells = 4 * B::kPairWords;  // the input words after the gates
  const auto state_of = [&](int pass, const auto& p) -> Gradients& {
    return reinterpret_cast<Gradients&>(block.state(pass, p));
  };
  // dh of a pair of this block's units that the product of the step before gives, gate by gate
  const auto recurrent = [&](int pass, const auto& p) {
    const int column = gate * split.cta_units() + split.item_unit(p.item);
    Pack<float, 2> sum = {};
    ULMFIT_UNROLL_ALL
    for (int k = 0; k < kGroup; ++k) {
      const Pack<float, 2> part =
          group_sums.load(k, pass, block.sum_fragment(p.row, column), block.sum_pair(p.row));
      sum.v[0] += part.v[0], sum.v[1] += part.v[1];
    }
    return sum;
  };

  // Starts to fetch what the cells of step i and a row block take; they find it after finish_copies().
  Pair<S> dy[B::kItems], ddropped[B::kItems];
  const auto fetch = [&](int i, int pass) {
    const int t = a.steps.reverse ? T - 1 - i : i, t_before = a.steps.reverse ? t + 1 : t - 1;
    block.for_items(a.steps, pass, [&](int item, const auto& p) {
      const auto copy = [&](int word, const void* from) {
        start_copy(&block.template input<uint32_t>(p, word), from);
      };
      const int64_t row = t * split.B + p.b, row_before = t_before * split.B + p.b;
      const S* gates = static_cast<const S*>(a.gates) + row * 4 * units + p.unit;
      ULMFIT_UNROLL_ALL
      for (int word = 0; word < kCells; ++word)
        copy(word, gates + word / B::kPairWords * units + word % B::kPairWords);
      ULMFIT_UNROLL_ALL
      for (int u = 0; u < 2; ++u) {
        const bool inside = p.unit + u < H;
        copy(kCells + u, a.cells + row * units + p.unit + u);
        if (i > 0) {
          copy(kCells + 2 + u, a.cells + row_before * units + p.unit + u);
        } else if (inside) {
          copy(kCells + 2 + u, a.c0 + p.b * H + p.unit + u);
        } else {
          block.template input<float>(p, kCells + 2 + u) = 0;
        }
        // Where there is none, anything: to put a zero there instead would be to wait for the load.
        const auto upstream = [&](const Sequence& d) {
          return inside && d.data != nullptr ? at<const S>(d, t, p.b) + p.unit + u : gates;
        };
        dy[item].v[u] = *upstream(a.dy);
        ddropped[item].v[u] = *upstream(a.ddropped);
      }
    });
  };

  block.load_weights([&](int column, int k) {
    Pack<S, B::kNeighbours> to = {};
    const int64_t unit = split.group_unit(block.cta, column), stride = a.steps.w.stride;
    const S* from = static_cast<const S*>(a.steps.w.data) + (gate * H + k) * stride + unit;
    ULMFIT_UNROLL_ALL
    for (int j = 0; j < B::kNeighbours; ++j)
      if (unit < H && k + j < H) to.v[j] = from[j * stride];
    return to;
  });
  for (int pass = 0; pass < split.passes; ++pass) {
    block.for_items(a.steps, pass, [&](int, const auto& p) {
      Gradients s = {};
      for (int u = 0; u < 2; ++u) {
        if (p.unit + u >= H) continue;
        s.dh[u] = a.dh_n[p.b * H + p.unit + u];
        s.dc[u] = a.dc_n[p.b * H + p.unit + u];
      }
      if (a.steps.lengths != nullptr) check_length(a.steps.lengths[p.b], T);
      state_of(pass, p) = s;
    });
  }
  __syncthreads();

  for (int i = T - 1; i >= 0; --i) {
    const int t = a.steps.reverse ? T - 1 - i : i;
    const unsigned done = static_cast<unsigned>(T - 1 - i) * split.passes;  // row blocks of the steps before
    for (int pass = 0; pass < split.passes; ++pass) {
      if (dropped && split.passes > 1) kept = block.kept_items(a.steps, drop, pass);
      if (split.passes > 1) block.load_lengths(a.steps, pass, lengths);
      if (i == T - 1 || split.passes > 1) fetch(i, pass);
      if (i < T - 1) group_sums.wait(pass, done - split.passes + pass + 1);
      finish_copies();

      Pair<S> left[B::kItems][4];
      block.for_items(a.steps, pass, [&](int item, const auto& p) {
        Gradients state = state_of(pass, p);  // a copy, as on the way forward
        const bool active = t < lengths[item];
        const Pack<float, 2> product = i < T - 1 ? recurrent(pass, p) : Pack<float, 2>{};
        LstmCellGrad<float> d[2] = {};
        ULMFIT_UNROLL_ALL
        for (int u = 0; u < 2; ++u) state.dh[u] += product.v[u];
        ULMFIT_UNROLL_ALL
        for (int u = 0; active && u < 2; ++u) {
          const auto gate_of = [&](int g) { return block.input_of_pair(p, g, u); };
          const float c = block.template input<float>(p, kCells + u),
                      c_before = block.template input<float>(p, kCells + 2 + u);
          const auto upstream = [&](const Sequence& d, S value) {
            return p.unit + u < H && d.data != nullptr ? widen(value) : 0.0f;
          };
          const float dh = state.dh[u] + upstream(a.dy, dy[item].v[u]) +
                           upstream(a.ddropped, ddropped[item].v[u]) * B::factor(kept, drop, item, u);
          d[u] = lstm_cell_backward(gate_of(0), gate_of(1), gate_of(2), gate_of(3), c_before, c, dh,
                                    state.dc[u]);
          state.dc[u] = d[u].c_prev;
          state.dh[u] = 0;
        }
        state_of(pass, p) = state;
        left[item][0] = narrow_pair<S>(d[0].a_i, d[1].a_i);
        left[item][1] = narrow_pair<S>(d[0].a_f, d[1].a_f);
        left[item][2] = narrow_pair<S>(d[0].a_g, d[1].a_g);
        left[item][3] = narrow_pair<S>(d[0].a_o, d[1].a_o);
        ULMFIT_UNROLL_ALL
        for (int g = 0; g < 4; ++g)
          B::send(exchange + block.exchanged(i % 2, 4, g, p.b, p.unit), left[item][g]);
      });
      __syncthreads();
      if (threadIdx.x == kPublisher) publish(dgates_flags + block.cta, done + pass + 1);

      block.for_items(a.steps, pass, [&](int item, const auto& p) {
        S* to = at<S>(a.dgates, t, p.b) + p.unit;
        for (int g = 0; g < 4; ++g)
          for (int u = 0; u < 2; ++u)
            if (p.unit + u < H) to[g * H + u] = left[item][g].v[u];
      });
      // A thread's inputs are its own, and it has used them; those of other row blocks would lie where they
      // do.
      if (i > 0 && split.passes == 1) fetch(i - 1, 0);
    }
    for (int pass = 0; pass < split.passes; ++pass) {
      block.wait_for_sources(dgates_flags, done + pass + 1);
      block.multiply(exchange + block.exchanged(i % 2, 4, gate, block.first_row(pass), 0));
      __syncthreads();
      for (int f = threadIdx.x; f < B::kSums; f += kSplitThreads) {
        Pack<float, 4> sum = block.sums[f];
        ULMFIT_UNROLL_ALL
        for (int w = 1; w < kSumWarps; ++w)
          for (int j = 0; j < 4; ++j) sum.v[j] += block.sums[w * B::kSums + f].v[j];
        group_sums.own(pass)[f] = sum;
      }
      __syncthreads();
      group_sums.publish_own(pass, done + pass + 1);
    }
  }
  for (int pass = 0; pass < split.passes; ++pass) {
    group_sums.wait(pass, static_cast<unsigned>(T - 1) * split.passes + pass + 1);
    block.for_items(a.steps, pass, [&](int, const auto& p) {
      const Gradients& state = state_of(pass, p);
      const Pack<float, 2> product = recurrent(pass, p);
      for (int u = 0; u < 2; ++u) {
        if (p.unit + u >= H) continue;
        static_cast<S*>(a.dh0)[p.b * H + p.unit + u] = narrow<S>(state.dh[u] + product.v[u]);
        static_cast<S*>(a.dc0)[p.b * H + p.unit + u] = narrow<S>(state.dc[u]);
      }
    });
  }
  group_sums.leave();
}

}  // namespace

#ifdef __CUDACC__
int& lstm_backward_clusters(const LstmSplit& split) {
  int device = 0;
  check("lstm_backward", cudaGetDevice(&device));
  const std::array<int64_t, 5> key = {device, static_cast<int64_t>(split.dtype), split.row_tiles,
                                      split.column_tiles, split.shared_memory()};
  thread_local std::map<std::array<int64_t, 5>, int> known;  // the driver is asked once
  const auto [found, unknown] = known.try_emplace(key, 0);
  if (unknown) {
    with_split(split, [&, &count = found->second](auto type, auto mt, auto nt) {
      count = active_clusters(lstm_persistent_backward_kernel<decltype(type), mt(), nt(), SumsInCluster>,
                              kSplitThreads, split.shared_memory(), kGroup);
    });
  }
  return found->second;
}
#endif

void lstm_persistent_backward(const LstmPersistentBackward& a, void* stream) {
  const LstmSplit& split = a.steps.split;
  try {
    with_split(split, [&](auto type, auto mt, auto nt) {
      using S = decltype(type);
      launch_cooperative("lstm_backward",
                         split.clusters ? lstm_persistent_backward_kernel<S, mt(), nt(), SumsInCluster>
                                        : lstm_persistent_backward_kernel<S, mt(), nt(), SumsInL2>,
                         split.parts * split.ctas, kSplitThreads, split.shared_memory(),
                         split.clusters ? kGroup : 1, stream, a, DeviceMask(a.steps.dropout));
    });
  } catch (const LaunchTooLarge&) {
#ifdef __CUDACC__
    if (split.clusters) lstm_backward_clusters(split) = 0;  // the next launch, or a graph's, is not to fail
#endif
    throw;
  }
}

}  // namespace ulmfit_fast::cuda
