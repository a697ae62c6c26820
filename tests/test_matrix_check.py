"""tools/matrix_check.py: what it reads out of a disassembly, and what it complains of."""

import pathlib
import sys

import pytest

TOOLS = pathlib.Path(__file__).parent.parent / "tools"
if not TOOLS.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(TOOLS))
import matrix_check  # noqa: E402

NAME = "_ZN4cuda51_GLOBAL__N__1d91a851_18_lstm_persistent_cu_6c8622lstm_persistent_kernelI{}Li1ELi2EEEvNS0_E"
CLUSTER = "_ZN4cuda27lstm_persistent_backward_kernelI{}Li1ELi2ENS0_13SumsInClusterEEEvNS0_22LstmPersistentE"
GOOD = ["LDG.E.128.STRONG.GPU R12, desc[UR6][R2.64]", "LDS.128 R4, [R8]"] + 4 * [
    "HMMA.16816.F32 R4, R4, R96, RZ"
]


def dump(dtype, instructions, name=NAME, architecture="sm_90"):
    lines = [f"arch = {architecture}", "\t\tFunction : _Zother_kernel", "        /*0000*/   LDL R1, [R1] ;"]
    lines += ["\t\tFunction : " + name.format(dtype)]
    return lines + [
        f"        /*{16 * i:04x}*/        @!P0 {op} ;  /* 0x0 */" for i, op in enumerate(instructions)
    ]


def complaints(dtype, instructions, name=NAME):
    ((key, counts),) = matrix_check.kernels(dump(dtype, instructions, name)).items()
    assert key == ("sm_90", name.format(dtype))
    return " | ".join(matrix_check.faults(key[1], counts))


def test_what_is_wrong_with_a_kernel():
    assert complaints("6__half", GOOD) == ""
    assert "0 of HMMA.1688.F32.TF32, at least 4" in complaints("f", GOOD)
    assert complaints("f", [*GOOD[:2], *4 * ["HMMA.1688.F32.TF32 R4, R4, R96, RZ"]]) == ""
    assert "0 of HMMA.16816.F32.BF16, at least 4" in complaints("13__nv_bfloat16", GOOD)
    assert "3 of HMMA.16816.F32, at least 4" in complaints("6__half", GOOD[:-1])
    assert "no 16-byte loads from L2" in complaints("6__half", GOOD[1:])
    assert "no 16-byte loads of weights" in complaints("6__half", GOOD[:1] + GOOD[2:])
    assert "2 of STL.S16: local memory" in complaints("6__half", [*GOOD, *2 * ["STL.S16 [R1], R0"]])
    assert "1 of LD.E.128" in complaints("6__half", [*GOOD, "LD.E.128 R4, [R8]"])


def test_what_is_wrong_with_a_cluster():
    good = [*GOOD, *2 * ["UCGABAR_ARV", "UCGABAR_WAIT", "LD.E.64 R4, [R8]"]]
    assert complaints("6__half", good, CLUSTER) == ""
    assert "0 of UCGABAR_WAIT" in complaints("6__half", [op for op in good if "WAIT" not in op], CLUSTER)
    assert "1 of LD.E.64" in complaints("6__half", good[:-1], CLUSTER)
    assert "1 of LD.E.128: an address" in complaints("6__half", [*good, "LD.E.128 R4, [R8]"], CLUSTER)
    assert "2 of LD.E.64: an address" in complaints("6__half", good)
    assert not matrix_check.kernels(dump("6__half", ["BPT.TRAP"], CLUSTER, "sm_80"))
    assert not matrix_check.kernels(dump("6__half", ["BPT.TRAP"], NAME, "sm_75"))
    assert matrix_check.kernels(dump("6__half", ["EXIT"], NAME, "sm_80"))
    assert matrix_check.kernels(dump("6__half", ["EXIT"], CLUSTER, "sm_120"))
