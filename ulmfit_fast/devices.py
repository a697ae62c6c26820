"""Where a run takes place, and how its batches get there."""

import torch
from torch import Tensor


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """torch.device of `device`; None means CUDA where there is a GPU and the build has its kernels, else the
    CPU. ValueError for a device that this library has no kernels for, or that is not there.
    """
    if device is None:
        usable = torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
            "ulmfit_fast::lstm", "CUDA"
        )
        return torch.device("cuda" if usable else "cpu")
    chosen: torch.device | None
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be None, 'cpu', 'cuda' or one GPU such as 'cuda:1', got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch sees no CUDA device here; use 'cpu'")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ValueError(f"device={device!r}, but torch sees only cuda:0 to cuda:{last} here")
    return chosen


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host does not wait for the copy to a GPU, but in a compiled graph: torch's
    tracing knows no pinned memory.
    """
    to_a_gpu = device.type == "cuda" and tensor.device.type == "cpu"
    if to_a_gpu and not torch.compiler.is_compiling():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
