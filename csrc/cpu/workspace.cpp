#include "../kernels/cpu/workspace.h"

#include <torch/csrc/stable/library.h>

namespace ulmfit_fast {
namespace {

int64_t release_workspace() { return workspace_release(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CompositeExplicitAutograd, m) {
  m.impl("release_workspace", TORCH_BOX(&release_workspace));
}

}  // namespace ulmfit_fast
