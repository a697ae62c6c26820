// Times a step of the persistent recurrence alone, bf16: lstm_parts H B T -> one line of JSON, microseconds.
// Built by lstm_parts.py, with parts of the kernels left out by ULMFIT_PERSISTENT_PARTS.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"

using namespace ulmfit_fast;
using namespace ulmfit_fast::cuda;

namespace {

constexpr int kWarmUp = 3, kRounds = 15;

// Scattered over +-scale: made on the device, as a layer has tens of millions of them.
template <class T>
__global__ void scatter(T* values, int64_t n, float scale) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const uint32_t bits =
        static_cast<uint32_t>(i + 1) * 2654435761u;  // golden ratio: no two neighbours alike
    values[i] = T(scale * (static_cast<float>(bits ^ bits >> 15) * 0x1p-31f - 1));
  }
}

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
  auto* values = static_cast<T*>(zeros(n * sizeof(T)));
  scatter<<<1024, 256>>>(values, n, scale);
  check("lstm", cudaGetLastError());
  return values;
}

// Median microseconds a step, of launches with fresh flags.
double time_steps(const LstmSteps& steps, const std::function<void()>& launch) {
  cudaEvent_t begin, end;
  check("lstm", cudaEventCreate(&begin));
  check("lstm", cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = 0; round < kWarmUp + kRounds; ++round) {
    check("lstm", cudaMemsetAsync(steps.flags, 0, steps.split.flags() * sizeof(Flag)));
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
  auto* flags = static_cast<Flag*>(zeros(plan.split.flags() * sizeof(Flag)));
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
