// Times a step of the persistent recurrence alone, bf16: lstm_parts H B T -> one line of JSON, microseconds.
// Built by lstm_parts.py, with parts of the kernels left out by ULMFIT_PERSISTENT_PARTS.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"

using namespace ulmfit_fast;
using namespace ulmfit_fast::cuda;

namespace {

constexpr int kWarmUp = 3, kRounds = 15;

// Device memory that lives as long as the program: bytes of zeros, or n random numbers within +-scale.
void* zeros(int64_t bytes) {
  if (bytes == 0) return nullptr;
  void* memory = nullptr;
  check("lstm", cudaMalloc(&memory, bytes));
  check("lstm", cudaMemset(memory, 0, bytes));
  return memory;
}
template <class T>
T* random_numbers(int64_t n, float scale) {
  static std::mt19937 generator(1);
  std::uniform_real_distribution<float> uniform(-scale, scale);
  std::vector<T> values(n);
  for (T& v : values) v = T(uniform(generator));
  void* memory = zeros(n * sizeof(T));
  check("lstm", cudaMemcpy(memory, values.data(), n * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(memory);
}

// Median microseconds a step, of launches with fresh flags.
double time_steps(const LstmSteps& steps, const std::function<void()>& launch) {
  cudaEvent_t begin, end;
  check("lstm", cudaEventCreate(&begin));
  check("lstm", cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = 0; round < kWarmUp + kRounds; ++round) {
    check("lstm", cudaMemsetAsync(steps.flags, 0, steps.split.flags() * sizeof(unsigned)));
    check("lstm", cudaEventRecord(begin));
    launch();
    check("lstm", cudaEventRecord(end));
    check("lstm", cudaEventSynchronize(end));
    float ms = 0;
    check("lstm", cudaEventElapsedTime(&ms, begin, end));
    if (round >= kWarmUp) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return 1e3 * times[times.size() / 2] / steps.T;
}

LstmSteps make_steps(int64_t T, int64_t B, int64_t H, Direction direction) {
  const LstmPlan plan = plan_lstm(B, H, DType::bf16, /*tf32=*/false, direction, device_limits());
  if (!plan.fits()) throw std::runtime_error(plan.why_not);
  const float scale = 1 / std::sqrt(static_cast<float>(H));
  const Matrix w = {random_numbers<__nv_bfloat16>(4 * H * H, scale), DType::bf16, H};
  auto* flags = static_cast<unsigned*>(zeros(plan.split.flags() * sizeof(unsigned)));
  return {plan.split, T, padded_units(H), false, nullptr, w, Mask(), flags};
}

double time_forward(int64_t T, int64_t B, int64_t H) {
  LstmPersistentForward a;
  a.steps = make_steps(T, B, H, Direction::forward);
  const int64_t rows = T * B, units = a.steps.units;
  a.projected = {random_numbers<float>(rows * 4 * H, 1), DType::f32, B * 4 * H, 4 * H};
  a.bias = random_numbers<float>(4 * H, 1);
  a.h0 = {random_numbers<__nv_bfloat16>(B * H, 1), DType::bf16, H};
  a.c0 = random_numbers<float>(B * H, 1);
  a.y = {zeros(2 * rows * H), DType::bf16, B * H, H};
  a.gates = zeros(2 * rows * 4 * units);
  a.cells = static_cast<float*>(zeros(4 * rows * units));
  a.h_n = zeros(2 * B * H), a.c_n = zeros(2 * B * H);
  a.exchange = zeros(2 * a.steps.split.exchange_elements());
  return time_steps(a.steps, [&] { lstm_persistent(a, nullptr); });
}

double time_backward(int64_t T, int64_t B, int64_t H) {
  LstmPersistentBackward a;
  a.steps = make_steps(T, B, H, Direction::backward);
  const int64_t rows = T * B, units = a.steps.units;
  a.dy = {random_numbers<__nv_bfloat16>(rows * H, 1), DType::bf16, B * H, H};
  a.dh_n = random_numbers<float>(B * H, 1), a.dc_n = random_numbers<float>(B * H, 1);
  a.c0 = random_numbers<float>(B * H, 1);
  a.gates = random_numbers<__nv_bfloat16>(rows * 4 * units, 1);
  a.cells = random_numbers<float>(rows * units, 1);
  a.dgates = {zeros(2 * rows * 4 * H), DType::bf16, B * 4 * H, 4 * H};
  a.dh0 = zeros(2 * B * H), a.dc0 = zeros(2 * B * H);
  a.exchange = zeros(2 * a.steps.split.exchange_elements());
  a.sums = static_cast<float*>(zeros(4 * a.steps.split.sums_elements()));
  return time_steps(a.steps, [&] { lstm_persistent_backward(a, nullptr); });
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) return std::fprintf(stderr, "lstm_parts H B T\n"), 2;
  const int64_t H = std::atoll(words[1]), B = std::atoll(words[2]), T = std::atoll(words[3]);
  try {
    const double forward = time_forward(T, B, H), backward = time_backward(T, B, H);
    std::printf("{\"forward_us\": %.3f, \"backward_us\": %.3f}\n", forward, backward);
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
}
