#include <torch/csrc/stable/library.h>

#include <string>

#include "../kernels/cpu/kernels.h"

namespace ulmfit_fast {
namespace {

std::string cpu_isa() { return kernels().isa; }
std::string cpu_isas() { return available_isas(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace ulmfit_fast
