// What every x86-64 (and any other CPU the compiler knows) can run: 128-bit vectors, no FMA.
#include "std.h"

#define ULMFIT_ISA baseline
#define ULMFIT_LANES 4
#include "isa.inl"

namespace ulmfit_fast {
const Kernels& baseline_kernels() { return baseline::table(); }
}  // namespace ulmfit_fast
