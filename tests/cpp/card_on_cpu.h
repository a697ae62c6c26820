// The GPU that CUDA kernels find where they run on the CPU.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace ulmfit_fast::cuda {

// A pretended card, default an H200. ULMFIT_ON_CPU_CARD has these numbers in this order, at least two;
// without a third there are no clusters.
struct CardOnCpu {
  int multiprocessors = 132, kilobytes = 227;  // of shared memory that a block may have
  int clusters = 32;                           // at once
#ifdef ULMFIT_PTX_ON_CPU
  int compiled = ULMFIT_PTX_ON_CPU;  // 10 * the capability that the kernels were compiled for
#else
  int compiled = 90;
#endif
  unsigned granted = 1 << 20;           // blocks of a cooperative launch, whatever the numbers above promise
  unsigned granted_clusters = 1 << 20;  // and clusters of one
};
inline CardOnCpu card_on_cpu() {
  CardOnCpu card;
  if (const char* words = std::getenv("ULMFIT_ON_CPU_CARD")) {
    card.clusters = 0;
    if (std::sscanf(words, "%d,%d,%d,%d,%u,%u", &card.multiprocessors, &card.kilobytes, &card.clusters,
                    &card.compiled, &card.granted, &card.granted_clusters) < 2)
      throw std::runtime_error("ULMFIT_ON_CPU_CARD must be two to six numbers, like 132,227,32,90,132,32");
  }
  return card;
}

}  // namespace ulmfit_fast::cuda
