// The persistent recurrence on the CPU, beside the same steps in doubles: buffers of exactly the size that
// the plan says, for the address sanitizer (make asan), on made-up cards, with lengths and in both directions
// of time.
#include "check.h"
#include "kernels/cuda/lstm_persistent.cu"
#include "kernels/cuda/lstm_persistent_backward.cu"

using namespace ulmfit_fast;
using namespace ulmfit_fast::cuda;

namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

double value(float v) { return v; }
double value(bf16 v) { return __bfloat162float(v); }
template <class T>
std::vector<T> draw(int64_t n, unsigned seed, double scale) {
  std::vector<T> values(n);
  const Doubles numbers = random_values<double>(n, seed, scale);
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, bf16>)
      values[i] = __float2bfloat16_rn(static_cast<float>(numbers[i]));
    else
      values[i] = static_cast<float>(numbers[i]);
  }
  return values;
}
template <class T>
Doubles widened(const std::vector<T>& values) {
  Doubles wide(values.size());
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = value(values[i]);
  return wide;
}

template <class S>  // what is stored
struct Problem {
  static constexpr DType kDtype = std::is_same_v<S, bf16> ? DType::bf16 : DType::f32;
  int64_t T, B, H;
  bool reverse, with_lengths;
  std::vector<int64_t> lengths;
  std::vector<S> w, h0, dy;
  Floats projected, bias, c0, dh_n, dc_n;

  Problem(int64_t T, int64_t B, int64_t H, bool reverse, bool with_lengths)
      : T(T), B(B), H(H), reverse(reverse), with_lengths(with_lengths) {
    for (int64_t b = 0; b < B; ++b) lengths.push_back((3 * b + 1) % (T + 1));
    w = draw<S>(4 * H * H, 1, 1 / std::sqrt(H)), h0 = draw<S>(B * H, 2, 1);
    dy = draw<S>(T * B * H, 3, 1);
    projected = draw<float>(T * B * 4 * H, 4, 1), bias = draw<float>(4 * H, 5, 1),
    c0 = draw<float>(B * H, 6, 1);
    dh_n = draw<float>(B * H, 7, 1), dc_n = draw<float>(B * H, 8, 1);
  }
  int64_t time_of(int64_t step) const { return reverse ? T - 1 - step : step; }
  bool active(int64_t t, int64_t b) const { return !with_lengths || t < lengths[b]; }
};

struct Results {
  Doubles y, h_n, c_n, dgates, dh0, dc0;
};

template <class S>
Results in_doubles(const Problem<S>& p) {
  const int64_t T = p.T, B = p.B, H = p.H, N = B * H;
  const Doubles w = widened(p.w);
  Doubles h = widened(p.h0), c = widened(p.c0);
  Results r{Doubles(T * N), {}, {}, Doubles(T * N * 4), {}, {}};
  std::vector<LstmCell<double>> cells(T * N);
  std::vector<Doubles> c_before(T);
  for (int64_t step = 0; step < T; ++step) {
    const int64_t t = p.time_of(step);
    const Doubles h_before = h;
    c_before[step] = c;
    for (int64_t b = 0; b < B; ++b)
      for (int64_t u = 0; u < H; ++u) {
        if (!p.active(t, b)) continue;
        double a[4];
        for (int g = 0; g < 4; ++g) {
          a[g] = p.projected[((t * B + b) * 4 + g) * H + u] + p.bias[g * H + u];
          for (int64_t k = 0; k < H; ++k) a[g] += h_before[b * H + k] * w[(g * H + u) * H + k];
        }
        const auto s = cells[step * N + b * H + u] = lstm_cell_forward(a[0], a[1], a[2], a[3], c[b * H + u]);
        c[b * H + u] = s.c, h[b * H + u] = r.y[t * N + b * H + u] = s.h;
      }
  }
  r.h_n = h, r.c_n = c;
  Doubles dh = widened(p.dh_n), dc = widened(p.dc_n);
  for (int64_t step = T - 1; step >= 0; --step) {
    const int64_t t = p.time_of(step);
    for (int64_t b = 0; b < B; ++b) {
      if (!p.active(t, b)) continue;
      double* d = &r.dgates[(t * B + b) * 4 * H];
      for (int64_t u = 0; u < H; ++u) {
        const auto& s = cells[step * N + b * H + u];
        const double dy = value(p.dy[t * N + b * H + u]);
        const auto grad = lstm_cell_backward(s.i, s.f, s.g, s.o, c_before[step][b * H + u], s.c,
                                             dh[b * H + u] + dy, dc[b * H + u]);
        d[u] = grad.a_i, d[H + u] = grad.a_f, d[2 * H + u] = grad.a_g, d[3 * H + u] = grad.a_o;
        dc[b * H + u] = grad.c_prev;
      }
      for (int64_t k = 0; k < H; ++k) {
        dh[b * H + k] = 0;
        for (int64_t row = 0; row < 4 * H; ++row) dh[b * H + k] += d[row] * w[row * H + k];
      }
    }
  }
  r.dh0 = dh, r.dc0 = dc;
  return r;
}

