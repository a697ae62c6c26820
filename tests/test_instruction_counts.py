"""Instructions of the kernels for each vector of their products, as callgrind counts them: no clock is asked.

AVX2's kernels, which are the widest that valgrind knows: one source makes all of them. What packs an operand
twice, or a loop that the compiler no longer makes of vectors, shows here.
"""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import ulmfit_fast as uf

kernels = pytest.importorskip("ulmfit_fast._kernels", reason="built by editable and in-place builds alone")
pytestmark = pytest.mark.cpu_only("instructions of the CPU")
if "avx2" not in kernels.isas().split(",") or not all(map(shutil.which, ("valgrind", "callgrind_annotate"))):
    pytest.skip("needs AVX2 and valgrind", allow_module_level=True)

LANES = 8
# op: how many products of one size; instructions for each fused multiply-add of a vector in GCC 12's code.
# Twelve of them come with 4 loads and 3 broadcasts at the least: 1.6.
OPS = {"lstm_forward": (1, 2.73), "lstm_backward": (2, 2.70), "linear_cross_entropy": (3, 2.53)}
IN_MICRO_KERNELS = 2.05
GCC_12 = re.fullmatch(r"[cg]\+\+.*\) 12\.[\d.]+", uf.info().compiler)
SLACK = 1.05 if GCC_12 else 1.25  # compilers differ


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """({op: its multiply-adds of whole vectors}, {function: instructions in it and in what it calls})"""
    out = tmp_path_factory.mktemp("callgrind") / "out"
    folders = [str(pathlib.Path(file).parent) for file in (__file__, kernels.__file__)]
    probe = f"import sys; sys.path[:0] = {folders}; import instruction_probe"
    toggles = [f"--toggle-collect=*avx2::{op}<*" for op in OPS]
    valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--collect-atstart=no"]
    command = [*valgrind, *toggles, sys.executable, "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    products = dict(zip(("lstm", "linear"), map(int, done.stdout.split()), strict=True))
    vectors = {op: times * products[op.partition("_")[0]] / LANES for op, (times, _) in OPS.items()}
    table = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(out)]
    text = subprocess.run(table, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^ *([\d,]+) \([^)]*\) +\S*?:(.*avx2::.*)$", text, re.M)
    return vectors, {name: int(count.replace(",", "")) for count, name in lines}


@pytest.mark.parametrize("op", OPS)
def test_an_op(measured, op):
    vectors, counts = measured
    (count,) = (n for name, n in counts.items() if f" ulmfit_fast::avx2::{op}<" in name.partition("(")[0])
    assert vectors[op] < count < SLACK * OPS[op][1] * vectors[op]


def test_the_micro_kernels(measured):
    vectors, counts = measured
    count = sum(n for name, n in counts.items() if "FmaTile<float>::micro_m<" in name.partition("(")[0])
    assert sum(vectors.values()) < count < SLACK * IN_MICRO_KERNELS * sum(vectors.values())
