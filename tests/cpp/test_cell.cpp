// The LSTM cell in doubles: forward against torch.nn.LSTM's formulas, backward against central differences.
#include "check.h"

namespace ulmfit_fast {
inline double sigmoid_(double x) { return 1 / (1 + std::exp(-x)); }
inline double tanh_(double x) { return std::tanh(x); }
}  // namespace ulmfit_fast
#include "kernels/lstm_cell.h"

using namespace ulmfit_fast;

struct Point {
  double a[4], c_prev;  // pre-activations i, f, g, o
};
LstmCell<double> forward(const Point& x) {
  return lstm_cell_forward(x.a[0], x.a[1], x.a[2], x.a[3], x.c_prev);
}

int main() {
  const std::vector<double> r = random_values<double>(7 * 100, 1, 3.0);
  for (int sample = 0; sample < 100; ++sample) {
    const double* v = &r[7 * sample];
    const Point x = {{v[0], v[1], v[2], v[3]}, v[4]};
    const double dh = v[5], dc = v[6];
    const LstmCell<double> s = forward(x);

    const double i = 1 / (1 + std::exp(-v[0])), f = 1 / (1 + std::exp(-v[1])), g = std::tanh(v[2]);
    const double o = 1 / (1 + std::exp(-v[3])), c = f * v[4] + i * g;
    CHECK(close(s.c, c, 1e-14) && close(s.h, o * std::tanh(c), 1e-14), "c %g, not %g", s.c, c);

    const LstmCellGrad<double> d = lstm_cell_backward(s.i, s.f, s.g, s.o, x.c_prev, s.c, dh, dc);
    const double got[5] = {d.a_i, d.a_f, d.a_g, d.a_o, d.c_prev};
    for (int k = 0; k < 5; ++k) {
      const double eps = 1e-6;  // difference quotient: error about eps^2 + 1e-16 / eps
      Point up = x, down = x;
      (k < 4 ? up.a[k] : up.c_prev) += eps;
      (k < 4 ? down.a[k] : down.c_prev) -= eps;
      const LstmCell<double> p = forward(up), m = forward(down);
      const double expected = (dh * (p.h - m.h) + dc * (p.c - m.c)) / (2 * eps);
      CHECK(close(got[k], expected, 1e-8), "gradient %d is %g, not %g", k, got[k], expected);
    }
  }
}