template <class S>
LstmSteps steps_of(const Problem<S>& p, Direction direction, const DeviceLimits& card,
                   std::vector<Flag>& flags) {
  const LstmPlan plan = plan_lstm(p.B, p.H, p.kDtype, /*tf32=*/true, direction, card);
  CHECK(plan.fits(), "%s", plan.why_not.c_str());
  const bool clusters = direction == Direction::backward && card.clusters;
  CHECK(plan.split.clusters == clusters, "clusters: %d", plan.split.clusters);
  flags.assign(plan.split.flags(), Flag());
  return {plan.split,
          p.T,
          padded_units(p.H),
          p.reverse,
          p.with_lengths ? p.lengths.data() : nullptr,
          {p.w.data(), p.kDtype, p.H},
          Mask(),
          flags.data()};
}

template <class S>
Results persistent(const Problem<S>& p, const DeviceLimits& card) {
  const int64_t N = p.B * p.H, rows = p.T * p.B, units = padded_units(p.H);
  std::vector<S> y(p.T * N), h_n(N), c_n(N), dgates(p.T * N * 4), dh0(N), dc0(N), gates(rows * 4 * units);
  Floats cells(rows * units);
  std::vector<Flag> flags;
  LstmPersistentForward f;
  f.steps = steps_of(p, Direction::forward, card, flags);
  std::vector<S> exchange(f.steps.split.exchange_elements());
  f.projected = {const_cast<float*>(p.projected.data()), DType::f32, p.B * 4 * p.H, 4 * p.H};
  f.bias = p.bias.data(), f.c0 = p.c0.data();
  f.h0 = {p.h0.data(), p.kDtype, p.H};
  f.y = {y.data(), p.kDtype, N, p.H};
  f.gates = gates.data(), f.cells = cells.data(), f.h_n = h_n.data(), f.c_n = c_n.data();
  f.exchange = exchange.data();
  lstm_persistent(f, nullptr);

  LstmPersistentBackward b;
  b.steps = steps_of(p, Direction::backward, card, flags);
  exchange.assign(b.steps.split.exchange_elements(), S{});
  Floats sums(b.steps.split.sums_elements(), NAN);
  b.dy = {const_cast<S*>(p.dy.data()), p.kDtype, N, p.H};
  b.dh_n = p.dh_n.data(), b.dc_n = p.dc_n.data(), b.c0 = p.c0.data();
  b.gates = gates.data(), b.cells = cells.data();
  b.dgates = {dgates.data(), p.kDtype, 4 * N, 4 * p.H};
  b.dh0 = dh0.data(), b.dc0 = dc0.data(), b.exchange = exchange.data(), b.sums = sums.data();
  lstm_persistent_backward(b, nullptr);
  return {widened(y), widened(h_n), widened(c_n), widened(dgates), widened(dh0), widened(dc0)};
}

// Of the largest value there is: two roundings to bf16 (2^-8 each), or to TF32 (2^-11).
template <class S>
void check_same(const Doubles& a, const Doubles& b, const char* what) {
  double largest = 0, error = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    CHECK(std::isfinite(a[i]), "%s[%zu] is not finite", what, i);
    largest = std::fmax(largest, std::abs(b[i])), error = std::fmax(error, std::abs(a[i] - b[i]));
  }
  CHECK(error <= largest / (sizeof(S) == 2 ? 128 : 1024), "%s: error %g of values up to %g", what, error,
        largest);
}

template <class S>
void check_problem(const DeviceLimits& card, int64_t T, int64_t B, int64_t H, bool reverse) {
  const Problem<S> p(T, B, H, reverse, /*with_lengths=*/(B + reverse) % 2 == 0);
  const Results ours = persistent(p, card), truth = in_doubles(p);
  check_same<S>(ours.y, truth.y, "y"), check_same<S>(ours.h_n, truth.h_n, "h_n");
  check_same<S>(ours.c_n, truth.c_n, "c_n"), check_same<S>(ours.dgates, truth.dgates, "dgates");
  check_same<S>(ours.dh0, truth.dh0, "dh0"), check_same<S>(ours.dc0, truth.dc0, "dc0");
  if (sizeof(S) == 2 || B < 18) return;
  const auto rounded = [](double v) { return tf32_on_cpu(static_cast<float>(v)) == v; };
  for (const Doubles& kept : {ours.y, ours.h_n, ours.c_n, ours.dgates})
    CHECK(!std::all_of(kept.begin(), kept.end(), rounded), "what is no operand is rounded to TF32");
}

}  // namespace

int main() {
  const auto clusters = [](const LstmSplit&) { return 3; };
  const DeviceLimits few{4, 232448, 90, true}, some{13, 101376, 86, true}, many{132, 232448, 90, true};
  const DeviceLimits one_group{4, 232448, 90, true, clusters}, groups{13, 232448, 90, true, clusters};
  for (const DeviceLimits& card : {few, some, many, one_group, groups})
    for (const auto& [T, B, H] : {std::tuple<int, int, int>{1, 1, 1}, {3, 18, 16}, {4, 33, 31}, {3, 70, 33}})
      for (const bool reverse : {false, true}) {
        check_problem<bf16>(card, T, B, H, reverse);
        check_problem<float>(card, T, B, H, reverse);
      }
  const DeviceLimits wide{20, 232448, 90, true};  // H so large that all warps have chunks of K
  check_problem<bf16>(wide, 2, 17, 260, false), check_problem<float>(wide, 2, 17, 260, false);
}
