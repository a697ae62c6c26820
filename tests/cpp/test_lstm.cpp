// The whole LSTM kernel, forward and backward, for every instruction set this machine has: against plain
// loops in doubles, with DropConnect, lengths and both directions; and equal to the bit for 1, 3 and 11
// threads.
#include "check.h"
#include "kernels/philox.h"

using namespace ulmfit_fast;

template <class T>
struct Problem {
  int64_t T_, B, I, H;
  bool reverse;
  std::vector<int64_t> lengths;
  std::vector<T> x, h0, c0, w_ih, w_hh, b_ih, b_hh;
  double p = 0.4;
  uint64_t seed = 77;

  Problem(int64_t T_, int64_t B, int64_t I, int64_t H, bool reverse, bool ragged)
      : T_(T_),
        B(B),
        I(I),
        H(H),
        reverse(reverse),
        x(random_values<T>(T_ * B * I, 1)),
        h0(random_values<T>(B * H, 2)),
        c0(random_values<T>(B * H, 3)),
        w_ih(random_values<T>(4 * H * I, 4, 1 / std::sqrt(I))),
        w_hh(random_values<T>(4 * H * H, 5, 1 / std::sqrt(H))),
        b_ih(random_values<T>(4 * H, 6)),
        b_hh(random_values<T>(4 * H, 7)) {
    for (int64_t b = 0; b < B; ++b) lengths.push_back(ragged ? (b * 3 + 1) % (T_ + 1) : T_);
  }
  LstmShape shape() const { return {T_, B, I, H, reverse, lengths.data(), seed, p}; }
};

template <class T>
constexpr DType dtype = std::is_same_v<T, double> ? DType::f64 : DType::f32;

template <class T>
struct Result {
  std::vector<T> y, h_n, c_n, gates, cells, dx, dh0, dc0, dw_ih, dw_hh, db;
  bool operator==(const Result&) const = default;
};

template <class T>
Result<T> run(const Kernels& table, Problem<T>& q, int count) {
  const int64_t N = q.T_ * q.B, G = 4 * q.H;
  const std::vector<T> dy = random_values<T>(N * q.H, 8), dh_n = random_values<T>(q.B * q.H, 9);
  Result<T> r;
  r.y.resize(N * q.H), r.gates.resize(N * 4 * padded_units(q.H)), r.cells.resize(N * padded_units(q.H)),
      r.h_n.resize(q.B * q.H), r.c_n.resize(q.B * q.H);
  r.dx.resize(N * q.I), r.dh0.resize(q.B * q.H), r.dc0.resize(q.B * q.H);
  r.dw_ih.resize(G * q.I), r.dw_hh.resize(G * q.H), r.db.resize(G);
  const auto sequence = [&](auto& v, int64_t width) {
    return Sequence{const_cast<T*>(v.data()), dtype<T>, q.B * width, width};
  };
  const auto matrix = [](auto& v, int64_t width) { return Matrix{v.data(), dtype<T>, width}; };

  LstmForward f{};
  f.shape = q.shape();
  f.x = sequence(q.x, q.I), f.y = sequence(r.y, q.H);
  f.h0 = matrix(q.h0, q.H), f.c0 = matrix(q.c0, q.H), f.w_ih = matrix(q.w_ih, q.I),
  f.w_hh = matrix(q.w_hh, q.H);
  f.b_ih = q.b_ih.data(), f.b_hh = q.b_hh.data();
  f.h_n = r.h_n.data(), f.c_n = r.c_n.data(), f.gates = r.gates.data(), f.cells = r.cells.data();
  table.lstm(f, threads(count));

  LstmBackward b{};
  b.shape = q.shape();
  b.dy = sequence(dy, q.H), b.dh_n = matrix(dh_n, q.H), b.dc_n = {nullptr, dtype<T>, q.H};
  b.x = f.x, b.y = f.y, b.h0 = f.h0, b.c0 = f.c0, b.w_ih = f.w_ih, b.w_hh = f.w_hh;
  b.gates = r.gates.data(), b.cells = r.cells.data();
  b.dx = sequence(r.dx, q.I), b.dh0 = r.dh0.data(), b.dc0 = r.dc0.data();
  b.dw_ih = r.dw_ih.data(), b.dw_hh = r.dw_hh.data(), b.db = r.db.data();
  table.lstm_backward(b, threads(count));
  return r;
}

