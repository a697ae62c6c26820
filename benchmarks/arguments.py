"""The options of the speed programs."""

import argparse
import sys
from pathlib import Path

import torch

import ulmfit_fast as uf

from . import gpu
from .record import RESULTS

ON_CPU = {  # the precisions measured there: for which instruction sets by default, None being all
    "fp32": None,
    "high": ("amx",),  # the others compute it by the kernels of fp32
    "bf16": ("amx", "avx512bf16"),  # the others multiply it as float32, and torch takes minutes
}
OPS_ON_CPU = ("fp16", "fp64")  # of single ops only, where asked for: fp16 has no instructions of its own here
QUICK = {"preset": "small", "batch": [16], "repeats": 2}
GPU_REPEATS = 11  # rounds; each is the median of several calls


def options(doc, on_gpu, also_on_cpu=(), **defaults):
    """The options that every speed program has.

    on_gpu: the precisions that it measures there; also_on_cpu: those that it has on a CPU beside ON_CPU's.
    `defaults` replaces some of the options' values.
    """
    p = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--preset", choices=["ulmfit", "small", "tiny"], default="ulmfit", help="model sizes")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    on_cpu = [precision for precision, isas in ON_CPU.items() if isas is None or uf.info().isa in isas]
    p.add_argument(
        "--precision",
        nargs="+",
        choices=dict.fromkeys([*ON_CPU, *also_on_cpu, *on_gpu]),
        default=on_cpu,
        help=f"of ours and the peers; on a GPU the default is {' '.join(on_gpu)}",
    )
    p.add_argument("--batch", nargs="+", type=positive, default=[64], help="sequences")
    p.add_argument("--bptt", type=positive, default=72, help="time steps")
    p.add_argument("--threads", nargs="+", type=positive, default=[torch.get_num_threads()])
    p.add_argument(
        "--repeats", type=positive, default=4, help=f"counted rounds; on a GPU the default is {GPU_REPEATS}"
    )
    p.add_argument(
        "--keep-l2", action="store_true", help="on a GPU: do not write over its L2 cache before each call"
    )
    p.add_argument("--quick", action="store_true", help="preset small, batch 16, two rounds, unless given")
    p.add_argument("--results", type=Path, default=RESULTS, help="where the records go")
    p.set_defaults(on_gpu=on_gpu, on_cpu=[*ON_CPU, *also_on_cpu], **defaults)
    return p


def add_slow_peers(parser):
    parser.add_argument(
        "--slow-peers", action="store_true", help="torch's bf16 LSTM without oneDNN too: minutes a call"
    )
    parser.add_argument("--slow-repeats", type=positive, default=1, help="counted rounds of the slow peers")


def parse(parser, argv=None):
    argv = sys.argv[1:] if argv is None else argv
    on_gpu = parser.get_default("on_gpu")
    if (_device_of(argv) or parser.get_default("device")) == "cuda":
        parser.set_defaults(precision=list(on_gpu), repeats=GPU_REPEATS)
    if "--quick" in argv:
        parser.set_defaults(**{k: v for k, v in QUICK.items() if parser.get_default(k) is not None})
    args = parser.parse_args(argv)
    absent = [p for p in args.precision if p not in (args.on_cpu if args.device == "cpu" else on_gpu)]
    if absent:
        parser.error(f"argument --precision: {absent[0]} is not measured with --device {args.device}")
    if args.device == "cuda":
        if gpu.missing():
            parser.error(f"argument --device: {gpu.missing()}")
        if len(args.threads) > 1:
            parser.error("argument --threads: one number with --device cuda, the host's threads")
        if getattr(args, "slow_peers", False):
            parser.error("argument --slow-peers: of the CPU alone")
    return args


def _device_of(argv):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--device")
    return first.parse_known_args(argv)[0].device


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)
