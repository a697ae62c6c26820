"""What a CPU can do at best: products in each precision, and a copy."""

import functools
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy
import torch

import ulmfit_fast as uf

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def of_cpu(quick, more=()):
    """{"fp32_gflops": ..., "bf16_gflops": ..., "high_gflops": ..., "copy_gb_s": ...}, the best of several.

    Products: the faster of torch.mm of large matrices and of our micro-kernels on operands in cache.
    more: "fp16" and "fp64" where their rates are wanted too.
    """
    rates, repeats = {}, 3 if quick else 10
    for name in ("fp32", "bf16", *more):
        size, dtype = 1024 if quick else 2048, DTYPES[name]
        if not torch_has(dtype):
            size = 256  # eleven larger ones take minutes
        a, b, out = (torch.rand(size, size).to(dtype) for _ in range(3))
        seconds = _best(lambda a=a, b=b, o=out: torch.mm(a, b, out=o), repeats)
        rates[f"{name}_gflops"] = max(2 * size**3 / seconds / 1e9, _in_cache(name, repeats))
    rates["high_gflops"] = max(rates["fp32_gflops"], rates["bf16_gflops"] / 3, _in_cache("high", repeats))
    source = torch.ones(1 << 26)  # 256 MB: more than the caches hold
    target = torch.zeros_like(source)
    rates["copy_gb_s"] = 2 * source.nbytes / _best(lambda: target.copy_(source), repeats) / 1e9
    return {name: round(rate, 1) for name, rate in rates.items()}


def torch_has(dtype):
    """Whether torch computes this dtype here by a library. 16 bits are oneDNN's where it can; elsewhere, such
    as where AVX2 is the best there is, torch's own plain loops do it.
    """
    if dtype.itemsize > 2:
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return (
        torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
    )


def _in_cache(precision, repeats):
    """GFLOP/s of our micro-kernels on operands in cache, in as many threads as torch has; 0 where not built.

    Those of "high" count as one product, though they are three.
    """
    try:
        from ulmfit_fast import _kernels
    except ImportError:  # no editable or in-place build
        return 0.0
    dtype = numpy.dtype({"bf16": "uint16", "fp16": "float16", "fp64": "float64"}.get(precision, "float32"))
    threads, blocks = torch.get_num_threads(), 500
    call = functools.partial(_kernels.multiply_in_cache, uf.info().isa, dtype, precision == "high", blocks)
    seconds = []
    # unpinned, two threads may share a core; pinned, they may get the two halves of one
    for pin in (None, _own_cpu()):
        with ThreadPoolExecutor(threads, initializer=pin) as pool:
            seconds.append(_best(lambda pool=pool: list(pool.map(lambda _: call(), range(threads))), repeats))
    return threads * call() / min(seconds) / 1e9


def _own_cpu():
    """What each thread calls to stay on a processor of its own; None where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cpus = itertools.cycle(sorted(os.sched_getaffinity(0)))
    return lambda: os.sched_setaffinity(0, {next(cpus)})  # 0: the calling thread


def _best(call, repeats):
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
