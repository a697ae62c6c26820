"""Where a run takes place, and how its batches get there."""

import torch


def pick_device(device=None):
    """torch.device of `device`; None means CUDA where there is a GPU and the build has its kernels, else the
    CPU.
    """
    if device is None:
        usable = torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
            "ulmfit_fast::lstm", "CUDA"
        )
        return torch.device("cuda" if usable else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be one of torch's, for example 'cpu' or 'cuda', got {device!r}"
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch sees no CUDA device here; use 'cpu'")
    return chosen


def to_device(tensor, device):
    """`tensor` on `device`; the host does not wait for the copy to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
