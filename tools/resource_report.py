"""What the compiler says of every CUDA kernel: registers, shared memory, spills. A spill is an error.

python tools/resource_report.py BUILD_LOG [OUT.md]: the log of a build with nvcc's --resource-usage, which
setup.py asks for. Rows are kernels, over all types they are instantiated for; one column an architecture.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+\w?)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def read(log):
    """[(mangled name, architecture, registers, bytes of static shared memory, bytes spilled)]"""
    found, entry, spilled = [], None, 0
    for line in log.splitlines():
        if match := ENTRY.search(line):
            entry = match.groups()
        elif match := SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif entry and (match := USED.search(line)):
            shared = SHARED.search(line)
            found.append((*entry, int(match[1]), int(shared[1]) if shared else 0, spilled))
            entry = None
    return found


def short_names(mangled):
    """Demangled, without namespaces, types and arguments: cross_entropy_kernel."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    return [re.search(r"(\w+_kernel)", line)[1] for line in text.splitlines()]


def table(kernels):
    names = short_names([k[0] for k in kernels])
    architectures = sorted({k[1] for k in kernels})
    cells = defaultdict(list)
    for name, (_, architecture, *figures) in zip(names, kernels, strict=True):
        cells[name, architecture].append(figures)
    lines = [
        "Most registers of a thread, bytes of static shared memory of a block and bytes spilled, "
        "over all types and pack widths of a kernel.",
        "",
        "| kernel | " + " | ".join(architectures) + " |",
        "|---" * (1 + len(architectures)) + "|",
    ]
    for name in sorted(set(names)):
        columns = []
        for architecture in architectures:
            registers, shared, spilled = map(max, zip(*cells[name, architecture], strict=True))
            columns.append(f"{registers} registers, {shared} B, {spilled} B spilled")
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def main():
    kernels = read(Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace"))
    if not kernels:
        sys.exit(f"{sys.argv[1]} has no resource lines of nvcc: was CUDA code built?")
    text = table(kernels)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text, encoding="utf-8")
    print(text, end="")
    spilling = [k[0] for k in kernels if k[4]]
    if spilling:
        sys.exit("these kernels spill registers: " + ", ".join(spilling))


if __name__ == "__main__":
    main()
