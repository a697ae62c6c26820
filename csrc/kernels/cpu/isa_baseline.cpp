// What every CPU the compiler knows can run: 128-bit vectors, with FMA on aarch64, without on x86-64.
#include "std.h"

#define ULMFIT_ISA baseline
#define ULMFIT_LANES 4
#include "isa.inl"

namespace ulmfit_fast {
const Kernels& baseline_kernels() { return baseline::table(); }
}  // namespace ulmfit_fast
