"""Whether the persistent kernels use the matrix units as intended: read from the disassembly.

python tools/matrix_check.py LIBRARY.so: every lstm_persistent kernel of every architecture multiplies with
HMMA in its own dtype (float32: in TF32), reads its weights from shared memory and its states from L2, both
16 bytes at a time, and keeps nothing in local memory; where its blocks form clusters (sm_90 only), it has
cluster barriers and reads the other blocks' shared memory. Needs cuobjdump: that of the CUDA toolkit, or the
one that triton brings with torch.
"""

import collections
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

KERNEL = re.compile(r"lstm_persistent(?:_backward)?_kernelI(\w+?)Li(\d+)ELi(\d+)E(?:\w*?(SumsInCluster))?")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)")
PRODUCT = {"13__nv_bfloat16": "HMMA.16816.F32.BF16", "6__half": "HMMA.16816.F32", "f": "HMMA.1688.F32.TF32"}

REMOTE = "LD.E.64"  # what ld.shared::cluster becomes


def cuobjdump():
    folders = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", "")]
    if triton := importlib.util.find_spec("triton"):
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def kernels(lines):
    """{(architecture, mangled name): Counter of opcodes} of the persistent kernels."""
    found, architecture, counts = {}, None, None
    for line in lines:
        if match := re.match(r"\s*arch = (\w+)", line):
            architecture, counts = match[1], None
        elif match := re.match(r"\s*Function : (\w+)", line):
            counts = None
            kernel = KERNEL.search(match[1])
            # where the hardware lacks what it needs, a kernel is a trap, and never launched
            if kernel and int(re.search(r"\d+", architecture)[0]) >= (90 if kernel[4] else 80):
                counts = found[architecture, match[1]] = collections.Counter()
        elif counts is not None and (match := INSTRUCTION.match(line)):
            counts[match[1]] += 1
    return found


def faults(name, counts):
    """What differs from that, a sentence each."""
    dtype, rows, columns, clusters = KERNEL.search(name).groups()
    least = 2 * int(rows) * int(columns)  # of one chunk of K
    if counts[PRODUCT[dtype]] < least:
        yield f"{counts[PRODUCT[dtype]]} of {PRODUCT[dtype]}, at least {least} were expected"
    for start, what in (("LDG.E.128", "16-byte loads from L2"), ("LDS.128", "16-byte loads of weights")):
        if not any(op.startswith(start) for op in counts):
            yield f"no {what}"
    for op in counts:
        if op.startswith(("LDL", "STL")):
            yield f"{counts[op]} of {op}: local memory"
        # shared memory of the cluster is read by the same instruction
        if re.match(r"(LD|ST)\.", op) and not (clusters and op == REMOTE):
            yield f"{counts[op]} of {op}: an address whose memory the compiler does not know"
    for op in ("UCGABAR_ARV", "UCGABAR_WAIT", REMOTE) if clusters else ():
        if counts[op] < 2:  # in the steps, and at the end
            yield f"{counts[op]} of {op}, which a cluster needs"


def main():
    tool = cuobjdump()
    if tool is None:
        sys.exit("cuobjdump is neither in CUDA_HOME nor on PATH, nor did triton bring it")
    words = [tool, "-sass", sys.argv[1]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as dump:
        found = kernels(dump.stdout)
    if dump.returncode != 0 or not found:
        sys.exit(f"{' '.join(words)} shows no persistent kernel, exit code {dump.returncode}")
    wrong = [f"{arch} {name}: {what}" for (arch, name), c in found.items() for what in faults(name, c)]
    if wrong:
        sys.exit("\n".join(wrong))
    architectures = collections.Counter(architecture for architecture, _ in found)
    print("persistent kernels with HMMA: " + ", ".join(f"{n} for {a}" for a, n in architectures.items()))


if __name__ == "__main__":
    main()
