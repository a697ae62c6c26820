#include "../kernels/cpu/workspace.h"

#include "glue.h"

namespace ulmfit_fast {
namespace {

int64_t release_workspace() { return workspace_release(); }

// t: a vector or a matrix. Not a view of a flat tensor: autograd adds to a gradient in place only where
// nothing else holds its memory.
Tensor lent_like(const Tensor& t) {
  check_dim("lent_like", "t", t, t.dim() == 2 ? 2 : 1);
  if (t.dim() == 2) return lent(t, {t.size(0), t.size(1)}, t.scalar_type());
  return lent(t, {t.size(0)}, t.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CompositeExplicitAutograd, m) {
  m.impl("release_workspace", TORCH_BOX(&release_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) { m.impl("lent_like", TORCH_BOX(&lent_like)); }

}  // namespace ulmfit_fast