// sum(dy * y) + sum(dh_n * h_n), and y, by the definition.
template <class T>
double definition(const Problem<T>& q, std::vector<double>& y) {
  const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
  const std::vector<T> dy = random_values<T>(q.T_ * q.B * q.H, 8), dh_n = random_values<T>(q.B * q.H, 9);
  const Dropout drop(q.seed, q.p);
  std::vector<double> w(4 * q.H * q.H);
  for (size_t e = 0; e < w.size(); ++e) w[e] = drop.kept(e) ? q.w_hh[e] * drop.scale : 0;
  y.assign(q.T_ * q.B * q.H, 0);
  double objective = 0;
  for (int64_t b = 0; b < q.B; ++b) {
    std::vector<double> h(&q.h0[b * q.H], &q.h0[b * q.H] + q.H), c(&q.c0[b * q.H], &q.c0[b * q.H] + q.H);
    for (int64_t step = 0; step < q.lengths[b]; ++step) {
      const int64_t t = q.reverse ? q.lengths[b] - 1 - step : step;
      const std::vector<double> before = h;
      for (int64_t j = 0; j < q.H; ++j) {
        double a[4];
        for (int64_t gate = 0; gate < 4; ++gate) {
          const int64_t row = gate * q.H + j;
          a[gate] = static_cast<double>(q.b_ih[row]) + q.b_hh[row];
          for (int64_t k = 0; k < q.I; ++k)
            a[gate] += static_cast<double>(q.w_ih[row * q.I + k]) * q.x[(t * q.B + b) * q.I + k];
          for (int64_t k = 0; k < q.H; ++k) a[gate] += w[row * q.H + k] * before[k];
        }
        c[j] = sigmoid(a[1]) * c[j] + sigmoid(a[0]) * std::tanh(a[2]);
        h[j] = sigmoid(a[3]) * std::tanh(c[j]);
        y[(t * q.B + b) * q.H + j] = h[j];
        objective += h[j] * dy[(t * q.B + b) * q.H + j];
      }
    }
    for (int64_t j = 0; j < q.H; ++j) objective += h[j] * dh_n[b * q.H + j];
  }
  return objective;
}

// Central differences of the definition, at a few elements of each input.
void check_gradients(const Kernels& table, Problem<double> q) {
  const Result<double> r = run(table, q, 1);
  const struct {
    const char* name;
    std::vector<double>& value;
    const std::vector<double>& gradient;
  } inputs[] = {{"x", q.x, r.dx},          {"h0", q.h0, r.dh0},       {"c0", q.c0, r.dc0},
                {"w_ih", q.w_ih, r.dw_ih}, {"w_hh", q.w_hh, r.dw_hh}, {"b_ih", q.b_ih, r.db}};
  std::vector<double> y;
  for (const auto& input : inputs)
    for (size_t e = 0; e < input.value.size(); e += 1 + input.value.size() / 7) {
      const double kept = input.value[e], eps = 1e-5;
      input.value[e] = kept + eps;
      const double up = definition(q, y);
      input.value[e] = kept - eps;
      const double down = definition(q, y);
      input.value[e] = kept;
      CHECK(close(input.gradient[e], (up - down) / (2 * eps), 1e-7), "%s: d%s[%zu] is %g, not %g", table.isa,
            input.name, e, input.gradient[e], (up - down) / (2 * eps));
    }
}

template <class T>
void check_forward(const Kernels& table, Problem<T> q, double tolerance) {
  const Result<T> one = run(table, q, 1);
  std::vector<double> y;
  definition(q, y);
  for (size_t e = 0; e < y.size(); ++e)
    CHECK(close(one.y[e], y[e], tolerance), "%s: y[%zu] is %g, not %g", table.isa, e,
          static_cast<double>(one.y[e]), y[e]);
  for (int count : {3, 11})
    CHECK(one == run(table, q, count), "%s: %d threads give other bits than 1", table.isa, count);
}

int main() {
  for (const Kernels* table : every_isa())
    for (bool reverse : {false, true})
      for (bool ragged : {false, true}) {
        check_gradients(*table, Problem<double>(5, 3, 4, 6, reverse, ragged));
        for (int64_t H : {1, 17, 70}) {
          check_forward(*table, Problem<double>(6, 5, 9, H, reverse, ragged), 1e-13);
          // fp32: 2^-24 relative for each of about H + I additions, through 6 steps; exp and tanh below 2 ulp
          check_forward(*table, Problem<float>(6, 5, 9, H, reverse, ragged), 1e-5);
        }
        // rows enough to be shared out too
        check_forward(*table, Problem<float>(4, 65, 9, 33, reverse, ragged), 1e-5);
        // and so much dropped that it is left out where there is AVX-512; longer sums, fewer steps
        check_forward(*table, Problem<float>(3, 64, 9, 260, reverse, ragged), 1e-5);
      }
}
