"""What a GPU says about itself for a record: name, versions, its measured rates, the memory of a call."""

import gc
import json
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

import ulmfit_fast

from .clocks import EventClock

REPEATS = 10
COPIED = 1 << 28  # float32 numbers of the measured copy: 1 GB, far more than caches hold


def missing():
    """Why no GPU can be used here, in a sentence, or None."""
    if torch.cuda.is_available():
        return None
    return (
        f"torch {torch.__version__} sees no CUDA device here: this needs an NVIDIA GPU, its driver "
        "and a CUDA build of torch"
    )


def description():
    """A record's facts about the GPU and what it was used through."""
    card, built = torch.cuda.get_device_properties("cuda"), ulmfit_fast.info()
    return {
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_gb": round(card.total_memory / 1e9, 1),
        "l2_mb": round(card.L2_cache_size / 1e6, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "kernels_cuda": built.cuda_built,
        "kernels_for": list(built.architectures),
        "kernels_commit": built.commit,
    }


def _driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def trace(call):
    """The events of a call, on the host and on the GPU, as torch.profiler writes them."""
    torch.cuda.synchronize()  # what was queued before is not part of it
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def longest_kernels(events, count=4):
    """Names of the kernels that took longest in a trace: they tell which algorithm a library chose."""
    us = defaultdict(float)
    for event in events:
        if event.get("cat") == "kernel" and event.get("ph") == "X":
            us[event["name"]] += event["dur"]
    return [name[:200] for name in sorted(us, key=us.get, reverse=True)[:count]]


def measure_roof(quick, settings, shapes):
    """GFLOP/s of torch.mm and GB/s of a copy, best of several.

    settings: {precision: (dtype, context of the settings it is measured with)}; "high" is TF32 here. The
    rates are those of a large square product; products has TFLOP/s at `shapes`, {name: (m, k, n)}.
    """
    clock, size = EventClock(ahead=True), 1024 if quick else 8192
    rates, tables = {}, {name: {} for name in shapes}
    for precision, (dtype, context) in settings.items():
        with context:
            rates[f"{precision}_gflops"] = round(_product_rate(clock, dtype, size, size, size), 1)
            for name, shape in shapes.items():
                tables[name][precision] = round(_product_rate(clock, dtype, *shape) / 1e3, 1)
    source = torch.ones(COPIED >> (4 if quick else 0), device="cuda")
    target = torch.zeros_like(source)
    rates["copy_gb_s"] = round(2 * source.nbytes / _best(clock, lambda: target.copy_(source)) / 1e9, 1)
    return rates | {"square": size, "products_tflops": tables}


def _product_rate(clock, dtype, m, k, n):
    """GFLOP/s. On random numbers of both signs: on zeros a GPU is faster than on data."""
    a, b = (torch.randn(size, device="cuda").to(dtype) for size in ((m, k), (k, n)))
    out = torch.empty(m, n, device="cuda", dtype=dtype)
    return 2 * m * k * n / _best(clock, lambda: torch.mm(a, b, out=out)) / 1e9


def _best(clock, call):
    def run(mark):
        begin = mark()
        call()
        return begin, mark()

    plan = clock.warm_up(run)
    return min(clock.sample(run, plan) for _ in range(REPEATS))


def peak_memory(call):
    """MB that one call adds at its peak to what torch has allocated on the GPU. An earlier call has been
    made, so that what libraries allocate once is there already.
    """
    call()
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
