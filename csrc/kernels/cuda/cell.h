// The cell's maths for CUDA, and which steps of a sequence count: what the recurrence's kernels share.
#pragma once
#include "device.h"

ULMFIT_BEGIN

// For the cell, which is the CPU's too. Accurate to a few units in the last place. rcp.approx errs by one of
// them; a division would add a branch for tiny denominators, and here none is below 1.
ULMFIT_HD float sigmoid_(float x) {
  const float denominator = 1 + expf(-x);
#ifdef __CUDA_ARCH__
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(denominator));
  return reciprocal;
#else
  return 1 / denominator;
#endif
}
ULMFIT_HD double sigmoid_(double x) { return 1 / (1 + exp(-x)); }
ULMFIT_HD float tanh_(float x) { return tanhf(x); }
ULMFIT_HD double tanh_(double x) { return tanh(x); }

ULMFIT_END

#include "../lstm_cell.h"

namespace ulmfit_fast::cuda {

inline __device__ void check_length(int64_t length, int64_t T) {
  ULMFIT_DEVICE_CHECK(length >= 0 && length <= T,
                      "ulmfit_fast.lstm: lengths must be in 0..T, the number of time steps");
}

}  // namespace ulmfit_fast::cuda
