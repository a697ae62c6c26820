#include "../kernels/cpu/workspace.h"

#include "glue.h"

namespace ulmfit_fast {
namespace {

int64_t release_workspace() { return workspace_release(); }

Tensor lent_like(const Tensor& t) {
  return torch::stable::view(lent(t, {t.numel()}, t.scalar_type()), t.sizes());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CompositeExplicitAutograd, m) {
  m.impl("release_workspace", TORCH_BOX(&release_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) { m.impl("lent_like", TORCH_BOX(&lent_like)); }

}  // namespace ulmfit_fast
