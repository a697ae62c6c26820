"""The memory that one call adds at its peak."""

import ctypes
import gc
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from . import gpu


def peak(build, small, full, threads, device="cpu"):
    """MB that one call adds at its peak; build(sizes) returns the call.

    On the CPU to the resident memory of a fresh process (None where Linux hides it), so build and sizes can
    be pickled. A call with the sizes `small` comes first, so that code and thread stacks are there already.
    What a library keeps between calls counts as its own: nothing of the full size ran in that process before.
    On a GPU see `gpu.peak_memory`.
    """
    if device != "cpu":
        return gpu.peak_memory(build(full))
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    # forked from a server that has imported torch but run nothing: like a new process, but started faster
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.steps"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, build, small, full, threads).result()


def _peak(build, small, full, threads):
    torch.set_num_threads(threads)
    build(small)()
    call = build(full)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory that malloc keeps would hide as much of the growth
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, to the present VmRSS
    before = _status("VmRSS")
    call()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(field):
    """A field of /proc/self/status in kB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
