"""What this build and this GPU are, and how the persistent recurrence would be split over it.

python -m benchmarks.on_gpu_check exits with 1 unless the package has CUDA kernels that this GPU can run.
"""

import sys

import torch

import ulmfit_fast as uf
from ulmfit_fast._info import runs_on

LAYER = (72, 64, 400), 1152  # the largest of the ulmfit preset: x (T, B, I), hidden units


def main():
    facts = uf.info()
    print(facts)
    if not (facts.cuda_built and runs_on(facts.architectures, torch.cuda.get_device_capability())):
        return 1
    shape, hidden = LAYER
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    for name, backward in {"forward": False, "backward": True}.items():
        plan = torch.ops.ulmfit_fast.lstm_plan(x, hidden, False, backward)
        print(f"H {hidden}, batch {shape[1]}, bf16, {name}: {plan}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
