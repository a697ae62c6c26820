"""The rules of the layout: dependencies run one way, one op has one name in every folder, short files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.cpu_only("the source tree")
PACKAGE = ROOT / "ulmfit_fast"
OPS = sorted(path.stem for path in (PACKAGE / "ops").glob("[!_]*.py"))
SOURCES = [
    path
    for folder in ("csrc", "ulmfit_fast", "tests", "benchmarks", "tools", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h", ".inl"}
]

# who may import whom: only names of the same or a lower level; what is not named is part of training, level 6
LEVELS = dict.fromkeys(("config", "schedules", "text", "extras", "devices", "reference", "checkpoints"), 0)
LEVELS |= dict.fromkeys(("archives", "foreign", "unpickling"), 0) | {"stack": 2, "layer": 3, "to_torch": 3}
LEVELS |= {"_C": 0, "_build_info": 0, "ops": 1, "nn": 2, "encoder": 3, "classifier": 4, "model": 5, "cli": 7}
LEVELS |= {"fastai_modules": 8, "fastai_fused": 8, "fastai_swap": 9, "fastai": 10}  # nothing stands on them


def imported(path):
    """The names within the package that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module in (".", "ulmfit_fast"):
                yield from (alias.name for alias in node.names)
            elif match := re.match(r"(?:\.|ulmfit_fast\.)(\w+)", module):
                yield match[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("ulmfit_fast."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("[!_]*.py")), ids=lambda path: path.stem)
def test_no_upward_import(path):
    def level(name):
        return LEVELS.get(name, 6)

    own = "ops" if path.parent.name == "ops" else path.stem
    upward = [name for name in imported(path) if own != "ops" or name not in OPS if level(name) > level(own)]
    assert not upward


def test_no_torch_below_kernels():
    include = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)')
    assert not [
        path.name for path in (ROOT / "csrc/kernels").rglob("*.*") if include.search(path.read_text())
    ]


@pytest.mark.parametrize(
    "pattern",
    [
        "csrc/cpu/{}.cpp",
        "csrc/cuda/{}.cpp",
        "csrc/kernels/cpu/{}.inl",
        "csrc/kernels/cuda/{}.cu",
        "tests/test_{}.py",
    ],
)
def test_one_op_one_name(pattern):
    if (ROOT / pattern).parent.is_dir():
        assert not [op for op in OPS if not (ROOT / pattern.format(op)).is_file()]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_over_350_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
