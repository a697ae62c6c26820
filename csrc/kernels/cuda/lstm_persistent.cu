// The recurrence of the LSTM in one launch, forward (lstm_plan.h has the split).
//
// A step of a block: wait until those that own its warps' part of h have published it; multiply; add the
// warps' sums, the projection and the bias; the cell; store the new h where all blocks read it, publish; and
// only then store what nobody waits for. h lies in two buffers in turn: who writes h(i + 1) has seen every
// block publish h(i), so nobody reads h(i - 1) any more.
#include "lstm_persistent.h"

namespace ulmfit_fast::cuda {
namespace {

// A state in shared memory: c in fp32, h as stored; 16 bytes at most. Only its own thread touches it.
template <class S>
struct State {
  float c[2];
  Pair<S> h;
};
static_assert(sizeof(State<float>) == 16);

// What a pair of cells leaves besides h: stored after the others have been told.
template <class S>
struct Leavings {
  Pair<S> y, gates[4];
  Pack<float, 2> c;
};

template <class S, int MT, int NT>
__global__ void __launch_bounds__(kSplitThreads, 1)
    lstm_persistent_kernel(LstmPersistentForward a, DeviceMask dropout) {
  using B = Block<S, MT, NT>;
  if (!kMatrixUnitsCompiled) return __trap();
  const B block(a.steps);
  const LstmSplit& split = block.split;
  const int64_t H = split.H, T = a.steps.T, units = a.steps.units;
  Flag* flags = a.steps.flags + block.part * split.ctas;  // of this part: how many row blocks are published
  S* exchange = static_cast<S*>(a.exchange);
  const Dropout drop = dropout.key();
  const bool dropping = a.dropped.data != nullptr;
  unsigned kept = dropping ? block.kept_items(a.steps, drop, 0) : 0;
  int lengths[B::kItems] = {};
  block.load_lengths(a.steps, 0, lengths);
  const auto state_of = [&](int pass, const auto& p) -> State<S>& {
    return reinterpret_cast<State<S>&>(block.state(pass, p));
  };

  block.load_weights([&](int column, int k) {
    constexpr int N = B::kNeighbours;
    Pack<S, N> to = {};
    const int64_t unit = static_cast<int64_t>(block.cta) * split.cta_units() + column / 4;
    if (unit >= H) return to;
    const S* from =
        static_cast<const S*>(a.steps.w.data) + split.weight_row(block.cta, column) * a.steps.w.stride + k;
    if (k + N <= H && reinterpret_cast<uintptr_t>(from) % sizeof to == 0) return pack_at<S, N>(from);
    for (int j = 0; j < N; ++j)
      if (k + j < H) to.v[j] = from[j];
    return to;
  });
  for (int n = threadIdx.x; n < split.columns(); n += kSplitThreads) {
    const int64_t unit = static_cast<int64_t>(block.cta) * split.cta_units() + n / 4;
    block.bias[n] = a.bias != nullptr && unit < H ? a.bias[split.weight_row(block.cta, n)] : 0.0f;
  }
  for (int pass = 0; pass < split.passes; ++pass) {
    block.for_items(a.steps, pass, [&](int, const auto& p) {
      State<S> s = {};
      for (int u = 0; u < 2; ++u) {
        if (p.unit + u >= H) continue;
        s.c[u] = a.c0[p.b * H + p.unit + u];
        s.h.v[u] = static_cast<const S*>(a.h0.data)[p.b * a.h0.stride + p.unit + u];
      }
      if (a.steps.lengths != nullptr) check_length(a.steps.lengths[p.b], T);
      state_of(pass, p) = s;
      B::send(exchange + block.exchanged(0, 1, 0, p.b, p.unit), s.h);
    });
  }
  __syncthreads();
  if (threadIdx.x == kPublisher) publish(flags + block.cta, split.passes);

  for (int64_t i = 0; i < T; ++i) {
    const int64_t t = a.steps.reverse ? T - 1 - i : i;
    for (int pass = 0; pass < split.passes; ++pass) {
      block.for_items(a.steps, pass, [&](int, const auto& p) {
        const float* from = at<const float>(a.projected, t, p.b) + p.unit;
        ULMFIT_UNROLL_ALL
        for (int u = 0; u < 2; ++u) ULMFIT_UNROLL_ALL
        for (int g = 0; g < 4; ++g)
          if (p.unit + u < H) start_copy(&block.template input<uint32_t>(p, 4 * u + g), from + g * H + u);
      });
      if (split.passes > 1) block.load_lengths(a.steps, pass, lengths);
      const unsigned published = static_cast<unsigned>(i) * split.passes + pass + 1;
      block.wait_for_sources(flags, published);
      block.multiply(exchange + block.exchanged(i % 2, 1, 0, block.first_row(pass), 0));
      finish_copies();
      __syncthreads();

      Leavings<S> left[B::kItems];
      block.for_items(a.steps, pass, [&](int item, const auto& p) {
        State<S> state =
            state_of(pass, p);  // a copy: stores between the units' loads would keep these in order
        const int column = 4 * split.item_unit(p.item);
        float gates[2][4] = {}, y[2] = {};
        if (t < lengths[item]) {
          ULMFIT_UNROLL_ALL
          for (int u = 0; u < 2; ++u) {
            const auto input = [&](int g) { return block.template input<float>(p, 4 * u + g); };
            float pre[4];
            ULMFIT_UNROLL_ALL
            for (int g = 0; g < 4; g += 2) {
              const int n = column + 4 * u + g, f = block.sum_fragment(p.row, n),
                        pair = 2 * block.sum_pair(p.row);
              float recurrent[2] = {};
              ULMFIT_UNROLL_ALL
              for (int w = 0; w < kSumWarps; ++w) {
                recurrent[0] += block.sums[w * B::kSums + f].v[pair];
                recurrent[1] += block.sums[w * B::kSums + f].v[pair + 1];
              }
              pre[g] = input(g) + recurrent[0] + block.bias[n];
              pre[g + 1] = input(g + 1) + recurrent[1] + block.bias[n + 1];
            }
            const LstmCell<float> cell = lstm_cell_forward(pre[0], pre[1], pre[2], pre[3], state.c[u]);
            // A unit past H is computed from whatever is there and dropped: a branch would keep the two units
            // from being computed side by side.
            const auto inside = [&](float value) { return p.unit + u < H ? value : 0.0f; };
            state.c[u] = inside(cell.c);
            y[u] = inside(cell.h);
            state.h.v[u] = narrow<S>(y[u]);
            gates[u][0] = inside(cell.i), gates[u][1] = inside(cell.f);
            gates[u][2] = inside(cell.g), gates[u][3] = inside(cell.o);
          }
        }
        B::send(exchange + block.exchanged((i + 1) % 2, 1, 0, p.b, p.unit), state.h);
        state_of(pass, p) = state;
        left[item].y = narrow_pair<S>(y[0], y[1]);
        ULMFIT_UNROLL_ALL
        for (int g = 0; g < 4; ++g) left[item].gates[g] = narrow_pair<S>(gates[0][g], gates[1][g]);
        left[item].c = {{state.c[0], state.c[1]}};
      });
      __syncthreads();
      if (threadIdx.x == kPublisher) publish(flags + block.cta, published + split.passes);

      if (dropping && split.passes > 1) kept = block.kept_items(a.steps, drop, pass);
      block.for_items(a.steps, pass, [&](int item, const auto& p) {
        const Leavings<S>& l = left[item];
        for (int u = 0; u < 2; ++u) {
          if (p.unit + u >= H) continue;
          at<S>(a.y, t, p.b)[p.unit + u] = l.y.v[u];
          if (!dropping) continue;
          const float y = widen(l.y.v[u]) * B::factor(kept, drop, item, u);
          at<S>(a.dropped, t, p.b)[p.unit + u] = narrow<S>(y);
        }
        if (a.gates == nullptr) return;
        const int64_t row = t * split.B + p.b;
        S* gates = static_cast<S*>(a.gates) + row * 4 * units + p.unit;
        for (int g = 0; g < 4; ++g) store_whole(gates + g * units, l.gates[g]);
        store_whole(a.cells + row * units + p.unit, l.c);
      });
    }
  }
  for (int pass = 0; pass < split.passes; ++pass) {
    block.for_items(a.steps, pass, [&](int, const auto& p) {
      const State<S>& state = state_of(pass, p);
      for (int u = 0; u < 2; ++u) {
        if (p.unit + u >= H) continue;
        static_cast<S*>(a.h_n)[p.b * H + p.unit + u] = state.h.v[u];
        static_cast<S*>(a.c_n)[p.b * H + p.unit + u] = narrow<S>(state.c[u]);
      }
    });
  }
}

}  // namespace

void lstm_persistent(const LstmPersistentForward& a, void* stream) {
  const LstmSplit& split = a.steps.split;
  with_split(split, [&](auto type, auto mt, auto nt) {
    launch_cooperative("lstm", lstm_persistent_kernel<decltype(type), mt(), nt()>, split.parts * split.ctas,
                       kSplitThreads, split.shared_memory(), /*cluster=*/1, stream, a,
                       DeviceMask(a.steps.dropout));
  });
}

DeviceLimits device_limits() {
  DeviceLimits limits;
#ifdef __CUDACC__
  int device = 0;
  check("lstm", cudaGetDevice(&device));
  const auto ask = [&](cudaDeviceAttr what) {
    int value = 0;
    check("lstm", cudaDeviceGetAttribute(&value, what, device));
    return value;
  };
  limits.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  limits.shared_memory = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.capability = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  limits.cooperative = ask(cudaDevAttrCooperativeLaunch) != 0;
  cudaFuncAttributes kernel;  // any: all are compiled for the same architectures
  check("lstm", cudaFuncGetAttributes(&kernel, lstm_persistent_kernel<bf16, 1, 2>));
  limits.compiled = kernel.ptxVersion;
  if (kClusters && limits.capability >= 90) limits.clusters = lstm_backward_clusters;
#else
  const CardOnCpu card = card_on_cpu();
  limits = {card.multiprocessors,
            card.kilobytes * 1024,
            90,
            true,
            [card](const LstmSplit&) { return card.clusters; },
            card.compiled};
#endif
  return limits;
}

}  // namespace ulmfit_fast::cuda
