// The cell's maths for CUDA, and which steps of a sequence count: what the recurrence's kernels share.
#pragma once
#include "device.h"

ULMFIT_BEGIN

// For the cell, which is the CPU's too. Accurate ones: the step waits for memory, not for these.
ULMFIT_HD float sigmoid_(float x) { return 1 / (1 + expf(-x)); }
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
